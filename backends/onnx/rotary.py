"""Rotary embeddings as ONNX Runtime's operator.

    x · cos + cat(-x[…, D/2:], x[…, :D/2]) · sin  →  rotary_embedding(x, rows, cos[:, :D/2], sin[:, :D/2])

The operator takes one angle per pair of values, so both halves of the cosines and sines must be equal: they
are computed for several calls to see that. They stay in the graph as the model computes them, whatever the
kind of embedding, once for all layers; nothing is tabulated for a longest sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxcompress.analysis.op_arguments import arguments
from fxcompress.backends.onnx.call_values import value_in
from fxcompress.backends.onnx.operators import ops

__all__ = ["fuse_rotary"]

aten = torch.ops.aten


class _Rotation(NamedTuple):
    x: fx.Node  # [B, H, S, D]
    cos: fx.Node  # [B or 1, 1, S, D]
    sin: fx.Node


class _Tables(NamedTuple):
    """What is shared by all rotations by the same angles: halves of the angles, and numbers of their rows."""

    halves: dict[fx.Node, fx.Node]  # [B·S or S, D/2]
    rows: dict[fx.Node, fx.Node]  # [B, S]


def fuse_rotary(graph: fx.Graph, calls: Sequence[Mapping[str, Any]]) -> int:
    """Replace rotations of pairs of values; returns how many.

    Args:
        graph: The graph, with shapes in ``meta["val"]``.
        calls: Values of placeholders by name, for calls of several sizes.
    """
    found = 0
    proven: dict[fx.Node, bool] = {}
    made = _Tables({}, {})
    for node in list(graph.nodes):
        rotation = _rotation(node)
        if rotation is None:
            continue
        for angles in (rotation.cos, rotation.sin):
            if angles not in proven:
                proven[angles] = all(_halves_equal(graph, angles, call) for call in calls)
        if proven[rotation.cos] and proven[rotation.sin]:
            _replace(graph, node, rotation, made)
            found += 1
    return found


def _rotation(node: fx.Node) -> _Rotation | None:
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    one, two = (_factors(argument) for argument in node.args)
    if one is None or two is None:
        return None
    for straight, turned in ((one, two), (two, one)):
        for x, cos in (straight, straight[::-1]):
            for half, sin in (turned, turned[::-1]):
                if _turned(half) is x and _fit(x, cos) and _fit(x, sin):
                    return _Rotation(x, cos, sin)
    return None


def _factors(node: Any) -> tuple[fx.Node, fx.Node] | None:
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor or len(node.users) != 1:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _turned(node: fx.Node) -> fx.Node | None:
    """``x`` of ``cat([-x[…, D/2:], x[…, :D/2]], -1)``."""
    if node.target is not aten.cat.default or not isinstance(node.args[0], list | tuple):
        return None
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if len(parts) != 2 or not all(isinstance(part, fx.Node) for part in parts):
        return None
    negated, first = parts
    if negated.target is not aten.neg.default or dim not in (-1, _rank(node) - 1):  # type: ignore[union-attr]
        return None
    second = negated.args[0]  # type: ignore[union-attr]
    halves = _half(first), _half(second)
    if halves[0] is None or halves[1] is None or halves[0][0] is not halves[1][0]:
        return None
    return halves[0][0] if (halves[0][1], halves[1][1]) == (0, 1) else None


def _half(node: Any) -> tuple[fx.Node, int] | None:
    """What a node takes the first (0) or second (1) half of the last dimension of."""
    if not isinstance(node, fx.Node) or node.target is not aten.slice.Tensor:
        return None
    given = arguments(node)
    x, start, end = node.args[0], given["start"] or 0, given["end"]
    width = _width(x)
    if not isinstance(x, fx.Node) or width is None or not isinstance(end, int | None):
        return None
    if given["step"] != 1 or given["dim"] not in (-1, _rank(x) - 1):
        return None
    bounds = start, width if end is None else min(end, width)
    places = {(0, width // 2): 0, (width // 2, width): 1}
    return (x, places[bounds]) if bounds in places else None


def _width(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    size = value.shape[-1] if isinstance(value, Tensor) and value.dim() else None
    return size if isinstance(size, int) and size % 2 == 0 else None


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _fit(x: fx.Node, angles: fx.Node) -> bool:
    """Whether these are ``[B, H, S, D]`` values and ``[B or 1, 1, S, D]`` angles of one dtype."""
    value, angle = x.meta.get("val"), angles.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(angle, Tensor) or (value.dim(), angle.dim()) != (4, 4):
        return False
    sizes = [str(size) for size in value.shape], [str(size) for size in angle.shape]
    batch = sizes[1][0] in (sizes[0][0], "1")
    fits = batch and sizes[1][1] == "1" and sizes[0][2:] == sizes[1][2:]
    return fits and value.dtype == angle.dtype and isinstance(value.shape[1], int)


def _halves_equal(graph: fx.Graph, angles: fx.Node, call: Mapping[str, Any]) -> bool:
    value = value_in(graph, angles, call)
    if value is None:
        return False
    first, second = value.chunk(2, -1)
    return torch.equal(first, second)


def _replace(graph: fx.Graph, node: fx.Node, rotation: _Rotation, made: _Tables) -> None:
    call, half = graph.call_function, rotation.x.meta["val"].shape[3] // 2
    for angles in (rotation.cos, rotation.sin):
        if angles not in made.halves:
            with graph.inserting_after(angles):
                kept = call(aten.slice.Tensor, (angles, -1, 0, half))
            with graph.inserting_after(kept):
                made.halves[angles] = call(aten.reshape.default, (kept, [-1, half]))
    with graph.inserting_before(node):
        if rotation.cos not in made.rows:
            made.rows[rotation.cos] = call(ops.row_numbers.default, (rotation.cos, rotation.x))
        operands = (rotation.x, made.rows[rotation.cos], *(made.halves[a] for a in rotation[1:]))
        rotated = call(ops.rotary_embedding.default, operands)
    rotated.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(rotated)
    graph.erase_node(node)
