"""Attention over a growing cache as ONNX Runtime's fused operator.

    present = cat(past, new);  sdpa(q, repeat(present keys), repeat(present values), mask)
        →  grouped_attention(q, new keys, new values, past keys, past values, bias)

The operator appends to the cache, shares key heads among query heads without repeating them, and is causal by
itself. Attentions are replaced whose mask hides every later token: the mask's own nodes are computed for
several calls to see that. What the mask hides besides (padding) becomes a bias.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from fxcompress.backends.onnx.call_values import value_in
from fxcompress.backends.onnx.operators import ops

__all__ = ["fuse_attention"]

aten = torch.ops.aten
_SAME_VALUES = (aten.slice.Tensor, aten.expand.default, aten.contiguous.default, aten.clone.default)
_MULTIPLE = 8
"""Head sizes that ONNX Runtime's operator takes are multiples of this."""


class _Cached(NamedTuple):
    """Keys or values of an attention: what was cached, what is new, and the two together."""

    past: fx.Node
    new: fx.Node
    grown: fx.Node


def fuse_attention(graph: fx.Graph, calls: Sequence[Mapping[str, Any]]) -> int:
    """Replace attentions over a growing cache; returns how many.

    Args:
        graph: The graph, with shapes in ``meta["val"]``.
        calls: Values of the inputs by placeholder, for calls of several sizes; what masks are tested with.
    """
    found = 0
    causal: dict[fx.Node, bool] = {}
    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        operands = _operands(node)
        if operands is None:
            continue
        query, keys, values, mask = operands
        if mask not in causal:
            causal[mask] = all(_hides_later(graph, mask, call) for call in calls)
        if causal[mask]:
            _replace(graph, node, query, keys, values, mask)
            found += 1
    return found


def _operands(node: fx.Node) -> tuple[fx.Node, _Cached, _Cached, fx.Node] | None:
    query, key, value = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    if not all(isinstance(argument, fx.Node) for argument in (query, key, value, mask)) or causal or dropout:
        return None
    keys, values = _cached(key), _cached(value)
    shapes = [cast("fx.Node", node).meta["val"].shape for node in (query, mask)]
    if keys is None or values is None or any(len(shape) != 4 for shape in shapes):
        return None
    heads, width = shapes[0][1], shapes[0][3]
    kv_heads = keys.new.meta["val"].shape[1]
    known = all(isinstance(size, int) for size in (heads, width, kv_heads))
    equal = known and keys.new.meta["val"].shape[3] == values.new.meta["val"].shape[3] == width
    if not equal or width % _MULTIPLE or heads % kv_heads or shapes[1][1] != 1:
        return None
    return query, keys, values, mask  # type: ignore[return-value]


def _cached(node: Any) -> _Cached | None:
    """Behind what repeats heads, ``cat([past, new], dim=-2)`` with a past that is an input of the graph."""
    while isinstance(node, fx.Node):
        if node.target is aten.cat.default:
            parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
            if not isinstance(parts, list | tuple) or len(parts) != 2 or dim not in (-2, 2):
                return None
            past, new = parts
            good = isinstance(past, fx.Node) and isinstance(new, fx.Node) and past.op == "placeholder"
            return _Cached(past, new, node) if good else None  # type: ignore[arg-type]
        if not _repeats_heads(node):
            return None
        node = node.args[0]
    return None


def _repeats_heads(node: fx.Node) -> bool:
    """One step of ``[B, KV, T, D] → [B, KV, 1, T, D] → [B, KV, G, T, D] → [B, KV·G, T, D]``."""
    before = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    after = node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if node.target in _SAME_VALUES:
        return node.target is not aten.slice.Tensor or str(before.shape) == str(after.shape)
    if node.target is aten.unsqueeze.default:
        return bool(node.args[1] == 2 and before.dim() == 4)
    merges = node.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
    if not merges or before.dim() != 5 or after.dim() != 4:
        return False
    return bool(before.shape[1] * before.shape[2] == after.shape[1])


def _hides_later(graph: fx.Graph, mask: fx.Node, call: Mapping[str, Any]) -> bool:
    """Whether the mask lets no query see a later key in this call; the last queries are the newest tokens."""
    value = value_in(graph, mask, call)
    if value is None:
        return False
    hidden = ~value if value.dtype is torch.bool else value <= torch.finfo(value.dtype).min / 2
    queries, keys = value.shape[-2:]
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return bool(hidden.expand(*value.shape).logical_or(~later).all())


def _replace(
    graph: fx.Graph, node: fx.Node, query: fx.Node, keys: _Cached, values: _Cached, mask: fx.Node
) -> None:
    width = query.meta["val"].shape[3]
    scale = node.kwargs.get("scale", node.args[6] if len(node.args) > 6 else None)
    factor = 1 / math.sqrt(width) if scale is None else scale
    call = graph.call_function
    with graph.inserting_before(node):
        bias = mask
        if mask.meta["val"].dtype is torch.bool:
            dtype = query.meta["val"].dtype
            zero = call(aten.full.default, ([], 0.0), {"dtype": dtype})
            least = call(aten.full.default, ([], torch.finfo(dtype).min / 2), {"dtype": dtype})
            bias = call(aten.where.self, (mask, zero, least))
        operands = (query, keys.new, values.new, keys.past, values.past, bias, factor)
        fused = call(ops.grouped_attention.default, operands)
        results = [call(operator.getitem, (fused, index)) for index in range(3)]
    # Placed before everything that reads the grown cache: the graph's outputs alone, once this is done.
    node.replace_all_uses_with(results[0])
    for cached, result in ((keys, results[1]), (values, results[2])):
        for user in list(cached.grown.users):
            if user.op == "output":
                user.replace_input_with(cached.grown, result)
    graph.erase_node(node)
