"""Follow numbers of units through a graph: which expert a token was given to.

The choice of the best yields places along the dimension it chose from. They mean the same units after a cut,
under other numbers, as long as whatever reads them counts, sorts, compares or looks up along the same
dimension. Anything else would compute with the numbers themselves, and freezes the dimension.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from fxcompress.analysis.op_arguments import aten_names, describe, op_name

if TYPE_CHECKING:
    from fxcompress.analysis.axis_typing import AxisTyping

__all__ = ["follow_labels"]

_KEEPING = aten_names("""
    view reshape _unsafe_view flatten unflatten permute transpose t unsqueeze squeeze expand repeat movedim
    repeat_interleave slice narrow select index index_select gather to _to_copy clone contiguous detach alias
    long int float double cat concat concatenate stack
""")
_SHAPE_ONLY = aten_names(
    "empty_like zeros_like ones_like full_like sym_size new_zeros new_ones new_full new_empty"
)
_EQUALITY = aten_names("eq ne")


def follow_labels(typing: AxisTyping, node: fx.Node) -> None:
    """Note which units the value of ``node`` numbers, and freeze what is computed with otherwise."""
    if node.target is operator.getitem:
        source, index = node.args
        held = typing.labels.get(source) if isinstance(source, fx.Node) else None
        if isinstance(held, list) and isinstance(index, int) and held[index] is not None:
            typing.labels[node] = held[index]
        return
    numbering = [
        source
        for source in node.all_input_nodes
        if not isinstance(typing.labels.get(source), list | None) and (node, source) not in typing.understood
    ]
    if not numbering:
        return
    name = op_name(node)
    if name in _SHAPE_ONLY:
        return
    if name in _KEEPING and _holds_numbers(node) and _all_number(typing, node):
        typing.labels[node] = _same(typing, node, numbering)
    elif name in _EQUALITY and _all_number(typing, node):
        _same(typing, node, numbering)
    else:
        for source in numbering:
            typing.axes.freeze(
                typing.labels[source], f"{describe(node)} computes with the numbers of its units"
            )


def _holds_numbers(node: fx.Node) -> bool:
    """Whether the result's type can hold the numbers that the operand held."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.itemsize > 1


def _all_number(typing: AxisTyping, node: fx.Node) -> bool:
    """Whether every tensor put together or compared is a number of units."""
    args: tuple[Any, ...] = node.args
    first = args[0]
    parts = first if isinstance(first, list | tuple) else args if op_name(node) in _EQUALITY else [first]
    return all(isinstance(part, fx.Node) and part in typing.labels for part in parts)


def _same(typing: AxisTyping, node: fx.Node, numbering: list[fx.Node]) -> Any:
    """All of these number the same units."""
    first, *others = (typing.labels[source] for source in numbering)
    for other in others:
        typing.axes.unify(first, other, f"{describe(node)} combines numbers of different units")
    return first
