"""Channel groups: what is cut together, so that a smaller model computes the same as a masked one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Role = Literal["produces", "consumes", "scales"]
Kind = Literal["channels", "heads", "experts"]


@dataclass(frozen=True, eq=False)
class GroupMember:
    """One dimension of one parameter or buffer that a group's units lie in.

    Args:
        name: Canonical qualified name.
        dim: Dimension of the tensor, non-negative.
        positions: ``[units, width]`` int64: where along ``dim`` each unit lies. Widths differ between
            members: a group of grouped-query heads has ``queries · head_dim`` rows of the query projection
            per unit, and ``head_dim`` of the key projection. Positions outside every unit (another segment
            of a fused tensor) are never cut.
        role: ``"produces"``: the slice computes the unit (rows of a weight, its bias). ``"consumes"``: the
            slice reads it (columns of the next weight). ``"scales"``: element by element between the two
            (norm gains, running statistics, learned positions).
    """

    name: str
    dim: int
    positions: Tensor
    role: Role


@dataclass(frozen=True)
class Route:
    """An op in which the units of a group compete: a router's softmax, its choice of the best.

    Args:
        node: Name of the op in the graph.
        argument: Name of its argument that holds the scores.
        dim: Dimension of the scores along which the units lie, one each.
    """

    node: str
    argument: str
    dim: int


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units that can be removed one by one: cutting any of them equals masking it.

    Masking zeroes the slices of every member, whatever its role, and lets the unit lose wherever units
    compete: its score is minus infinity there.

    Args:
        name: The first producing parameter and its dimension, ``"model.layers.0.mlp.gate_proj.weight:0"``.
        kind: What a unit is: a channel, an attention head (with the queries that share its keys and values),
            or an expert.
        units: Their number.
        members: All tensors that hold a part of a unit; no (tensor, dim) twice.
        block: Index of the repeated block that holds the group's producers; -1 outside of blocks.
        frozen: Why the group cannot be cut; empty when it can.
        routes: Where its units compete, in the order of the graph; experts that a router chooses.
        least: How many units have to stay: as many as are chosen.
    """

    name: str
    kind: Kind
    units: int
    members: tuple[GroupMember, ...]
    block: int = -1
    frozen: str = ""
    routes: tuple[Route, ...] = ()
    least: int = 1

    def producers(self) -> Iterator[GroupMember]:
        """Members whose slices compute the units."""
        return (member for member in self.members if member.role == "produces")

    def consumers(self) -> Iterator[GroupMember]:
        """Members whose slices read the units."""
        return (member for member in self.members if member.role == "consumes")
