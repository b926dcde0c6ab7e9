"""Channel groups of a program: which dimensions of which parameters are cut together, and which cannot be.

    groups = find_channel_groups(program)
    for group in groups.groups:
        print(group.name, group.kind, group.units, [member.name for member in group.members])

Three steps. Every dimension of every value is typed as a product of axes
(:mod:`~fxcompress.analysis.axis_typing`); axes along which a masked unit would still be noticed are
frozen (:mod:`~fxcompress.analysis.unit_masking`); an axis that is left, with all parameter dimensions it
occurs in, is a group. Nothing is known about architectures.

Attention heads are units: axes that lie inside a head (its channels, the queries that share a key) stay
whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from fxcompress.analysis.axes import Axis, Dim
from fxcompress.analysis.axis_typing import AxisTyping, type_axes
from fxcompress.analysis.blocks import Block, find_blocks
from fxcompress.analysis.channel_group import ChannelGroup, GroupMember, Kind, Route
from fxcompress.analysis.group_roles import find_kinds, find_roles
from fxcompress.analysis.op_arguments import arguments
from fxcompress.analysis.unit_masking import Judgement
from fxcompress.analysis.unit_positions import unit_positions
from fxcompress.capture.program import Program

__all__ = ["ChannelGroups", "find_channel_groups"]


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """The channel groups of one program.

    Args:
        groups: Groups that can be cut, in the order of their first parameter.
        frozen: Groups that cannot, each with its reason. Together they hold every dimension above 1 of every
            parameter and buffer the graph reads.
        typing: The axes of every value, and the sizes that are written into the graph.
        axes: Group name → axis.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[ChannelGroup, ...]
    typing: AxisTyping
    axes: Mapping[str, Axis]

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in (*self.groups, *self.frozen):
            if group.name == name:
                return group
        raise KeyError(f"no channel group {name!r}; there are {', '.join(g.name for g in self.groups)}")

    def static_size(self, dim: Dim, counts: Mapping[Axis, int]) -> int:
        """The size of a dimension, symbolic factors left out, when some axes have another number of units."""
        axes, result = self.typing.axes, 1
        for leaf in axes.leaves(dim):
            if leaf.parts is not None:
                result *= sum(self.static_size(part, counts) for part in leaf.parts)
            elif isinstance(leaf.size, int):
                result *= counts.get(leaf, leaf.size)
        return result


def find_channel_groups(program: Program, blocks: list[Block] | None = None) -> ChannelGroups:
    """Find every channel group of a program; linear in the size of its graph.

    Args:
        program: A captured program.
        blocks: Its blocks, when known already.

    Returns:
        The groups, and the dimensions that stay whole with the reason for each.

    Example:
        >>> groups = find_channel_groups(program)  # doctest: +SKIP
        >>> [(group.kind, group.units) for group in groups]  # doctest: +SKIP
        [('heads', 3), ('channels', 1536)]
    """
    typing = type_axes(program)
    kinds = find_kinds(typing)
    judgement = Judgement(typing, kinds)
    found = _memberships(typing)
    roles = find_roles(typing, judgement)
    for axis, places in found.items():
        if not any(roles.get((name, dim, axis)) == "produces" for name, dim in places):
            judgement.freeze(axis, "no parameter computes it")
    _keep_heads_whole(typing, judgement, kinds)
    block_of = _blocks_of_weights(typing, find_blocks(program.graph) if blocks is None else blocks)
    groups: list[ChannelGroup] = []
    frozen: list[ChannelGroup] = []
    axes: dict[str, Axis] = {}
    for axis, places in found.items():
        members = tuple(
            GroupMember(
                name,
                dim,
                unit_positions(typing.axes, typing.weights[name][dim], axis),
                roles.get((name, dim, axis), "scales"),
            )
            for name, dim in places
        )
        named = next((member for member in members if member.role == "produces"), members[0])
        name = _unused(f"{named.name}:{named.dim}", axes)
        axes[name] = axis
        kind: Kind = kinds.get(axis, "channels")
        reason = judgement.reasons.get(axis, "")
        routes = () if reason else _routes(judgement, axis)
        block, least = block_of.get(named.name, -1), judgement.least(axis)
        group = ChannelGroup(name, kind, axis.units, members, block, reason, routes, least)
        (frozen if reason else groups).append(group)
    return ChannelGroups(tuple(groups), tuple(frozen), typing, axes)


def _routes(judgement: Judgement, axis: Axis) -> tuple[Route, ...]:
    """Where the units of an axis compete."""
    found = []
    for choice in judgement.choices.get(axis, ()):
        argument = next(name for name, value in arguments(choice.node).items() if value is choice.source)
        found.append(Route(choice.node.name, argument, choice.place))
    return tuple(found)


def _unused(name: str, taken: Mapping[str, Axis]) -> str:
    """Several groups may lie along one dimension (parts of a fused projection)."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    return free


def _memberships(typing: AxisTyping) -> dict[Axis, list[tuple[str, int]]]:
    """Where each axis occurs in the parameters and buffers, in the order of the placeholders."""
    found: dict[Axis, dict[tuple[str, int], None]] = {}
    for name, dims in typing.weights.items():
        for place, dim in enumerate(dims):
            for axis in typing.axes.variables(dim):
                found.setdefault(axis, {})[name, place] = None
    return {axis: list(places) for axis, places in found.items()}


def _keep_heads_whole(typing: AxisTyping, judgement: Judgement, kinds: dict[Axis, Kind]) -> None:
    """In a dimension of (heads, channels of a head), only the heads are cut."""

    def visit(dim: Dim) -> None:
        leaves = typing.axes.leaves(dim)
        heads = next((leaf for leaf in leaves if kinds.get(leaf) == "heads"), None)
        if heads is not None:
            for leaf in leaves:
                if leaf is not heads:
                    for axis in typing.axes.variables((leaf,)):
                        judgement.freeze(axis, "it lies inside the attention heads, which are cut whole")
        for leaf in leaves:
            for part in leaf.parts or ():
                visit(part)

    for dims in typing.weights.values():
        for dim in dims:
            visit(dim)


def _blocks_of_weights(typing: AxisTyping, blocks: list[Block]) -> dict[str, int]:
    """Canonical name → index of the repeated block in which the weight first meets data."""
    index = {node: block.index for block in blocks if block.name.startswith("block ") for node in block.nodes}
    found: dict[str, int] = {}
    for node in typing.program.placeholders():
        name = typing.program.weight_of.get(node.name)
        if name is not None and name not in found:
            reader = _first_reader(typing, node)
            if reader in index:
                found[name] = index[reader]
    return found


def _first_reader(typing: AxisTyping, node: fx.Node) -> fx.Node | None:
    while node in typing.constant:
        if not node.users:
            return None
        node = next(iter(node.users))
    return node
