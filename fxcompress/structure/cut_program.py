"""Cut units of channel groups out of a program: its weights, and every size in the graph that goes along."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.analysis.axes import Axis
from fxcompress.analysis.axis_typing import SizeLiteral
from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.analysis.op_arguments import arguments, describe, replace_argument
from fxcompress.analysis.unit_positions import unit_positions
from fxcompress.capture.program import Program
from fxcompress.capture.values import infer_values
from fxcompress.compat import fake_mode_of
from fxcompress.errors import WeightError

__all__ = ["copy_program", "cut_program", "cut_weights", "kept_units"]


def cut_program(program: Program, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> Program:
    """A copy of ``program`` without the units that are not kept.

    Sizes written into the graph (views, splits, bounds of slices, groups of convolutions) are rewritten, and
    the types of all values inferred again; inputs, outputs and the order of ops stay.

    Args:
        program: The program the groups were found in.
        groups: Its channel groups.
        kept: Group name → int64 ``[kept]``, the units that stay, ascending; groups not named stay whole.

    Raises:
        WeightError: an unknown or frozen group; units out of range, repeated, unordered, or
            fewer than one or than are chosen at once.

    Example:
        >>> small = cut_program(program, groups, {groups.groups[0].name: torch.arange(8)})  # doctest: +SKIP
    """
    chosen = kept_units(groups, kept)
    counts = {groups.axes[group.name]: units.numel() for group, units in chosen}
    copied, twin = copy_program(program)
    for literal in groups.typing.literals:
        _rewrite(groups, literal, twin, counts)
    _rewrite_splits(groups, twin, counts)
    _pick_numbers(groups, twin, {groups.axes[group.name]: units for group, units in chosen})
    weights = {**program.weights, **cut_weights(program, groups, kept)}
    small = replace(copied, weights=weights)
    _infer(program, small, groups, twin, counts)
    small.graph.lint()
    small.graph_module.recompile()
    return small


def cut_weights(program: Program, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that lose units, cut: canonical name → tensor of its own memory.

    A dimension in which several groups lie loses what any of them loses.
    """
    stays: dict[str, dict[int, Tensor]] = {}
    for group, units in kept_units(groups, kept):
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[units] = False
        for member in group.members:
            size = program.weights[member.name].shape[member.dim]
            mask = stays.setdefault(member.name, {}).setdefault(
                member.dim, torch.ones(size, dtype=torch.bool)
            )
            mask[member.positions[gone].flatten()] = False
    result = {}
    for name, masks in stays.items():
        tensor = program.weights[name].detach()
        for dim, mask in masks.items():
            tensor = tensor.index_select(dim, mask.nonzero().flatten().to(tensor.device))
        result[name] = tensor
    return result


def kept_units(groups: ChannelGroups, kept: Mapping[str, Tensor]) -> list[tuple[ChannelGroup, Tensor]]:
    """The groups named, with the units that stay of each.

    Raises:
        WeightError: an unknown or frozen group; units out of range, repeated, unordered or too few.
    """
    chosen = []
    for name, units in kept.items():
        try:
            group = groups[name]
        except KeyError as error:
            raise WeightError(
                str(error.args[0]), fix="name a group that find_channel_groups found."
            ) from None
        if group.frozen:
            raise WeightError(f"group {name!r} cannot be cut: {group.frozen}.", fix="cut another group.")
        ordered = units.to("cpu", torch.int64)
        if ordered.dim() != 1 or not ordered.numel():
            raise WeightError(
                f"group {name!r}: every unit would be removed.", fix="keep at least one of its units."
            )
        if ordered.numel() < group.least:
            raise WeightError(
                f"group {name!r}: {ordered.numel()} of its units would stay, but {group.least} are chosen at"
                " once.",
                fix=f"keep at least {group.least} of its units.",
            )
        if int(ordered[0]) < 0 or int(ordered[-1]) >= group.units or bool((ordered.diff() <= 0).any()):
            raise WeightError(
                f"group {name!r}: kept units must be ascending numbers below {group.units}, each once.",
                fix="sort them and remove what is repeated.",
            )
        chosen.append((group, ordered))
    return chosen


def copy_program(program: Program) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """A copy of a program that shares its weights, and the new node of every old one."""
    twin: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    output = graph.graph_copy(program.graph, twin)
    made = graph.output(output)
    old_output = program.graph.output_node()
    made.meta = dict(old_output.meta)
    twin[old_output] = made
    for old, new in twin.items():
        new.meta = dict(old.meta)
    names = {old.name: new.name for old, new in twin.items()}
    module = fx.GraphModule(program.graph_module, graph)
    copied = replace(
        program,
        graph_module=module,
        weight_of={names[holder]: name for holder, name in program.weight_of.items()},
        inputs=tuple(names[name] for name in program.inputs),
    )
    return copied, twin


