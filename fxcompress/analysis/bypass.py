"""Bypasses: what a repeated block hands on, and what it would hand on if it were not there.

Repeated blocks are wired alike, so the value that block ``b + 1`` reads at input ``p`` from block ``b`` is
the one block ``b`` read at input ``p``, one block further: the residual stream. Without the block, its input
takes the place of its output.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from fxcompress.analysis.blocks import Block
from fxcompress.capture.program import Program

__all__ = ["Bypass", "find_bypass", "owned_weights"]


@dataclass(frozen=True, eq=False)
class Bypass:
    """How to step over a block.

    Args:
        values: Every value that leaves the block → the value that takes its place.
        owned: Canonical names of the parameters and buffers that only this block uses.
    """

    values: dict[fx.Node, fx.Node]
    owned: tuple[str, ...]


def find_bypass(program: Program, blocks: Sequence[Block], index: int) -> Bypass | str:
    """The bypass of a block, or why it has none."""
    block = blocks[index]
    repeated = [other for other in blocks if len(other.nodes) == len(block.nodes) and other.repeated]
    if not block.repeated or len(repeated) < 2:
        return "it is not one of several like it"
    carried = _carried(repeated)
    place = {node: offset for offset, node in enumerate(block.nodes)}
    values: dict[fx.Node, fx.Node] = {}
    for value in block.outputs:
        position = carried.get(place[value])
        if position is None:
            return f"its value {value.name!r}, which is no residual stream, is read behind it"
        instead = block.inputs[position]
        if not _same_type(value, instead):
            return f"its output {value.name!r} has another shape or dtype than its input"
        values[value] = instead
    if not values:
        return "nothing is read behind it"
    owned = owned_weights(program, block)
    if not owned:
        return "it shares all its parameters with other blocks"
    return Bypass(values, owned)


def owned_weights(program: Program, block: Block) -> tuple[str, ...]:
    """Canonical names of the parameters and buffers whose every use lies in the block."""
    members = set(block.nodes)
    owned = []
    for node in block.inputs:
        name = program.weight_of.get(node.name)
        if name is not None and all(set(held.users) <= members for held in program.weight_node(name)):
            owned.append(name)
    return tuple(dict.fromkeys(owned))


def _carried(repeated: Sequence[Block]) -> dict[int, int]:
    """Offset of a value in its block → the input at which the next block reads it."""
    carried: dict[int, int] = {}
    for block, following in itertools.pairwise(repeated):
        place = {node: offset for offset, node in enumerate(block.nodes)}
        for position, node in enumerate(following.inputs):
            if node in place:
                carried[place[node]] = position
    return carried


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and [str(s) for s in x.shape] == [str(s) for s in y.shape]
    return type(x) is type(y)
