"""8-bit floating-point codes: ``ŵ = scale · code``, one scale per tensor, row or block of a matrix.

``e4m3``: 4 exponent and 3 mantissa bits, no infinity, largest value 448, smallest 2⁻⁹ (OCP 8-bit floating
point specification, Micikevicius et al., 2022, arXiv:2209.05433). ``e5m2``: largest value 57344, smallest
2⁻¹⁶. Encoding divides by the scale, saturates at the largest value and rounds half to even; what is below
the smallest normal number keeps its (coarser) denormal code. NaN stays NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats._ranges import compute_dtype

if TYPE_CHECKING:
    from fxcompress.forms.layout import WeightLayout
    from fxcompress.forms.terms import FloatWeight

__all__ = ["FLOAT_DTYPES", "FloatFormat", "decode_float", "encode_float", "quantize_to_float_term"]

FLOAT_DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
"""Number format → dtype of its codes."""


@dataclass(frozen=True)
class FloatFormat:
    """An 8-bit floating-point format.

    Args:
        kind: ``"e4m3"`` (default; more precision) or ``"e5m2"`` (more range).
        block_rows: Outputs that share a scale; 0 = all. Default 1.
        block_columns: Inputs that share a scale; 0 = all. Default 0. ``(1, 0)`` is one scale per row,
            ``(0, 0)`` one per matrix, ``(128, 128)`` one per block. Last blocks may be smaller.

    Raises:
        FormatError: the kind is unknown or a block size is negative.

    Example:
        >>> FloatFormat().bits_per_weight(1024, 1024)
        8.03125
    """

    kind: str = "e4m3"
    block_rows: int = 1
    block_columns: int = 0

    def __post_init__(self) -> None:
        if self.kind not in FLOAT_DTYPES:
            raise FormatError(
                f"FloatFormat: kind={self.kind!r}, expected {' or '.join(map(repr, FLOAT_DTYPES))}."
            )
        for option in ("block_rows", "block_columns"):
            size = getattr(self, option)
            if type(size) is not int or size < 0:
                raise FormatError(f"FloatFormat: {option}={size!r}, expected 0 (all) or a number.")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the codes."""
        return FLOAT_DTYPES[self.kind]

    @property
    def largest(self) -> float:
        """Largest finite code: 448 or 57344."""
        return float(torch.finfo(self.dtype).max)

    def scale_shape(self, batch: int, rows: int, columns: int) -> tuple[int, int, int]:
        """Shape of ``scale`` for a ``[batch, rows, columns]`` matrix."""
        return (batch, _blocks(rows, self.block_rows), _blocks(columns, self.block_columns))

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits per weight of an ``[rows, columns]`` matrix: codes and scales."""
        return 8 + 32 * math.prod(self.scale_shape(1, rows, columns)) / (rows * columns)

    def describe(self) -> str:
        """E.g. ``"fp8-e4m3 per row"``."""
        if self.block_columns == 0 and self.block_rows <= 1:
            return f"fp8-{self.kind} per {'row' if self.block_rows else 'matrix'}"
        return f"fp8-{self.kind} blocks {self.block_rows or 'all'}×{self.block_columns or 'all'}"


def encode_float(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes ``x / scale``, saturated; ``scale`` broadcasts. NaN stays NaN, ±inf becomes the largest code.

    Args:
        x: Floating; float64 is divided in float64, all else in float32.
        scale: Positive, float32.
        dtype: An 8-bit floating dtype.
    """
    largest = torch.finfo(dtype).max
    value = x.to(compute_dtype(x.dtype)) / scale
    # float32 first: a direct conversion of float64 rounds differently from one device to another.
    return value.clamp(-largest, largest).to(torch.float32).to(dtype)


def decode_float(
    codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype
) -> Tensor:
    """``scale · code``, computed in float32 (float64 if asked for), rounded once.

    Args:
        codes: ``[B, N, K]`` 8-bit floating.
        scale: ``[B, ⌈N/block_rows⌉, ⌈K/block_columns⌉]`` float32.
        block_rows: As in :class:`FloatFormat`.
        block_columns: As in :class:`FloatFormat`.
        dtype: Floating dtype of the result.
    """
    compute = compute_dtype(dtype)
    wide = spread_blocks(scale.to(compute), block_rows, block_columns, codes.shape[-2], codes.shape[-1])
    return (codes.to(compute) * wide).to(dtype)


def spread_blocks(scale: Tensor, block_rows: int, block_columns: int, rows: int, columns: int) -> Tensor:
    """``[B, R, C]`` per block to ``[B, N or 1, K or 1]`` per element."""
    if block_rows > 1:
        scale = scale.repeat_interleave(block_rows, -2)[..., :rows, :]
    if block_columns > 0:
        scale = scale.repeat_interleave(block_columns, -1)[..., :columns]
    return scale


def quantize_to_float_term(parameter: Tensor, layout: WeightLayout, fmt: FloatFormat) -> FloatWeight:
    """Round a parameter to 8-bit floating-point codes: each block's largest magnitude is the largest code.

    Args:
        parameter: Floating tensor of shape ``layout.shape``, finite.
        layout: How it is read as ``[B, N, K]``.
        fmt: The format.

    Returns:
        The weight term. A block of zeros (or of values below 1e-36) gets scale 1.

    Raises:
        FormatError: wrong dtype, empty, not finite, or float64 values outside the range of float32.

    Example:
        >>> from fxcompress.forms import WeightLayout
        >>> w = torch.tensor([[448.0, 1.0], [0.5, -0.25]])
        >>> quantize_to_float_term(w, WeightLayout.rows(w.shape), FloatFormat()).scale.flatten()[0].item()
        1.0
    """
    from fxcompress.forms.terms import FloatWeight

    w = layout.to_matrix(parameter.detach())
    if not w.is_floating_point() or w.numel() == 0:
        raise FormatError(
            f"quantize_to_float_term: weight of shape {tuple(w.shape)} and dtype {w.dtype}, expected a"
            " non-empty floating tensor."
        )
    top = _block_absmax(w, fmt).to(torch.float32)
    if not bool(torch.isfinite(top).all()):
        raise FormatError(
            "quantize_to_float_term: the weight has NaN, inf or values outside the range of float32.",
            fix="repair or rescale the weight.",
        )
    scale = top / fmt.largest
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    wide = spread_blocks(scale, fmt.block_rows, fmt.block_columns, w.shape[1], w.shape[2])
    return FloatWeight(
        format_kind=fmt.kind,
        block_rows=fmt.block_rows,
        block_columns=fmt.block_columns,
        shape=layout.shape,
        perm=layout.perm,
        batch_dims=layout.batch_dims,
        row_dims=layout.row_dims,
        codes=encode_float(w, wide, fmt.dtype).contiguous(),
        scale=scale.contiguous(),
    )


def _block_absmax(w: Tensor, fmt: FloatFormat) -> Tensor:
    """``[B, N, K]`` → largest magnitude per block."""
    top = w.abs()
    for dim, size in ((2, fmt.block_columns), (1, fmt.block_rows)):
        if size == 0:
            top = top.amax(dim, keepdim=True)
        elif size > 1:
            parts = [part.amax(dim, keepdim=True) for part in top.split(size, dim)]
            top = torch.cat(parts, dim)
    return top


def _blocks(count: int, size: int) -> int:
    return -(-count // size) if size > 0 else 1
