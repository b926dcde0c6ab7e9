"""Operators that stand for ONNX operators in a torch graph: ``fxcompress_onnx::*``.

Each computes in torch what its ONNX namesake is specified to compute, so that a lowered graph can be run and
compared with the reference before anything is translated. They have shapes for tracing and no gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["ops"]

TINY = 1e-36
"""Smallest scale of a token: a normal float32, and 127 of it are next to nothing."""

F = TypeVar("F", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("fxcompress_onnx", "FRAGMENT")
ops: Any = torch.ops.fxcompress_onnx


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[F], F]:
    """Register the decorated function as the eager implementation of ``fxcompress_onnx::<schema>``."""

    def register(function: F) -> F:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxcompress_onnx::{name}", fake, lib=_LIBRARY)
        return function

    return register


def _decode_blocks(
    data: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int, columns: int
) -> Tensor:
    """``[..., K]`` float from codes ``[..., blocks, block · bits / 8]`` and scales ``[..., blocks]``."""
    codes = _unpack(data, bits).to(torch.float32)  # [..., blocks, block]
    blocks = scales.shape[-1]
    if zeros is None:
        offset: Tensor = torch.full_like(scales, float(1 << (bits - 1)), dtype=torch.float32)
    else:
        offset = _unpack(zeros, bits)[..., :blocks].to(torch.float32)
    value = (codes - offset.unsqueeze(-1)) * scales.to(torch.float32).unsqueeze(-1)
    return value.flatten(-2)[..., :columns]


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes of 2, 4 or 8 bits, the lowest bits of a byte first: ``[..., n]`` → ``[..., n · 8 / bits]``."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _matmul_nbits_shape(
    x: Tensor, b: Tensor, scales: Tensor, zeros: Any, bias: Any, K: int, N: int, *_: Any
) -> Tensor:
    return x.new_empty([*x.shape[:-1], N])


@_operator(
    "matmul_nbits(Tensor x, Tensor b, Tensor scales, Tensor? zeros, Tensor? bias, int K, int N, int bits,"
    " int block, int accuracy) -> Tensor",
    _matmul_nbits_shape,
)
def _matmul_nbits(
    x: Tensor,  # [..., K]
    b: Tensor,  # [N, blocks, block · bits / 8] uint8
    scales: Tensor,  # [N, blocks]
    zeros: Tensor | None,  # [N, ⌈blocks · bits / 8⌉] uint8
    bias: Tensor | None,  # [N]
    K: int,
    N: int,
    bits: int,
    block: int,
    accuracy: int,
) -> Tensor:
    """``com.microsoft.MatMulNBits`` at full accuracy."""
    weight = _decode_blocks(b, scales, zeros, bits, block, K).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _gather_shape(
    ids: Tensor, data: Tensor, scales: Tensor, zeros: Any, bits: int, block: int, K: int
) -> Tensor:
    return scales.new_empty([*ids.shape, K])


@_operator(
    "gather_nbits(Tensor ids, Tensor data, Tensor scales, Tensor? zeros, int bits, int block, int K)"
    " -> Tensor",
    _gather_shape,
)
def _gather_nbits(
    ids: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int, K: int
) -> Tensor:
    """``com.microsoft.GatherBlockQuantized`` on a weight laid out for ``matmul_nbits``."""
    chosen = None if zeros is None else zeros[ids]
    return _decode_blocks(data[ids], scales[ids], chosen, bits, block, K).to(scales.dtype)


def _codes_shape(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty([*x.shape[:-1], 1])


@_operator("token_codes(Tensor x, int bits) -> (Tensor q, Tensor scale)", _codes_shape)
def _token_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes per token of ``x [..., K]`` float32, counted from 0, whose zero is 128, and scales ``[..., 1]``.

    What ``quantize_per_token`` gives, in the operators that ONNX Runtime needs fewest of: codes of the
    largest magnitudes need no clamp, and the scale of a token without any is as good as another.
    """
    scale = (x.abs().amax(dim=-1, keepdim=True) / ((1 << (bits - 1)) - 1)).clamp_min(TINY)
    return (torch.round(x / scale) + 128).clamp(0, 255).to(torch.uint8), scale


def _counted_shape(q: Tensor) -> Tensor:
    return torch.empty_like(q, dtype=torch.uint8)


@_operator("counted(Tensor q) -> Tensor", _counted_shape)
def _counted(q: Tensor) -> Tensor:
    """Codes counted from 0 in place of signed ones."""
    return (q.to(torch.int32) + 128).to(torch.uint8)


def _matmul_integer_shape(a: Tensor, b: Tensor, zero: Any) -> Tensor:
    return a.new_empty([*a.shape[:-1], b.shape[-1]], dtype=torch.int32)


@_operator("matmul_integer(Tensor a, Tensor b, Tensor? zero) -> Tensor", _matmul_integer_shape)
def _matmul_integer(a: Tensor, b: Tensor, zero: Tensor | None) -> Tensor:
    """``MatMulInteger``: ``a [..., K]`` uint8 with zero 128, ``b [K, N]`` int8, ``zero [N]`` int8 → int32."""
    wide = b.to(torch.float64) if zero is None else b.to(torch.float64) - zero.to(torch.float64)
    return ((a.to(torch.float64) - 128) @ wide).to(torch.int32)  # exact: |sums| < 2**53


