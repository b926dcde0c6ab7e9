"""Quantization of activations: per token at run time, or per tensor with calibrated parameters.

Codes are signed int8 for 8 bits and fewer. Arithmetic is float32 (float64 for float64 inputs), rounding is
half to even.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.forms import ActivationQuantizer, Eager, Transform
from fxcompress.ops._library import composite

__all__ = ["apply_quantizer", "apply_transforms"]

_TINY = torch.finfo(torch.float32).tiny


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


@composite("quantize_per_token(Tensor x, int bits) -> (Tensor q, Tensor scale)")
def _quantize_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes of each token ``x[..., :]``.

    Returns ``q`` int8 like ``x``, within ±(2**(bits−1) − 1), and ``scale`` float32 ``[..., 1]``, the largest
    magnitude over 2**(bits−1) − 1. A token of zeros (or of values below 1e-36, whose scale would be no normal
    number) gets scale 1. A token with NaN or inf gets a scale that is NaN or inf, so the fault stays visible.
    """
    qmax = (1 << (bits - 1)) - 1
    scale = (_wide(x.abs().amax(dim=-1, keepdim=True)) / qmax).to(torch.float32)
    scale = torch.where(scale < _TINY, torch.ones_like(scale), scale)  # false for NaN
    q = torch.round(_wide(x) / scale).clamp(-qmax, qmax)
    return q.to(torch.int8), scale


@composite("quantize_per_tensor(Tensor x, Tensor scale, Tensor zero, int bits) -> Tensor")
def _quantize_per_tensor(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """``clamp(round(x / scale) + zero)`` as int8 within −2**(bits−1) … 2**(bits−1) − 1, for finite ``x``."""
    bound = 1 << (bits - 1)
    return (torch.round(_wide(x) / scale) + zero).clamp(-bound, bound - 1).to(torch.int8)


@composite("dequantize_activation(Tensor q, Tensor scale, Tensor? zero, ScalarType dtype) -> Tensor")
def _dequantize_activation(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``scale · (q − zero)`` in ``dtype``; ``scale`` and ``zero`` broadcast against ``q``."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    value = q.to(compute)
    if zero is not None:
        value = value - zero.to(compute)
    return (value * scale.to(compute)).to(dtype)


@composite("quantize_per_group(Tensor x, int bits, int group_size) -> (Tensor q, Tensor scale)")
def _quantize_per_group(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """:func:`quantize_per_token` of every group of channels; ``scale`` is ``[..., ⌈K / group_size⌉]``."""
    width = x.shape[-1]
    groups = -(-width // group_size)
    wide = F.pad(x, (0, groups * group_size - width)).unflatten(-1, (groups, group_size))
    q, scale = torch.ops.fxcompress.quantize_per_token.default(wide, bits)
    return q.flatten(-2)[..., :width], scale.squeeze(-1)


@composite("dequantize_per_group(Tensor q, Tensor scale, int group_size, ScalarType dtype) -> Tensor")
def _dequantize_per_group(q: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """``scale · q`` in ``dtype``, by group."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    wide = scale.repeat_interleave(group_size, dim=-1)[..., : q.shape[-1]]
    return (q.to(compute) * wide.to(compute)).to(dtype)


def _cluster_of(ends: Tensor, width: int) -> Tensor:
    """``[K]``: the cluster of every channel."""
    return torch.bucketize(torch.arange(width, device=ends.device), ends, right=True)


@composite("quantize_per_cluster(Tensor x, Tensor scale, Tensor zero, Tensor ends, int bits) -> Tensor")
def _quantize_per_cluster(x: Tensor, scale: Tensor, zero: Tensor, ends: Tensor, bits: int) -> Tensor:
    """:func:`quantize_per_tensor` with a scale and zero-point per cluster; channel k < ends[c] is in c."""
    cluster = _cluster_of(ends, x.shape[-1])
    bound = 1 << (bits - 1)
    return (torch.round(_wide(x) / scale[cluster]) + zero[cluster]).clamp(-bound, bound - 1).to(torch.int8)


@composite(
    "dequantize_per_cluster(Tensor q, Tensor scale, Tensor zero, Tensor ends, ScalarType dtype) -> Tensor"
)
def _dequantize_per_cluster(
    q: Tensor, scale: Tensor, zero: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """``scale · (q − zero)`` in ``dtype``, by cluster."""
    cluster = _cluster_of(ends, q.shape[-1])
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return ((q.to(compute) - zero[cluster].to(compute)) * scale[cluster].to(compute)).to(dtype)


def apply_quantizer(x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """Quantize and dequantize an activation: the values a quantized product sees.

    Args:
        x: ``[..., K]`` floating.
        quantizer: How.

    Returns:
        ``[..., K]`` in the dtype of ``x``.

    Raises:
        FormatError: the quantizer says not how it computes.

    Example:
        >>> apply_quantizer(torch.tensor([[0.0, 1.0, 127.0]]), DynamicPerToken(bits=8)).tolist()
        [[0.0, 1.0, 127.0]]
    """
    value: Tensor = quantizer.emit(x, x.dtype, Eager(quantizer))
    return value


def apply_transforms(x: Tensor, transforms: Sequence[Transform]) -> Tensor:
    """Apply input or output transforms in order.

    Args:
        x: ``[..., K]`` floating.
        transforms: What to apply.

    Raises:
        FormatError: a transform that has no reference implementation.
    """
    for transform in transforms:
        x = transform.emit(x, x.dtype, Eager(transform))
    return x
