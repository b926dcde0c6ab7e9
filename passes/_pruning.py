"""What pruning passes share: which weights, how many zeros in each, which entries, and the edit.

A pass gives scores, one per entry; here the lowest are chosen. Counts are exact, ``⌊s · n⌋`` of n entries,
and of equal scores the first in memory order goes, so that equal inputs give equal masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.analysis.site_types import SiteKind
from fxcompress.analysis.sites import find_sites
from fxcompress.edits import Edit, Refuse, SetMask
from fxcompress.errors import FormatError, RecipeError
from fxcompress.forms import SparsityMask
from fxcompress.pass_base import BlockContext
from fxcompress.passes._allocation import allocate
from fxcompress.passes._input_rows import unsupported
from fxcompress.passes._selection import Candidate, Role, SelectivePass, candidates

_SLACK = 1e-4  # keeps ⌊s · n⌋ exact where s · n is an integer in decimal but not in binary


@dataclass(frozen=True)
class PruningPass(SelectivePass):
    """Options of every pruning pass.

    Args:
        sparsity: Share of entries that become zero, 0 < s < 1. Default 0.5; not for N:M patterns. Behind
            ``allocate-sparsity`` the mean over all weights.
        pattern: ``"n:m"``: keep n of every m consecutive inputs. Default ``""``: anywhere in a row or matrix.
        padding: Let the last group of a row be shorter where m does not divide the inputs; it keeps up to n.
            Default False: such a weight is left alone.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range.
    """

    sparsity: float = 0.5
    pattern: str = ""
    padding: bool = field(default=False, kw_only=True)

    provides: ClassVar[frozenset[str]] = frozenset({"sparse-weights"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "packed-sparse", "low-rank"})

    def __post_init__(self) -> None:
        super().__post_init__()
        s = self.sparsity
        if type(s) not in (int, float) or not 0 < s < 1:
            raise RecipeError(
                f"{self.name}: sparsity={s!r}, expected a share between 0 and 1, both excluded.",
                fix="exclude weights to leave them dense; a weight of zeros only is no weight.",
            )
        if not isinstance(self.padding, bool):
            raise RecipeError(f"{self.name}: padding={self.padding!r}, expected true or false.")
        n, m = self.groups
        if m and s not in (0.5, 1 - n / m):
            raise RecipeError(
                f"{self.name}: sparsity={s!r} does not apply to pattern={self.pattern!r}, which makes"
                f" {1 - n / m:g} of the entries zero."
            )

    @property
    def groups(self) -> tuple[int, int]:
        """``(n, m)`` of the pattern, ``(0, 0)`` without one."""
        return parse_pattern(self.name, self.pattern)

    def choose(self, block: BlockContext) -> tuple[list[Candidate], list[Refuse]]:
        """Weights of this block that are pruned, and refusals for the others.

        Raises:
            RecipeError: a name pattern matches nothing, or no weight of the model has groups of m.
        """
        self.check_patterns(block.program)
        if block.index == 0:
            self._check_pattern_fits(block)
        chosen, refused = [], []
        for candidate in candidates(block):
            reason = self.unsuitable(block, candidate)
            if reason is None:
                chosen.append(candidate)
            else:
                refused.append(Refuse(candidate.name, reason))
        return chosen, refused

    def unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        """Why a weight is left alone, or None."""
        site = candidate.primary
        reason = self.unselected(block.program, candidate.name)
        if reason is not None:
            return reason
        if candidate.role is not Role.MATRIX:
            return f"{candidate.role.value}: left dense, its error reaches the output directly"
        if site.kind is SiteKind.OTHER:
            return site.reason or "no use of it is a product"
        if self.needs_calibration and unsupported(site) is not None:
            return unsupported(site)
        _, m = self.groups
        columns = site.layout.matrix_shape[2]
        if m and (m > columns or (columns % m and not self.padding)):
            return f"its {columns} inputs do not divide into groups of {m} (padding=False)"
        return None

    def _check_pattern_fits(self, block: BlockContext) -> None:
        _, m = self.groups
        if not m:
            return
        widths = {s.layout.matrix_shape[2] for s in find_sites(block.program) if s.kind is not SiteKind.OTHER}
        fits = [w for w in widths if m <= w and (self.padding or w % m == 0)]
        if widths and not fits:
            raise RecipeError(
                f"{self.name}: pattern={self.pattern!r} fits no weight: {sorted(widths)} inputs do not divide"
                f" into groups of {m}.",
                fix="padding=True, or another pattern.",
            )

    def shares(self, block: BlockContext) -> Mapping[str, float]:
        """Sparsity by parameter name for weights with a sensitivity, see :mod:`allocate_sparsity`.

        Raises:
            RecipeError: the mean cannot be met within the bounds.
        """
        noted = {
            name: entry
            for name, entry in block.state.sensitivities.items()
            if self.unselected(block.program, name) is None
        }
        sizes = {name: block.program.weights[name].numel() for name in noted}
        return allocate(self.name, noted, sizes, float(self.sparsity)) if noted and not self.pattern else {}

    def keep_of(self, scores: Tensor, share: float, *, rows: bool) -> Tensor:
        """The mask of a matrix of scores.

        Args:
            scores: ``[B, N, K]``.
            share: Of zeros, where there is no pattern.
            rows: Compare within rows rather than in the whole matrix.
        """
        n, m = self.groups
        if m:
            return keep_groups(scores, n, m)
        return keep_highest(scores if rows else scores.reshape(1, 1, -1), share).reshape(scores.shape)

    def edit(
        self, candidate: Candidate, value: Tensor, keep: Tensor, note: str = "", error: float | None = None
    ) -> SetMask:
        """The edit that gives ``candidate`` its pruned value and mask, both ``[B, N, K]``."""
        layout = candidate.primary.layout
        n, m = self.groups
        mask = SparsityMask(
            layout.from_matrix(keep).contiguous(), layout.perm, layout.batch_dims, layout.row_dims, n, m
        )
        share = mask.pruned / mask.keep.numel()
        reason = f"{mask.describe()}, {share:.1%} zeros" if m else mask.describe()
        dense = layout.from_matrix(value.masked_fill(~keep, 0)).contiguous()
        return SetMask(candidate.name, dense, mask, reason + note, error)


def parse_pattern(pass_name: str, pattern: object) -> tuple[int, int]:
    """``(n, m)`` of ``"n:m"``, ``(0, 0)`` for an empty one.

    Raises:
        RecipeError: not of that form, or not 0 < n < m.
    """
    if pattern == "":
        return 0, 0
    parts = pattern.split(":") if isinstance(pattern, str) else []
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise RecipeError(
            f'{pass_name}: pattern={pattern!r}, expected "n:m", n inputs kept of every m.', fix='"2:4"'
        )
    n, m = int(parts[0]), int(parts[1])
    if not 0 < n < m:
        raise RecipeError(
            f"{pass_name}: pattern={pattern!r} keeps {n} of every {m} inputs, expected 0 < n < m.",
            fix='"2:4" halves a weight.',
        )
    if m > 256:
        raise RecipeError(f"{pass_name}: pattern={pattern!r}: groups have at most 256 inputs.")
    return n, m


def zeros_of(share: float, count: int) -> int:
    """``⌊share · count⌋``, exact where the product is an integer."""
    return min(count, math.floor(share * count + _SLACK))


def keep_highest(scores: Tensor, share: float) -> Tensor:
    """True for all but the ``⌊share · K⌋`` lowest of every row of ``[..., K]``; of equals the first goes.

    Raises:
        FormatError: a score is NaN.
    """
    if bool(scores.isnan().any()):
        raise FormatError("keep_highest: a score is NaN.")
    gone = zeros_of(share, scores.shape[-1])
    order = scores.sort(dim=-1, stable=True).indices[..., :gone]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order, False)


def keep_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """True for the n highest of every m neighbours of ``[..., K]``; of equals the last stay.

    A shorter last group keeps up to n.
    """
    columns = scores.shape[-1]
    padded = F.pad(scores, (0, -columns % m), value=-torch.inf).unflatten(-1, (-1, m))
    order = padded.sort(dim=-1, stable=True).indices[..., : m - n]
    keep = torch.ones_like(padded, dtype=torch.bool).scatter_(-1, order, False)
    return keep.flatten(-2)[..., :columns]


def masked_first(block: BlockContext, name: str, scores: Tensor) -> Tensor:
    """Scores ``[B, N, K]`` under which entries that are zero for good go first: masks intersect."""
    mask = block.state.masks.get(name)
    return scores if mask is None else scores.masked_fill(~mask.matrix, -1.0)


def prune_by_score(
    one: PruningPass,
    block: BlockContext,
    chosen: Sequence[Candidate],
    scores: Mapping[str, Tensor],
    *,
    rows: bool,
) -> Iterator[Edit]:
    """Edits that zero the lowest of non-negative ``scores: [B, N, K]`` by name, and change nothing else."""
    shares = one.shares(block)
    for candidate in chosen:
        name = candidate.name
        if name not in scores:
            yield Refuse(name, "no calibration token reaches it")
            continue
        share = shares.get(name, float(one.sparsity))
        matrix = candidate.primary.layout.to_matrix(block.weight(name).detach())
        keep = one.keep_of(masked_first(block, name, scores[name]), share, rows=rows)
        if bool(keep.all()):
            yield Refuse(name, f"its share of zeros, {share:.2g}, comes to none")
            continue
        yield one.edit(candidate, matrix, keep)