def _matmul_scaled_shape(a: Tensor, b: Tensor, scale: Tensor, zero: Any) -> Tensor:
    return scale.new_empty([*a.shape[:-1], b.shape[-1]])


@_operator("matmul_scaled(Tensor a, Tensor b, Tensor scale, Tensor? zero) -> Tensor", _matmul_scaled_shape)
def _matmul_scaled(a: Tensor, b: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """``com.microsoft.MatMulIntegerToFloat``: ``matmul_integer · scale``, ``scale [N]`` float32."""
    return _matmul_integer(a, b, zero).to(torch.float32) * scale


def _quantize_shape(x: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero.dtype)


def _along(value: Tensor, like: Tensor, axis: int) -> Tensor:
    if value.dim() == 0:
        return value
    shape = [1] * like.dim()
    shape[axis] = -1
    return value.reshape(shape)


@_operator("quantize_linear(Tensor x, Tensor scale, Tensor zero, int axis) -> Tensor", _quantize_shape)
def _quantize_linear(x: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    """``QuantizeLinear``: integers, per tensor or along ``axis``."""
    value = x.to(torch.float32) / _along(scale.to(torch.float32), x, axis)
    bounds = torch.iinfo(zero.dtype)
    value = torch.round(value) + _along(zero, x, axis)
    return value.clamp(bounds.min, bounds.max).to(zero.dtype)


def _dequantize_shape(q: Tensor, scale: Tensor, zero: Any, axis: int, block: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


@_operator(
    "dequantize_linear(Tensor q, Tensor scale, Tensor? zero, int axis, int block) -> Tensor",
    _dequantize_shape,
)
def _dequantize_linear(q: Tensor, scale: Tensor, zero: Tensor | None, axis: int, block: int) -> Tensor:
    """``DequantizeLinear``: per tensor, along ``axis``, or (``block > 0``) in blocks along ``axis``."""

    def wide(value: Tensor) -> Tensor:
        if block <= 0:
            return _along(value, q, axis)
        return value.repeat_interleave(block, axis).narrow(axis, 0, q.shape[axis])

    value = q.to(torch.float32)
    if zero is not None:
        value = value - wide(zero.to(torch.float32))
    return (value * wide(scale.to(torch.float32))).to(scale.dtype)


def _attention_shapes(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    for past, new in ((past_k, k), (past_v, v)):
        for index in (0, 1, 3):
            torch._check(past.shape[index] == new.shape[index])
    torch._check(past_k.shape[2] == past_v.shape[2])
    total = past_k.shape[2] + k.shape[2]
    grown = k.new_empty(k.shape[0], k.shape[1], total, k.shape[3])
    return torch.empty_like(q, memory_format=torch.contiguous_format), grown, torch.empty_like(grown)


@_operator(
    "grouped_attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, Tensor bias, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _attention_shapes,
)
def _grouped_attention(
    q: Tensor,  # [B, H, S, D]
    k: Tensor,  # [B, KV, S, D]
    v: Tensor,
    past_k: Tensor,  # [B, KV, P, D]
    past_v: Tensor,
    bias: Tensor,  # [B or 1, 1, S, P + S]
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``com.microsoft.GroupQueryAttention`` without rotation: attention, grown keys, grown values."""
    keys, values = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    queries, total = q.shape[2], keys.shape[2]
    later = torch.ones(queries, total, dtype=torch.bool, device=q.device).triu(total - queries + 1)
    limits = bias.to(q.dtype).masked_fill(later, float("-inf"))
    y = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=limits, scale=scale, enable_gqa=True
    )
    return y.contiguous(), keys, values


def _row_numbers_shape(angles: Tensor, x: Tensor) -> Tensor:
    return x.new_empty([x.shape[0], x.shape[2]], dtype=torch.int64)


@_operator("row_numbers(Tensor angles, Tensor x) -> Tensor", _row_numbers_shape)
def _row_numbers(angles: Tensor, x: Tensor) -> Tensor:
    """Row of ``angles [B or 1, 1, S, D]``, flattened, of each token of ``x [B, H, S, D]``: ``[B, S]``."""
    batch, tokens = angles.shape[0], angles.shape[2]
    numbers = torch.arange(batch * tokens, device=x.device).reshape(batch, tokens)
    return numbers.expand(x.shape[0], tokens).contiguous()


def _rotary_embedding_shape(x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_operator(
    "rotary_embedding(Tensor x, Tensor rows, Tensor cos, Tensor sin) -> Tensor", _rotary_embedding_shape
)
def _rotary_embedding(x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``com.microsoft.RotaryEmbedding``: halves of ``x [B, H, S, D]`` turned by ``cos``, ``sin [R, D/2]``."""
    first, second = x.chunk(2, -1)
    c, s = cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)  # [B, 1, S, D/2]
    return torch.cat([first * c - second * s, second * c + first * s], -1)
