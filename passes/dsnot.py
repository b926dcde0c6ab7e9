"""DSnoT: swap single weights of a mask so that the mean output of every row comes back to what it was.

    linear(x, w · mask)  →  linear(x, w · mask′)      as many zeros in every row, no weight trained

Zhang et al., 2023, "Dynamic Sparse No Training" (arXiv:2310.08915). Works on the mask of any pruning pass, on
weights that were updated, too: ε of a row is the change of its mean output, ``Σ_j (w_j − ŵ_j) E[x_j]``. A
weight that grows takes the value it had before it was pruned. Keeps: N:M patterns and the number of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.edits import Edit, Refuse, SetMask
from fxcompress.errors import RecipeError
from fxcompress.forms import SparsityMask
from fxcompress.pass_base import BlockContext
from fxcompress.passes._input_rows import unsupported
from fxcompress.passes._moments import Moments, diagonal_moments
from fxcompress.passes._scores import per_row
from fxcompress.passes._selection import Candidate, SelectivePass, candidates


@dataclass(frozen=True)
class Dsnot(SelectivePass):
    """Grow one weight and prune another in every row, while that brings the row's mean output closer.

    Args:
        cycles: Most swaps per row. Default 50 (authors' code).
        threshold: Rows whose ``|ε|`` is below it are left alone. Default 0.1 (authors' code).
        power: Of the variance by which a grown weight's contribution is divided. Default 1 (authors' code).
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: the data gave NaN or inf.

    Example:
        >>> sorted(Dsnot(cycles=20).requires)
        ['sparse-weights']
    """

    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0

    name: ClassVar[str] = "dsnot"
    summary: ClassVar[str] = "Swap single weights of a mask so that mean outputs are kept; no training."
    source: ClassVar[str] = "Zhang et al., 2023 (DSnoT, arXiv:2310.08915)"
    requires: ClassVar[frozenset[str]] = frozenset({"sparse-weights"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "packed-sparse"})
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.cycles) is not int or self.cycles < 1:
            raise RecipeError(f"{self.name}: cycles={self.cycles!r}, expected a positive integer.")
        for option in ("threshold", "power"):
            value = getattr(self, option)
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise RecipeError(f"{self.name}: {option}={value!r}, expected a number from 0.")

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetMask` or a :class:`Refuse` for every pruned weight of the block."""
        self.check_patterns(block.program)
        chosen = []
        for candidate in candidates(block):
            if candidate.name not in block.state.masks:
                continue
            reason = self.unselected(block.program, candidate.name) or unsupported(candidate.primary)
            if reason is None and candidate.name not in block.state.unpruned:
                reason = "edited since it was pruned, so what it was before does not fit any more"
            if reason is None:
                chosen.append(candidate)
            else:
                yield Refuse(candidate.name, reason)
        found = diagonal_moments(block, chosen)
        for candidate in chosen:
            if candidate.name in found:
                yield self._edit(block, candidate, found[candidate.name])
            else:
                yield Refuse(candidate.name, "no calibration token reaches it")

    def _edit(self, block: BlockContext, candidate: Candidate, found: Moments) -> Edit:
        name, mask = candidate.name, block.state.masks[candidate.name]
        layout = mask.layout
        full = layout.to_matrix(block.state.unpruned[name].detach())
        now = layout.to_matrix(block.weight(name).detach())
        shape = now.shape

        def rows(values: Tensor) -> Tensor:
            return per_row(candidate.primary, values).expand(shape).reshape(-1, shape[-1])

        swapper = Swapper(
            full.reshape(-1, shape[-1]).float(),
            now.reshape(-1, shape[-1]).float(),
            mask.matrix.reshape(-1, shape[-1]),
            rows(found.mean),
            rows(found.second.sqrt()),
            rows(found.variance),
            mask.m,
        )
        before = float(swapper.gap.abs().mean())
        swaps = swapper.run(self.cycles, float(self.threshold), float(self.power))
        if not swaps:
            return Refuse(name, f"no swap brings a mean output closer (mean gap {before:.3g})")
        keep = swapper.keep.reshape(shape)
        value = torch.where(keep & mask.matrix, now, full).masked_fill(~keep, 0)
        changed = SparsityMask(
            layout.from_matrix(keep).contiguous(), mask.perm, mask.batch_dims, mask.row_dims, mask.n, mask.m
        )
        after = float(swapper.gap.abs().mean())
        reason = f"{swaps} swaps, mean output gap {before:.3g} → {after:.3g}"
        return SetMask(name, layout.from_matrix(value).contiguous(), changed, reason)


class Swapper:
    """Swaps in all rows at once.

    Args:
        full: ``[R, K]`` weights before pruning.
        now: ``[R, K]`` pruned weights.
        keep: ``[R, K]`` bool.
        mean, norm, variance: ``[R, K]`` of the inputs: E[x], sqrt(E[x²]), Var(x).
        m: Size of groups whose count stays; 0: rows.

    Attributes:
        gap: ``[R]``: ε of every row now.
    """

    def __init__(
        self, full: Tensor, now: Tensor, keep: Tensor, mean: Tensor, norm: Tensor, variance: Tensor, m: int
    ) -> None:
        self.keep = keep.clone()
        self.grown = full * mean  # [R, K]: what growing an entry gives back
        self.lost = now * mean  # what pruning a kept one takes away
        self.score = now.abs() * norm
        self.full_score = full.abs() * norm
        self.variance = variance
        self.gap = (full - now).mul(mean).sum(1)
        self.tried = torch.zeros_like(self.keep)
        columns = keep.shape[1]
        self.group = torch.arange(columns, device=keep.device) // m if m else None

    def run(self, cycles: int, threshold: float, power: float) -> int:
        """Swap until nothing gains; returns the number of swaps.

        A swap is made only when ``|ε|`` of its row becomes smaller, so rows cannot go in circles.
        """
        divisor = self.variance.pow(power) if power else torch.ones_like(self.variance)
        key = self.grown.abs() / divisor.clamp_min(torch.finfo(divisor.dtype).tiny)
        swaps = 0
        for _ in range(cycles):
            active = self.gap.abs() > threshold
            if not bool(active.any()):
                break
            sign = self.gap.sign()[:, None]
            candidates_ = ~self.keep & ~self.tried & (self.grown * sign > 0)
            best, grow = torch.where(candidates_, key, -1.0).max(dim=1)
            prune, possible = self._partner(grow, sign)
            here = active & (best > 0)
            new = (
                self.gap
                + self.lost.gather(1, prune[:, None])[:, 0]
                - self.grown.gather(1, grow[:, None])[:, 0]
            )
            better = here & possible & (new.abs() < self.gap.abs())
            if not bool(here.any()):
                break
            self.tried[here.nonzero()[:, 0], grow[here]] = True
            index = better.nonzero()[:, 0]
            self._swap(index, grow[index], prune[index])
            self.gap = torch.where(better, new, self.gap)
            swaps += index.numel()
        return swaps

    def _partner(self, grow: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """The kept entry of least score that may go for ``grow: [R]``, and whether there is one.

        In a row any entry whose loss counters ε; in a group of m the least of the group.
        """
        allowed = self.keep & (self.lost * sign < 0)
        if self.group is not None:
            allowed = self.keep & (self.group == self.group[grow][:, None])
        least, prune = torch.where(allowed, self.score, torch.inf).min(dim=1)
        return prune, torch.isfinite(least)

    def _swap(self, rows: Tensor, grow: Tensor, prune: Tensor) -> None:
        self.keep[rows, grow] = True
        self.keep[rows, prune] = False
        self.lost[rows, grow] = self.grown[rows, grow]
        self.score[rows, grow] = self.full_score[rows, grow]
        self.tried[rows, prune] = True  # what has just gone does not come back