def _rewrite(
    groups: ChannelGroups, literal: SizeLiteral, twin: Mapping[fx.Node, fx.Node], counts: Mapping[Axis, int]
) -> None:
    """Replace one size; a symbolic one that a cut axis is part of is scaled at run time."""
    old = [groups.static_size(dim, {}) for dim in literal.terms]
    new = [groups.static_size(dim, counts) for dim in literal.terms]
    if old == new:
        return
    node = twin[literal.node]

    def changed(value: Any) -> Any:
        if literal.index is not None:
            items = list(value)
            items[literal.index] = scaled(items[literal.index])
            return items
        return scaled(value)

    def scaled(value: Any) -> Any:
        if isinstance(value, int):
            return sum(new) + literal.offset
        with node.graph.inserting_before(node):
            product = node.graph.call_function(operator.mul, (value, new[0]))
            quotient = node.graph.call_function(operator.floordiv, (product, old[0]))
        product.meta["val"] = value.meta["val"] * new[0]
        quotient.meta["val"] = product.meta["val"] // old[0]
        return quotient

    node.args, node.kwargs = replace_argument(node, node.args, node.kwargs, literal.argument, changed)


def _rewrite_splits(
    groups: ChannelGroups, twin: Mapping[fx.Node, fx.Node], counts: Mapping[Axis, int]
) -> None:
    """Pieces that are cut differently have sizes of their own: every spelling becomes the one with sizes."""
    for old, pieces in groups.typing.pieces.items():
        sizes = [groups.static_size(piece, counts) for piece in pieces]
        if sizes == [groups.static_size(piece, {}) for piece in pieces]:
            continue
        node = twin[old]
        dim = arguments(old)["dim"]
        node.target = torch.ops.aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], sizes, dim), {}


def _pick_numbers(
    groups: ChannelGroups, twin: Mapping[fx.Node, fx.Node], kept: Mapping[Axis, Tensor]
) -> None:
    """Of a vector of numbers along a cut axis, those stay whose units do: slices, put together again."""
    axes = groups.typing.axes
    for old, dim in groups.typing.numbered.items():
        stays = torch.ones(axes.count(dim), dtype=torch.bool)
        for axis in set(axes.variables(dim)) & kept.keys():
            gone = torch.ones(axis.units, dtype=torch.bool)
            gone[kept[axis]] = False
            stays[unit_positions(axes, dim, axis)[gone].flatten()] = False
        if bool(stays.all()):
            continue
        node = twin[old]
        places = stays.nonzero().flatten()
        runs = torch.tensor_split(places, (places.diff() != 1).nonzero().flatten() + 1)
        graph, users = node.graph, list(node.users)
        with graph.inserting_after(node):
            picked = graph.call_function(torch.ops.aten.cat.default, ([],))
        with graph.inserting_before(picked):
            pieces = [
                graph.call_function(torch.ops.aten.slice.Tensor, (node, 0, int(run[0]), int(run[-1]) + 1))
                for run in runs
            ]
        picked.args = (pieces,)
        for user in users:
            user.replace_input_with(node, picked)


def _infer(
    program: Program,
    small: Program,
    groups: ChannelGroups,
    twin: Mapping[fx.Node, fx.Node],
    counts: Mapping[Axis, int],
) -> None:
    """Types of everything that shrinks: weights from their tensors, values by running their ops on types."""
    mode = fake_mode_of([node.meta.get("val") for node in program.graph.nodes])
    typing = groups.typing
    touched: dict[int, bool] = {}
    for old in program.graph.nodes:
        held = typing.dims.get(old)
        if held is None:
            continue
        flat = [dim for entry in held for dim in (entry if isinstance(entry, list) else [entry]) if dim]
        if not any(_touched(typing, dim, counts, touched) for dim in flat):
            continue
        new = twin[old]
        if old.op == "placeholder":
            tensor = small.weights[program.weight_of[old.name]]
            if mode is not None:
                with mode:
                    new.meta["val"] = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                    )
        elif old in typing.numbered:  # itself stays whole; what is picked from it is new
            continue
        elif old.op == "call_function":
            new.meta.pop("val", None)
        else:
            raise WeightError(f"{describe(old)} would change with the cut.")
    infer_values(small.graph)


def _touched(typing: Any, dim: Any, counts: Mapping[Axis, int], known: dict[int, bool]) -> bool:
    found = known.get(id(dim))
    if found is None:
        found = known[id(dim)] = any(axis in counts for axis in typing.axes.variables(dim))
    return found
