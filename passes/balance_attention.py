"""Balance queries and keys, so that both can be quantized where they meet.

    scores = Σ_c q_c·k_c  =  Σ_c (q_c / s_c)·(k_c·s_c),     s_c = max|q_c|^α / max|k_c|^(1−α)

The equivalent transformation of OmniQuant (Shao et al., 2024, arXiv:2308.13137, section 3.3) for the
affinity matrix, with SmoothQuant's closed form for its scale. Keeps: the function. The scale moves into the
rows of the projections, or the gains of norms per head, and the biases between; channels that a rotary
embedding mixes share one (:mod:`fxcompress.analysis.query_key`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.analysis.query_key import QueryKeyGroup, find_query_key_groups
from fxcompress.analysis.site_types import Site
from fxcompress.analysis.sites import find_sites
from fxcompress.analysis.smoothing_group import GroupKind
from fxcompress.analysis.smoothing_sources import Source
from fxcompress.edits import Edit, Refuse
from fxcompress.errors import RecipeError, WeightError
from fxcompress.pass_base import BlockContext
from fxcompress.passes._balancing import BalancingPass, rounded_scale
from fxcompress.passes._inside import nodes_inside
from fxcompress.passes._selection import SelectivePass


@dataclass(frozen=True)
class BalanceAttention(SelectivePass):
    """Divide queries and multiply keys by a scale per channel.

    Args:
        alpha: How much of the difficulty moves into the keys: 0 flattens the keys, 1 the queries. Default
            0.5: both get the geometric mean of their ranges.
        exact: Round every scale to the nearest power of two, and keep the scale 1 where even that would round
            a stored weight. Default True; see :class:`fxcompress.passes._balancing.BalancingPass`.
        include, exclude: Name patterns, see :class:`SelectivePass`; every parameter of a group must be
            selected.

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: the calibration data gave NaN or inf.

    Example:
        >>> BalanceAttention(alpha=0.5).preserves_function
        True
    """

    alpha: float = 0.5
    exact: bool = field(default=True, kw_only=True)

    name: ClassVar[str] = "balance-attention"
    summary: ClassVar[str] = "Balance the ranges of queries and keys; the function stays the same."
    source: ClassVar[str] = "Shao et al., 2024 (OmniQuant, arXiv:2308.13137), section 3.3"
    provides: ClassVar[frozenset[str]] = frozenset({"balanced-attention"})
    conflicts: ClassVar[frozenset[str]] = BalancingPass.conflicts | {"balanced-attention"}
    needs_calibration: ClassVar[bool] = True
    preserves_function: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.alpha) not in (int, float) or not 0 <= self.alpha <= 1:
            raise RecipeError(f"{self.name}: alpha={self.alpha!r}, expected a number from 0 to 1.")
        if not isinstance(self.exact, bool):
            raise RecipeError(f"{self.name}: exact={self.exact!r}, expected true or false.")
        object.__setattr__(self, "preserves_function", self.exact)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield the changed tensors of every attention of the block, and a :class:`Refuse` for the others."""
        self.check_patterns(block.program)
        mine = {site.node for site in block.sites}
        sites = [
            *block.sites,
            *(site for site in find_sites(block.program) if site.node not in mine),
        ]
        inside = nodes_inside(block)
        analysis = find_query_key_groups(block.program, sites, inside)
        for attention, reason in analysis.refused:
            for name in dict.fromkeys((*attention.query_weights, *attention.key_weights)):
                yield Refuse(name, reason)
        for group in analysis.groups:
            yield from self._balance(block, group, sites)

    def _balance(self, block: BlockContext, group: QueryKeyGroup, sites: Sequence[Site]) -> Iterator[Edit]:
        names = list(dict.fromkeys(parameter.name for parameter in group.group.parameters))
        reasons = [(name, self.unselected(block.program, name)) for name in names]
        refusal = next((f"{name} {reason}" for name, reason in reasons if reason), None)
        if refusal is None and any(block.state.form(name).bias is not None for name in names):
            refusal = "a bias has moved into its form, where it would not be scaled along"
        if refusal is not None:
            yield from (Refuse(name, refusal) for name in names)
            return
        q = _greatest(_magnitude(block, group.query, sites), group.query_channels, group.channels)
        k = _greatest(_magnitude(block, group.key, sites), group.key_channels, group.channels)
        scale = torch.where((q == 0) | (k == 0), 1.0, q.pow(self.alpha) / k.pow(1 - self.alpha))
        if self.exact:
            scale = rounded_scale(scale)
            kept = group.group.without_rounding(torch.cat([scale, scale.reciprocal()]), block.weight)
            scale = torch.where((kept[: group.channels] == 1) | (kept[group.channels :] == 1), 1.0, scale)
        moved = int((scale != 1).sum())
        if not moved:
            yield from (Refuse(name, "nothing to move: every scale is 1") for name in names)
            return
        span = f"{float(scale.min()):.3g}…{float(scale.max()):.3g}"
        reason = f"queries against keys: {moved} of {group.channels} channels, {span}, α={self.alpha:g}"
        both = torch.cat([scale, scale.reciprocal()])
        try:
            yield from group.group.edits(both, block.weight, reason)
        except WeightError as error:
            yield from (Refuse(name, str(error)) for name in names)


def _magnitude(block: BlockContext, source: Source, sites: Sequence[Site]) -> Tensor:
    """``[rows or gains]`` float64: how large a producer's channels get on the calibration data.

    A norm's output has the same spread in every channel before its gain, which therefore tells it.
    """
    if source.kind is GroupKind.NORM:
        parameter = source.parameters[0]
        used = parameter.multiplier * block.weight(parameter.name).double() + parameter.offset
        return used.abs().flatten().cpu()
    site = next(site for site in sites if site.node is source.node and site.name == source.name)
    matrix = site.layout.to_matrix(block.weight(site.name))[0].float()  # [N, K]
    bias = None if site.bias is None else block.weight(site.bias).float()
    largest = torch.zeros(matrix.shape[0], device=matrix.device)
    for x in block.batches(site):
        y = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]).float(), matrix, bias)
        largest = torch.maximum(largest, y.abs().amax(0))
    return largest.double().cpu()


def _greatest(values: Tensor, channels: Tensor, count: int) -> Tensor:
    """``[C]``: the greatest of the values that belong to each channel."""
    held = torch.zeros(count, dtype=torch.float64)
    chosen = channels >= 0
    return held.scatter_reduce_(0, channels[chosen], values[chosen], "amax")
