"""Reorder input channels so that N:M pruning behind keeps more of what matters.

    y = f(W₁ x + b),  z = W₂ y   →  rows of W₁ and b, columns of W₂ permuted        no operation added
    z = W x                      →  z = W[:, order] · x[order]                      one gather of the input

Of every m neighbours n will stay; channels that matter are often neighbours. They are dealt out over the
groups, then pairs are swapped while that retains more of the scores (Li et al., 2023, E-Sparse,
arXiv:2310.15929; with ``metric="magnitude"`` the search of Pool & Yu, 2021). Keeps: the function. Where a
permutation folds is read off the dataflow (:mod:`fxcompress.analysis.permutation`); within attention,
channels stay in their head.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from fxcompress.analysis.permutation import PermutationGroup, find_permutation_group
from fxcompress.analysis.site_types import Site
from fxcompress.analysis.sites import find_sites
from fxcompress.edits import Edit, Refuse
from fxcompress.errors import RecipeError
from fxcompress.pass_base import BlockContext, Pass
from fxcompress.passes._entropy import channel_entropy, entropy_scores
from fxcompress.passes._folding import gathered, unfoldable, unsuitable
from fxcompress.passes._inside import nodes_inside
from fxcompress.passes._moments import diagonal_moments
from fxcompress.passes._pruning import PruningPass, parse_pattern
from fxcompress.passes._scores import magnitude_scores, wanda_scores
from fxcompress.passes._selection import Candidate, SelectivePass, candidates
from fxcompress.passes._shuffling import best_order, retained

_ROWS = 1024  # of a family's scores that an order is judged on


@dataclass(frozen=True)
class PermuteChannels(SelectivePass):
    """Deal important channels out over the groups of an N:M pattern.

    Args:
        pattern: ``"n:m"`` of the pruning pass that follows; another there is refused. Default ``"2:4"``.
        metric: Scores of entries: ``"wanda"``, ``"entropy"`` (of ``e-sparse``) or ``"magnitude"``, which
            needs no data. Default ``"wanda"``.
        deal: Try dealing channels out by rank first (the paper's global shuffle). Default True.
        block: Channels among which pairs are swapped (its local shuffle); 0 swaps none. Default 32.
        rounds: Most swaps per block. Default 32.
        gather: Also reorder where the permutation does not fold into weights, by an explicit gather of the
            input. Default False: every gather costs time at run time.
        alpha, bins: See ``e-sparse``.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range, or no pruning pass with the same pattern follows.

    Example:
        >>> PermuteChannels(pattern="1:4").preserves_function
        True
    """

    pattern: str = "2:4"
    metric: Literal["wanda", "entropy", "magnitude"] = "wanda"
    deal: bool = True
    block: int = 32
    rounds: int = 32
    gather: bool = False
    alpha: float = 512.0
    bins: int = 100

    name: ClassVar[str] = "permute-channels"
    summary: ClassVar[str] = "Reorder channels so that N:M pruning keeps more; the function stays the same."
    source: ClassVar[str] = "Li et al., 2023 (E-Sparse, arXiv:2310.15929), shuffles; Pool & Yu, 2021"
    provides: ClassVar[frozenset[str]] = frozenset({"reordered-channels"})
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"sparse-weights", "quantized-weights", "quantized-activations", "low-rank"}
    )
    preserves_function: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups == (0, 0):
            raise RecipeError(f'{self.name}: pattern={self.pattern!r}, expected "n:m".', fix='"2:4"')
        if self.metric not in ("wanda", "entropy", "magnitude"):
            raise RecipeError(f"{self.name}: metric={self.metric!r}, expected wanda, entropy or magnitude.")
        for option in ("deal", "gather"):
            if not isinstance(getattr(self, option), bool):
                raise RecipeError(f"{self.name}: {option}={getattr(self, option)!r}, expected true or false.")
        for option, low in (("block", 0), ("rounds", 1), ("bins", 2)):
            if type(getattr(self, option)) is not int or getattr(self, option) < low:
                raise RecipeError(
                    f"{self.name}: {option}={getattr(self, option)!r}, expected at least {low}."
                )
        if type(self.alpha) not in (int, float) or not 0 <= self.alpha < float("inf"):
            raise RecipeError(f"{self.name}: alpha={self.alpha!r}, expected a number from 0.")

    @property
    def groups(self) -> tuple[int, int]:
        """``(n, m)``."""
        return parse_pattern(self.name, self.pattern)

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Magnitudes alone need no data."""
        return self.metric != "magnitude"

    def check_later(self, later: Sequence[Pass]) -> None:
        """See :meth:`Pass.check_later`."""
        pruning = [item for item in later if isinstance(item, PruningPass)]
        if not pruning or pruning[0].groups != self.groups:
            found = f"{pruning[0].name} with pattern={pruning[0].pattern!r}" if pruning else "no pruning pass"
            raise RecipeError(
                f"{self.name}: prepares for pattern={self.pattern!r}, but {found} follows.",
                fix="give both the same pattern.",
            )

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield permuted tensors (and gathers); a :class:`Refuse` for the rest."""
        self.check_patterns(block.program)
        families: dict[fx.Node, list[Candidate]] = {}
        for candidate in candidates(block):
            reason = self._unsuitable(block, candidate)
            if reason is not None:
                yield Refuse(candidate.name, reason)
            elif candidate.primary.input is not None:
                families.setdefault(candidate.primary.input, []).append(candidate)
        by_node: dict[fx.Node, list[Site]] = {}
        for site in find_sites(block.program):
            by_node.setdefault(site.node, []).append(site)
        inside = nodes_inside(block)
        for family in families.values():
            scores = self._scores(block, family)
            found = find_permutation_group(block.program, family[0].primary, by_node, inside)
            blocked = found if isinstance(found, str) else unfoldable(self, block, found, family)
            if scores is None:
                reason = "no calibration token reaches it"
            elif blocked is None and isinstance(found, PermutationGroup):
                reason = yield from self._fold(block, found, scores)
            elif self.gather:
                reason = yield from self._gather(block, family, scores, str(blocked))
            else:
                reason = f"the permutation does not fold (gather=False): {blocked}"
            for candidate in family if reason else ():
                yield Refuse(candidate.name, reason)

    def _scores(self, block: BlockContext, family: Sequence[Candidate]) -> Tensor | None:
        """``[R, K]`` float32: rows of all readers of an input, evenly thinned; None without data."""
        moments = diagonal_moments(block, family) if self.needs_calibration else {}
        site = family[0].primary
        entropy = channel_entropy(block, site, self.bins) if self.metric == "entropy" else None
        parts = []
        for candidate in family:
            site, weight = candidate.primary, block.weight(candidate.name).detach()
            if not self.needs_calibration:
                score = magnitude_scores(site, weight)
            elif candidate.name not in moments:
                return None
            elif entropy is not None:
                norm = moments[candidate.name].second.sqrt()
                score = entropy_scores(site, weight, norm, entropy, float(self.alpha))
            else:
                score = wanda_scores(site, weight, moments[candidate.name].second)
            parts.append(score[0].float().cpu())
        rows = torch.cat(parts)
        step = max(1, -(-len(rows) // _ROWS))
        return rows[::step]

    def _order(self, scores: Tensor) -> tuple[Tensor, float, float]:
        """An order of ``scores: [R, C]`` and what it and the old one retain."""
        n, m = self.groups
        order = best_order(scores, n, m, deal=self.deal, block=self.block, rounds=self.rounds)
        return order, retained(scores[:, order], n, m), retained(scores, n, m)

    def _fold(
        self, block: BlockContext, group: PermutationGroup, scores: Tensor
    ) -> Generator[Edit, None, str]:
        """Permute every parameter of the group; returns why not, or nothing."""
        target = torch.arange(group.cells.numel())
        after = before = 0.0
        for cell in group.cells[group.classes].unique().tolist():
            places = (group.cells[group.columns] == cell).nonzero().flatten()
            runs = _runs(group.columns, places, self.groups[1])
            if runs is None:
                return f"channels that move together do not lie in whole groups of {self.groups[1]}"
            order, new, old = self._order(torch.cat([scores[:, run] for run in runs]))
            classes = group.columns[runs[0]]
            target[classes] = classes[order]
            after, before = after + new, before + old
        if after <= before:
            return "no order retains more"
        reason = f"retains {after / before - 1:.2%} more in {self.pattern}, folded into weights"
        yield from group.edits(target, block.weight, reason)
        return ""

    def _gather(
        self, block: BlockContext, family: Sequence[Candidate], scores: Tensor, blocked: str
    ) -> Generator[Edit, None, str]:
        """Gather the input once for all its readers; returns why not, or nothing."""
        order, after, before = self._order(scores)
        if after <= before:
            return "no order retains more"
        note = f"retains {after / before - 1:.2%} more in {self.pattern}"
        yield from gathered(block, family, order, blocked, (), note)
        return ""

    def _unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        reason = unsuitable(self, block, candidate)
        if reason is not None:
            return reason
        width, m = candidate.primary.layout.matrix_shape[2], self.groups[1]
        if width % m or width == m:
            return f"its {width} inputs are no several groups of {m}"
        return None


def _runs(columns: Tensor, places: Tensor, m: int) -> list[Tensor] | None:
    """Places of a cell in runs that hold every class once, in one order; None unless groups of m fit them.

    Args:
        columns: ``[K]``: class of every input.
        places: Inputs of the cell, ascending.
        m: Size of a group.
    """
    length = columns[places].unique().numel()
    if places.numel() % length or length % m:
        return None
    runs = list(places.view(-1, length))
    same = all(torch.equal(columns[run], columns[runs[0]]) for run in runs)
    aligned = all(
        bool((run.view(-1, m) == run[::m, None] + torch.arange(m)).all()) and not bool((run[::m] % m).any())
        for run in runs
    )
    return runs if same and aligned else None
