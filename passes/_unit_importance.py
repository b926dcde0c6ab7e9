"""How much each unit of a channel group matters: one score per unit, larger is more important.

    l1, l2          Σ |w|, √Σ w² over the weights that compute or read a unit        no data
    wanda           Σ |w_ij| · √E[x_j²] over the weights that read it                activations
    flap            Σ Var[x_j] · Σ_i w_ij² over the columns that read it             activations
    taylor          Σ |w · ḡ|                                                        gradients of the loss
    taylor-vector   |Σ w · ḡ|                                                        "
    taylor-second   Σ w² F,  F = mean over batches of g²                             "
    taylor-mixed    Σ |w · ḡ − ½ w² F|                                               "

ḡ is the mean gradient over calibration batches. Taylor scores are taken for every member of a group by
itself and then combined; the activation criteria look at the weights that read a unit, as their papers do,
and for experts at their own matrices (:mod:`._expert_importance`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.analysis.channel_group import ChannelGroup, GroupMember
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.pass_base import BlockContext, ModelContext, Statistics
from fxcompress.passes._expert_importance import expert_flap, expert_wanda, over_experts

__all__ = ["COMBINE", "GRADIENTS", "IMPORTANCE", "Importance", "reading_sites", "slices"]

Importance = Callable[[ModelContext, Sequence[ChannelGroup]], dict[str, Tensor]]
"""``(model, groups) → group name → [units] float64``; groups that cannot be scored are missing."""

Combine = Callable[[Tensor], Tensor]
COMBINE: Mapping[str, Combine] = {
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.amax(0),
    "prod": lambda scores: scores.prod(0),
}
"""How the scores ``[members, units]`` of a group's members become one."""

_MEASURED = (SiteKind.LINEAR, SiteKind.CONV, SiteKind.CONV_TRANSPOSED, SiteKind.BATCHED, SiteKind.EXPERTS)


def slices(model: ModelContext | BlockContext, member: GroupMember) -> Tensor:
    """The part of a member's tensor that each unit has: ``[units, elements]`` in float64."""
    return cut_out(model.weight(member.name), member)


def cut_out(tensor: Tensor, member: GroupMember) -> Tensor:
    """The part of any tensor shaped like a member's that each unit has: ``[units, elements]`` float64."""
    rows = tensor.detach().to("cpu", torch.float64).movedim(member.dim, 0)
    return rows.index_select(0, member.positions.flatten()).reshape(member.positions.shape[0], -1)


# --- magnitude -------------------------------------------------------------------------------------------


