"""How much each unit of a channel group matters: one score per unit, larger is more important.

A score sums over the group's members what a criterion makes of their slices: the rows of a weight that
compute a unit, its bias, the columns that read it. Criteria that need data ask the model for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxcompress.analysis.channel_group import ChannelGroup, GroupMember
from fxcompress.pass_base import ModelContext

__all__ = ["IMPORTANCE", "Importance", "slices"]

Importance = Callable[[ModelContext, ChannelGroup], Tensor]
"""``(model, group) → [units]`` float64, not negative."""


def slices(model: ModelContext, member: GroupMember) -> Tensor:
    """The part of a member's tensor that each unit has: ``[units, elements]`` in float64."""
    tensor = model.weight(member.name).detach().to("cpu", torch.float64).movedim(member.dim, 0)
    units = member.positions.shape[0]
    return tensor.index_select(0, member.positions.flatten()).reshape(units, -1)


def magnitude_l1(model: ModelContext, group: ChannelGroup) -> Tensor:
    """``Σ |w|`` over all weights that compute or read a unit (Li et al., 2017, section 3.1)."""
    return _over_weights(model, group, lambda part: part.abs().sum(1))


def magnitude_l2(model: ModelContext, group: ChannelGroup) -> Tensor:
    """``√Σ w²`` over all weights that compute or read a unit (Fang et al., 2023, DepGraph, equation 5)."""
    return _over_weights(model, group, lambda part: part.square().sum(1)).sqrt()


def _over_weights(model: ModelContext, group: ChannelGroup, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of a measure of the slices. Norm gains and statistics are left out."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        if member.role != "scales" and member.name in model.program.parameters:
            total += measure(slices(model, member))
    return total


IMPORTANCE: Mapping[str, Importance] = {"l1": magnitude_l1, "l2": magnitude_l2}
"""The ``importance`` option of a structural pass → the function."""
