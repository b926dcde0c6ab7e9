"""Attention of one query per head, as decoding does it.

    sdpa(q, repeat(k), repeat(v), mask)  →  softmax(scale · q kᵀ + mask) v,   query heads grouped by key head

The fused ATen kernel is made for many queries; for one it spends its time on set-up, and grouped-query
models copy every key and value once per query head to call it. Two small products on the keys as they lie in
the cache read them once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_COPIES = (aten.clone.default, aten.contiguous.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def decodes(node: fx.Node) -> bool:
    """Whether ``node`` is an attention of exactly one query without dropout or built-in causal mask."""
    if node.target is not aten.scaled_dot_product_attention.default or len(node.args) > 5:
        return False
    if node.kwargs.get("dropout_p", 0.0) or node.kwargs.get("is_causal", False):
        return False
    if len(node.args) == 5 and node.args[4]:
        return False
    query, key, value = (_tensor(argument) for argument in node.args[:3])
    if query is None or key is None or value is None or {query.dim(), key.dim(), value.dim()} != {4}:
        return False
    mask = _tensor(node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask"))
    if mask is not None and mask.dim() not in (2, 4):
        return False
    heads = [tensor.shape[1] for tensor in (query, key, value)]
    return _is_one(query.shape[2]) and all(map(_is_known, heads))


def attend(node: fx.Node, value_of: Callable[[Any], Any]) -> Tensor:
    """Compute a node for which :func:`decodes` holds.

    Args:
        node: ``scaled_dot_product_attention``; query ``[B, H, 1, D]``, key and value ``[B, H, S, D]`` or,
            before they are repeated, ``[B, H / G, S, D]``.
        value_of: Value of an argument in the running graph.

    Returns:
        ``[B, H, 1, D]``.
    """
    query: Tensor = value_of(node.args[0])
    key, value = (value_of(before_repeating(argument)) for argument in node.args[1:3])
    if key.shape[1] != value.shape[1]:
        key, value = (value_of(argument) for argument in node.args[1:3])
    mask = value_of(node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask"))
    scale = node.kwargs.get("scale")
    batch, heads, _, width = query.shape
    groups = heads // key.shape[1]
    grouped = query.reshape(batch, key.shape[1], groups, width)
    factor = 1 / math.sqrt(width) if scale is None else scale
    scores = (grouped @ key.transpose(2, 3)).float() * factor  # [B, H / G, G, S]
    if mask is not None:
        if mask.dim() == 4 and not _is_one(mask.shape[1]):
            mask = mask.reshape(mask.shape[0], key.shape[1], groups, mask.shape[3])
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.float()
    weights: Tensor = aten._safe_softmax.default(scores, -1).to(value.dtype)
    mixed: Tensor = (weights @ value).reshape(batch, heads, 1, value.shape[3])
    return mixed


def before_repeating(node: Any) -> Any:
    """The keys or values ``[B, H / G, S, D]`` that ``node`` repeats for query heads; ``node`` otherwise."""
    current = node
    while current.target in _COPIES or current.target in _RESHAPES:
        current = current.args[0]
    if current.target is not aten.expand.default:
        return node
    spread = current.args[0]
    inner, outer, shape = _tensor(spread), _tensor(current), _tensor(node)
    if inner is None or outer is None or shape is None or inner.dim() != 5 or shape.dim() != 4:
        return node
    if spread.target is not aten.unsqueeze.default or spread.args[1] not in (2, -3):
        return node
    if not _is_known(outer.shape[2]) or shape.shape[1] != outer.shape[1] * outer.shape[2]:
        return node
    return spread.args[0]


def _tensor(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _is_known(size: int | torch.SymInt) -> bool:
    return isinstance(size, int)


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1