def magnitude_l1(model: ModelContext, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """``Σ |w|`` over all weights that compute or read a unit (Li et al., 2017, section 3.1)."""
    return {group.name: _over_weights(model, group, lambda part: part.abs().sum(1)) for group in groups}


def magnitude_l2(model: ModelContext, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """``√Σ w²`` over all weights that compute or read a unit (Fang et al., 2023, DepGraph, equation 5)."""
    return {
        group.name: _over_weights(model, group, lambda part: part.square().sum(1)).sqrt() for group in groups
    }


def _over_weights(model: ModelContext, group: ChannelGroup, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of a measure of the slices. Norm gains and statistics are left out."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in weights_of(model, group):
        total += measure(slices(model, member))
    return total


def weights_of(model: ModelContext, group: ChannelGroup) -> list[GroupMember]:
    """The parameters that compute or read a group's units."""
    return [m for m in group.members if m.role != "scales" and m.name in model.program.parameters]


# --- activations -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """A weight that reads units, at one of its uses.

    Args:
        member: The dimension along which the units lie.
        site: Where it multiplies them.
        inputs: Statistics of what it multiplies.
    """

    member: GroupMember
    site: Site
    inputs: Statistics


def wanda(model: ModelContext, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """``Σ |w_ij| · √E[x_j²]`` over the weights that read a unit (Sun et al., 2024, for whole columns)."""

    def score(reading: Reading) -> Tensor:
        return _columns(model, reading.member).abs().sum(1) * reading.inputs.second_moment.double().sqrt()

    channels, experts = _by_kind(groups)
    found = _over_readings(model, channels, lambda group, parts: parts.sum(1), score)
    return {**found, **over_experts(model, experts, expert_wanda)}


def flap(model: ModelContext, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """``Var[x_j] · Σ_i w_ij²``, the weighted fluctuation of An et al. (2024, FLAP), equation 5.

    A channel whose input hardly varies can be replaced by a constant. The scores of a head's channels are
    squared and averaged, as in the reference implementation.
    """

    def score(reading: Reading) -> Tensor:
        return _columns(model, reading.member).square().sum(1) * reading.inputs.variance.double()

    def whole(group: ChannelGroup, parts: Tensor) -> Tensor:
        return parts.square().mean(1) if group.kind == "heads" else parts.sum(1)

    channels, experts = _by_kind(groups)
    return {
        **_over_readings(model, channels, whole, score),
        **over_experts(model, experts, expert_flap),
    }


def _by_kind(groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], list[ChannelGroup]]:
    """Channels and heads, whose readers are measured, and experts, whose own matrices are."""
    return [g for g in groups if g.kind != "experts"], [g for g in groups if g.kind == "experts"]


def _columns(model: ModelContext, member: GroupMember) -> Tensor:
    """``[channels, elements]`` float64: all a weight has for each position along the member's dimension."""
    weight = model.weight(member.name).detach().to("cpu", torch.float64)
    return weight.movedim(member.dim, 0).flatten(1)


def _over_readings(
    model: ModelContext,
    groups: Sequence[ChannelGroup],
    whole: Callable[[ChannelGroup, Tensor], Tensor],
    score: Callable[[Reading], Tensor],
) -> dict[str, Tensor]:
    """Sum over the weights that read a group of ``whole(group, scores of its channels [units, width])``."""
    found: dict[str, Tensor] = {}
    for group, reading in _readings(model, groups):
        parts = score(reading).cpu()[reading.member.positions]
        found[group.name] = found.get(group.name, 0) + whole(group, parts)
    return found


def _readings(model: ModelContext, groups: Sequence[ChannelGroup]) -> Iterator[tuple[ChannelGroup, Reading]]:
    """Every use of a weight that reads units of a group and whose input can be measured, block by block."""
    for block in model.blocks:
        here = [(group, member, site) for group in groups for member, site in reading_sites(block, group)]
        if not here:
            continue
        statistics = block.statistics([site for _, _, site in here])
        for group, member, site in here:
            assert site.input is not None
            yield group, Reading(member, site, statistics[site.input.name])


def reading_sites(block: BlockContext, group: ChannelGroup) -> list[tuple[GroupMember, Site]]:
    """Uses in a block of the weights that read a group's units, where the input's channels are the units.

    Not where a weight contracts only a part of its input's channels (grouped convolutions).
    """
    found = []
    for member in group.consumers():
        for site in block.sites:
            if site.name == member.name and site.kind in _MEASURED and site.input is not None:
                layout, value = site.layout, site.input.meta["val"]
                convolves = site.kind in (SiteKind.CONV, SiteKind.CONV_TRANSPOSED)
                channels = value.shape[1 - len(layout.shape)] if convolves else value.shape[-1]
                contracted = layout.perm[layout.batch_dims + layout.row_dims]
                if contracted == member.dim and channels == layout.shape[member.dim]:
                    found.append((member, site))
    return found


# --- gradients -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taylor:
    """What removing a unit changes of the loss, by its expansion (Ma et al., 2023, LLM-Pruner, section 3.2).

    Args:
        order: ``"first"``, ``"second"`` or ``"mixed"``.
        vector: Sum over a slice before taking the magnitude, rather than after (first order only).
    """

    order: str = "first"
    vector: bool = False

    def scores(
        self, model: ModelContext, groups: Sequence[ChannelGroup], combine: str, samples: int | None
    ) -> dict[str, Tensor]:
        """``[units]`` float64 by group.

        Args:
            model: The model.
            groups: Which groups.
            combine: How the scores of a group's members become one, see :data:`COMBINE`.
            samples: Calibration batches to use.
        """
        members = {group.name: weights_of(model, group) for group in groups}
        sums: dict[str, _Sums] = {}
        for name in dict.fromkeys(member.name for found in members.values() for member in found):
            places = [m for found in members.values() for m in found if m.name == name]
            sums[name] = _Sums(model.weight(name), places, self)
        for name, gradient in model.whole(samples).gradients(sums):
            sums[name].add(gradient)
        return {
            name: COMBINE[combine](torch.stack([sums[member.name].score(member) for member in found]))
            for name, found in members.items()
            if found
        }


class _Sums:
    """What the scores of one parameter's slices need of its gradients, summed over batches.

    Second-order scores and those of whole vectors need a number per unit, the others the gradient's sum.
    """

    def __init__(self, weight: Tensor, members: Sequence[GroupMember], taylor: Taylor) -> None:
        self.weight, self.members, self.taylor = weight, members, taylor
        self.batches = 0
        self.per_unit = {m: torch.zeros(m.positions.shape[0], dtype=torch.float64) for m in members}
        self.gradient: Tensor | None = None  # Σ g, float32
        self.squares: Tensor | None = None  # Σ g², float32

    def add(self, gradient: Tensor) -> None:
        self.batches += 1
        if self.taylor.order == "second" or self.taylor.vector:
            for member in self.members:
                change = cut_out(self.weight, member) * cut_out(gradient, member)
                self.per_unit[member] += change.sum(1) if self.taylor.vector else change.square().sum(1)
            return
        g = gradient.detach().float()
        self.gradient = g.clone() if self.gradient is None else self.gradient.add_(g)
        if self.taylor.order == "mixed":
            self.squares = g.square() if self.squares is None else self.squares.addcmul_(g, g)

    def score(self, member: GroupMember) -> Tensor:
        """``[units]`` of one member."""
        if self.taylor.order == "second" or self.taylor.vector:
            return (self.per_unit[member] / self.batches).abs()
        assert self.gradient is not None
        weight = cut_out(self.weight, member)
        change = weight * cut_out(self.gradient, member) / self.batches
        if self.taylor.order == "mixed":
            assert self.squares is not None
            change = change - weight.square() * cut_out(self.squares, member) / (2 * self.batches)
        return change.abs().sum(1)


GRADIENTS: Mapping[str, Taylor] = {
    "taylor": Taylor("first"),
    "taylor-vector": Taylor("first", vector=True),
    "taylor-second": Taylor("second"),
    "taylor-mixed": Taylor("mixed"),
}
"""Criteria from the gradients of the loss."""

IMPORTANCE: Mapping[str, Importance] = {
    "l1": magnitude_l1,
    "l2": magnitude_l2,
    "wanda": wanda,
    "flap": flap,
}
"""The other criteria. The ``importance`` option of a structural pass names one of these or of the above."""
