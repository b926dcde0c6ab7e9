"""Zero the weights of least magnitude; the baseline every pruning method is compared with.

    linear(x, w)  →  linear(x, w · mask)

Needs no data. Keeps: every use of the weight, its shape and dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.analysis.site_types import SiteKind
from fxcompress.analysis.sites import find_sites, sites_by_parameter
from fxcompress.edits import Edit, SetSensitivity
from fxcompress.errors import RecipeError
from fxcompress.pass_base import BlockContext
from fxcompress.passes._pruning import PruningPass, prune_by_score, zeros_of
from fxcompress.passes._scores import magnitude_scores
from fxcompress.passes._selection import find_heads


@dataclass(frozen=True)
class PruneMagnitude(PruningPass):
    """Zero the smallest weights.

    Args:
        sparsity, pattern, padding, include, exclude: See :class:`PruningPass`.
        scope: ``"layer"``: the ⌊s·n⌋ smallest of every weight. ``"global"``: of all weights together, so that
            layers of small weights lose more. Default ``"layer"``.

    Raises:
        RecipeError: an option is out of range.

    Example:
        >>> PruneMagnitude(pattern="2:4").groups
        (2, 4)
    """

    scope: Literal["layer", "global"] = "layer"

    name: ClassVar[str] = "prune-magnitude"
    summary: ClassVar[str] = "Zero the weights of least magnitude (no data needed)."
    source: ClassVar[str] = "magnitude pruning; Han et al., 2015 (arXiv:1506.02626)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in ("layer", "global"):
            raise RecipeError(f"{self.name}: scope={self.scope!r}, expected 'layer' or 'global'.")
        if self.scope == "global" and self.pattern:
            raise RecipeError(f"{self.name}: pattern={self.pattern!r} leaves nothing to scope='global'.")

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetMask` or a :class:`Refuse` for every weight of the block."""
        chosen, refused = self.choose(block)
        yield from refused
        if self.scope == "global" and block.index == 0:
            yield from self._divide(block)
        scores = {c.name: magnitude_scores(c.primary, block.weight(c.name).detach()) for c in chosen}
        yield from prune_by_score(self, block, chosen, scores, rows=False)

    def _divide(self, block: BlockContext) -> Iterator[Edit]:
        """The sparsity of every weight of the model under one threshold for all."""
        if block.state.sensitivities:
            raise RecipeError(
                f"{self.name}: scope='global' divides the zeros itself.", fix="leave allocate-sparsity out."
            )
        sites = find_sites(block.program)
        heads = find_heads(block.program, sites)
        names = [
            name
            for name, uses in sites_by_parameter(sites).items()
            if name not in heads
            and all(site.kind is not SiteKind.EMBEDDING for site in uses)
            and any(site.kind is not SiteKind.OTHER for site in uses)
            and self.unselected(block.program, name) is None
        ]
        weights = [block.weight(name).detach() for name in names]
        for name, weight, zeros in zip(names, weights, smallest_counts(weights, self.sparsity), strict=True):
            share = zeros / weight.numel()
            yield SetSensitivity(
                name, "share", share, 0.0, reason=f"{share:.1%} of it are below the threshold"
            )


def smallest_counts(weights: Sequence[Tensor], share: float) -> list[int]:
    """How many of the ``⌊share · n⌋`` smallest magnitudes of all weights lie in each; ties in order.

    Found digit by digit on the bits of float32, whose order is that of the magnitudes, so that no copy of all
    weights is needed.
    """
    wanted = zeros_of(share, sum(weight.numel() for weight in weights))
    if wanted == 0:
        return [0] * len(weights)
    upper = sum(torch.bincount(_bits(weight) >> 16, minlength=1 << 15) for weight in weights)
    assert isinstance(upper, Tensor)
    digit, below = _place(upper, wanted)
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for weight in weights:
        bits = _bits(weight)
        lower += torch.bincount(bits[bits >> 16 == digit] & 0xFFFF, minlength=1 << 16)
    last, less = _place(lower, wanted - below)
    threshold = digit << 16 | last
    counts = [int((_bits(weight) < threshold).sum()) for weight in weights]
    left = wanted - below - less
    for index, weight in enumerate(weights):
        ties = min(left, int((_bits(weight) == threshold).sum()))
        counts[index] += ties
        left -= ties
    return counts


def _bits(weight: Tensor) -> Tensor:
    return weight.abs().float().flatten().contiguous().view(torch.int32).cpu()


def _place(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The digit at which ``wanted`` is reached, and how many lie below it."""
    total = counts.cumsum(0)
    digit = int(torch.searchsorted(total, wanted))
    return digit, int(total[digit] - counts[digit])
