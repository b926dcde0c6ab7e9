"""8-bit floating-point activations: per token at run time, or per tensor with a calibrated scale.

The conversion saturates: magnitudes beyond the largest code become the largest code. A token with NaN or inf
gets a scale that is NaN or inf, so that the fault stays visible; with a calibrated scale NaN stays NaN, and
inf saturates like any other large value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.formats.floating import encode_float
from fxcompress.ops._library import composite

__all__: list[str] = []

_SMALLEST_ABSMAX = 1 / 512


@composite("quantize_float_per_token(Tensor x, ScalarType dtype) -> (Tensor q, Tensor scale)")
def _quantize_float_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of each token ``x[..., :]`` and their float32 scales ``[..., 1]``, max|x| over the largest code.

    max|x| counts as 1/512 when it is less.
    """
    top = x.abs().amax(dim=-1, keepdim=True).to(torch.float32)
    scale = top.clamp_min(_SMALLEST_ABSMAX) / torch.finfo(dtype).max
    return encode_float(x, scale, dtype), scale


@composite("quantize_float_per_tensor(Tensor x, Tensor scale, ScalarType dtype) -> Tensor")
def _quantize_float_per_tensor(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes ``x / scale``."""
    return encode_float(x, scale, dtype)


@composite("dequantize_float_activation(Tensor q, Tensor scale, ScalarType dtype) -> Tensor")
def _dequantize_float_activation(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale · q`` in ``dtype``."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (q.to(compute) * scale.to(compute)).to(dtype)
