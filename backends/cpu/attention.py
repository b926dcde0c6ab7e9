"""Attention on the CPU: a generated kernel, or two products for one query where there is no compiler.

    sdpa(q, repeat(k), repeat(v), mask)  →  softmax(scale · q kᵀ + mask) v,   query heads grouped by key head

The fused ATen kernel takes keys and values repeated once per query head, spends its time on set-up when there
is one query, and multiplies what a mask hides when there are many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxcompress.backends.cpu.generator import DTYPES, AttentionForm
from fxcompress.backends.cpu.isa import Isa
from fxcompress.backends.cpu.native import ensure_kernel

aten = torch.ops.aten

_COPIES = (aten.clone.default, aten.contiguous.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def lower(node: fx.Node, value_of: Callable[[Any], Any], isa: Isa) -> Tensor | None:
    """Compute an attention better than ATen does, or None to leave it to ATen.

    Args:
        node: Any node.
        value_of: Value of an argument in the running graph.
        isa: Instruction set to generate for.

    Returns:
        ``[B, H, Q, V]``.
    """
    if not is_plain(node):
        return None
    query = _tensor(node.args[0])
    assert query is not None
    if query.dtype in DTYPES:
        form = AttentionForm(DTYPES[query.dtype])
        if ensure_kernel(form, isa) is None:
            return _generated(node, value_of, form.number(isa))
    return _two_products(node, value_of) if _decodes(node) else None


def is_plain(node: fx.Node, devices: tuple[str, ...] = ("cpu",)) -> bool:
    """Whether ``node`` is an attention of batched heads without dropout, on one of some kinds of devices."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    if node.kwargs.get("dropout_p", 0.0) or (len(node.args) > 4 and node.args[4]):
        return False
    operands = [_tensor(argument) for argument in node.args[:3]]
    if any(tensor is None or tensor.dim() != 4 or tensor.device.type not in devices for tensor in operands):
        return False
    query, key, value = (tensor for tensor in operands if tensor is not None)
    mask = _tensor(mask_of(node))
    if mask is not None and not (mask.dim() in (2, 4) and mask.dtype in (torch.bool, *DTYPES)):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return False
    return query.dtype == key.dtype == value.dtype and _fit(query, key, value)


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether nothing but heads is repeated: sdpa also broadcasts batches, which the kernel does not."""
    heads, kv_heads = query.shape[1], key.shape[1]
    known = [*(t.shape[1] for t in (query, key, value)), *(t.shape[3] for t in (query, key, value))]
    if not all(isinstance(size, int) for size in known) or heads % kv_heads or value.shape[1] != kv_heads:
        return False
    pairs = ((query.shape[0], key.shape[0]), (key.shape[0], value.shape[0]), (key.shape[2], value.shape[2]))
    return query.shape[3] == key.shape[3] and all(statically_known_true(a == b) for a, b in pairs)


def mask_of(node: fx.Node) -> Any:
    """The mask of an attention, or None."""
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def is_causal(node: fx.Node) -> bool:
    """Whether an attention hides later keys by itself."""
    return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))


def _keys_and_values(node: fx.Node, value_of: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H / G, S, D]`` before they are repeated, where both are."""
    key, value = (value_of(before_repeating(argument)) for argument in node.args[1:3])
    if key.shape[1] != value.shape[1]:
        key, value = (value_of(argument) for argument in node.args[1:3])
    return key, value


def scale_of(node: fx.Node, width: int) -> float:
    """What an attention multiplies its scores with."""
    scale = node.kwargs.get("scale")
    return 1 / math.sqrt(width) if scale is None else float(scale)  # type: ignore[arg-type]


def _generated(node: fx.Node, value_of: Callable[[Any], Any], number: int) -> Tensor:
    query: Tensor = value_of(node.args[0])
    key, value = _keys_and_values(node, value_of)
    mask = value_of(mask_of(node))
    if mask is not None:
        mask = mask if mask.dtype is torch.bool else mask.to(torch.float32)
        mask = mask if mask.dim() == 4 else mask[None, None]
    scale = scale_of(node, query.shape[3])
    found: Tensor = torch.ops.fxcompress_cpu.attend(query, key, value, mask, is_causal(node), scale, number)
    return found


def _decodes(node: fx.Node) -> bool:
    """Whether a plain attention has exactly one query and no built-in mask."""
    query = _tensor(node.args[0])
    return query is not None and _is_one(query.shape[2]) and not is_causal(node)


def _two_products(node: fx.Node, value_of: Callable[[Any], Any]) -> Tensor:
    """Two small products on the keys as they lie in the cache; they read them once."""
    query: Tensor = value_of(node.args[0])
    key, value = _keys_and_values(node, value_of)
    mask = value_of(mask_of(node))
    batch, heads, _, width = query.shape
    groups = heads // key.shape[1]
    grouped = query.reshape(batch, key.shape[1], groups, width)
    scores = (grouped @ key.transpose(2, 3)).float() * scale_of(node, width)  # [B, H / G, G, S]
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
