"""Choosing scales and zero-points of integer formats: from the full range, or by search over shrunk ranges.

Shapes: a weight matrix ``[B, N, K]`` is read as ``[U, G, R, L]``, where the elements of (U, G) share a scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import FormatError

if TYPE_CHECKING:
    from fxcompress.formats.integer import IntFormat

_CHUNK = 1 << 17  # elements scanned per candidate by the search: stays in a core's cache
_CHUNK_GPU = 1 << 25
_CANDIDATES = 80  # shrink factors 1 − i/100 (GPTQ reference code: grid=100, maxshrink=0.8)
_NORM = 2.4  # exponent of the search error (GPTQ reference code)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of intermediate results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_units(w: Tensor, fmt: IntFormat) -> Tensor:
    """``[B, N, K]`` as ``[U, G, R, L]``: the elements of (U, G) share a scale.

    A partial last group is filled with zeros, which every range contains and every code represents exactly.
    """
    batch, rows, columns = w.shape
    if fmt.group_size == -1:
        return w.unsqueeze(1)
    size = fmt.group_size or columns
    count = fmt.groups(columns)
    if count * size != columns:
        w = F.pad(w, (0, count * size - columns))
    return w.reshape(batch * rows, count, 1, size)


def spread_importance(importance: Tensor | None, columns: int, fmt: IntFormat, like: Tensor) -> Tensor | None:
    """``[K]`` to ``[G, 1, L]`` beside :func:`as_units`."""
    if importance is None:
        return None
    if tuple(importance.shape) != (columns,):
        raise FormatError(f"find_parameters: importance {tuple(importance.shape)}, expected {(columns,)}.")
    importance = importance.to(like.device, like.dtype)
    importance = importance / importance.max().clamp_min(torch.finfo(like.dtype).tiny)
    size = fmt.group_size if fmt.group_size > 0 else columns
    return F.pad(importance, (0, -columns % size)).reshape(-1, 1, size)


def parameters_of(lo: Tensor, hi: Tensor, fmt: IntFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale (exact in ``fmt.scale_dtype``) and integral zero-point of ranges ``lo ≤ 0 ≤ hi``, in their dtype.

    Two guards keep scales positive and decoded values finite, however extreme the weights: a scale never
    falls below the smallest normal number, and no level exceeds the range of the weight's ``dtype``.
    """
    # Asymmetric: divided separately, because hi − lo may overflow.
    scale = torch.maximum(-lo, hi) / (fmt.qmax // 2) if fmt.symmetric else hi / fmt.qmax - lo / fmt.qmax
    tiny = torch.finfo(fmt.scale_dtype).tiny
    empty = (lo == 0) & (hi == 0)
    scale = scale.to(fmt.scale_dtype).clamp_min(tiny).to(lo.dtype)
    scale = torch.where(empty, torch.ones_like(scale), scale)
    if fmt.symmetric:
        return _bounded(scale, torch.full_like(scale, fmt.qmax // 2), fmt, dtype), None
    zero = torch.round(-lo / scale).clamp_(0, fmt.qmax)
    zero = torch.where(empty, torch.full_like(zero, fmt.fixed_zero), zero)
    return _bounded(scale, torch.maximum(zero, fmt.qmax - zero), fmt, dtype), zero


def _bounded(scale: Tensor, level: Tensor, fmt: IntFormat, dtype: torch.dtype) -> Tensor:
    """Lower ``scale`` where ``scale · level`` would overflow ``dtype``; 1/128 covers rounding to bfloat16."""
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / level * (1 - 1 / 128)
    return torch.where(scale > limit, limit.to(fmt.scale_dtype).to(scale.dtype), scale)


def best_shrink(
    units: Tensor, lo: Tensor, hi: Tensor, fmt: IntFormat, importance: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Best shrink factor ``[U, G]`` of each range.

    Errors are measured in units of the unshrunk scale, so that ``|·|^2.4`` neither over- nor underflows.
    """
    budget = _CHUNK if units.device.type == "cpu" else _CHUNK_GPU
    count, groups, rows, length = units.shape
    step = max(1, budget // (groups * rows * length))
    step_rows = max(1, budget // (groups * length))
    factors = 1 - torch.arange(_CANDIDATES, dtype=lo.dtype, device=lo.device)[:, None, None] / 100
    shrink = torch.empty_like(lo)
    for start in range(0, count, step):
        part = slice(start, start + step)
        scale, zero = parameters_of(lo[part] * factors, hi[part] * factors, fmt, dtype)  # [candidates, U, G]
        errors = torch.zeros_like(scale)
        for piece in units[part].split(step_rows, dim=2):
            value = piece.to(lo.dtype)
            batch = max(1, budget // value.numel())
            for first in range(0, _CANDIDATES, batch):
                some = slice(first, first + batch)
                errors[some] += _error(
                    value, scale[some], None if zero is None else zero[some], fmt, importance
                )
        errors *= (scale / scale[0]) ** _NORM
        shrink[part] = factors.flatten()[errors.argmin(dim=0)]
    return shrink


def _error(
    value: Tensor, scale: Tensor, zero: Tensor | None, fmt: IntFormat, importance: Tensor | None
) -> Tensor:
    """``Σ|ŵ − w|^2.4`` of each candidate and unit, in units of its scale: ``[candidates, U, G]``."""
    exact = value / scale[..., None, None]
    rounded = torch.round(exact)
    if zero is None:
        rounded.clamp_(-(fmt.qmax // 2), fmt.qmax // 2)
    else:
        zero = zero[..., None, None]
        rounded.add_(zero).clamp_(0, fmt.qmax).sub_(zero)  # four times faster than a clamp by tensors
    error = rounded.sub_(exact).abs_().log2_().mul_(_NORM).exp2_()  # twice as fast as pow; 0 stays 0
    if importance is not None:
        error.mul_(importance)
    return error.sum(dim=(-2, -1))
