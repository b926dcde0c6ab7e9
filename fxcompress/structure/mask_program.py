"""The whole program in which some units of channel groups are masked: what cutting them has to equal.

A masked unit is zero in every parameter. One that competes with others (an expert that a router may choose)
also has the score minus infinity wherever they are compared, so that it is never chosen and has no share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.analysis.op_arguments import replace_argument
from fxcompress.capture.program import Program
from fxcompress.structure.cut_program import copy_program, kept_units

__all__ = ["mask_program", "mask_weights"]


def mask_program(program: Program, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> Program:
    """A copy of ``program`` in which the units that are not kept are masked; its sizes are the same.

    Args:
        program: The program the groups were found in.
        groups: Its channel groups.
        kept: Group name → int64 ``[kept]``, the units that stay, ascending; groups not named stay whole.

    Raises:
        WeightError: as :func:`fxcompress.structure.cut_program.cut_program`.
    """
    copied, twin = copy_program(program)
    nodes = {old.name: new for old, new in twin.items()}
    for number, (group, units) in enumerate(kept_units(groups, kept)):
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[units] = False
        name = f"_gone_{number}"
        for route in group.routes:
            copied.graph_module.register_buffer(name, gone.nonzero().flatten(), persistent=False)
            node = nodes[route.node]

            def closed(
                scores: fx.Node, node: fx.Node = node, name: str = name, dim: int = route.dim
            ) -> fx.Node:
                with node.graph.inserting_before(node):
                    places = node.graph.get_attr(name)
                    fill = torch.ops.aten.index_fill.int_Scalar
                    made = node.graph.call_function(fill, (scores, dim, places, float("-inf")))
                made.meta = dict(scores.meta)
                return made

            node.args, node.kwargs = replace_argument(node, node.args, node.kwargs, route.argument, closed)
    copied.graph_module.recompile()
    return replace(copied, weights={**program.weights, **mask_weights(program, groups, kept)})


def mask_weights(program: Program, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the weights that hold units which are not kept, with those units zero: name → tensor."""
    result: dict[str, Tensor] = {}
    for group, units in kept_units(groups, kept):
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[units] = False
        for member in group.members:
            if member.name not in result:
                result[member.name] = program.weights[member.name].detach().clone()
            tensor = result[member.name]
            tensor.index_fill_(member.dim, member.positions[gone].flatten().to(tensor.device), 0)
    return result
