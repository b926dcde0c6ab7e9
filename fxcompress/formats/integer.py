"""Uniform integer codes for weights: ``ŵ = scale · (code − zero)``, one scale per group, row or matrix.

Asymmetric: with ``lo = min(w, 0)`` and ``hi = max(w, 0)``, ``scale = (hi − lo) / (2**bits − 1)`` and
``zero = round(−lo / scale)``. Symmetric: ``scale = max|w| / (2**(bits−1) − 1)``, codes are stored unsigned
around the fixed zero-point ``2**(bits−1)`` and the lowest code stays unused, so that levels are symmetric.
Zero is exactly representable in both. Rounding is half to even. Base quantizer of GPTQ (Frantar et al. 2022).

The scale is rounded to the dtype it is stored in *before* zero-points and codes are computed, hence codes
compensate that rounding and decoding uses exactly the scale that encoding used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats._ranges import as_units, best_shrink, compute_dtype, parameters_of, spread_importance
from fxcompress.formats.packing import pack_codes, packed_width

if TYPE_CHECKING:
    from fxcompress.forms.layout import WeightLayout
    from fxcompress.forms.terms import QuantizedWeight

__all__ = ["IntFormat", "decode", "encode", "find_parameters", "make_term", "quantize_to_term"]

_CHUNK = 1 << 22  # elements converted at once; bounds the temporaries to some tens of MiB


@dataclass(frozen=True)
class IntFormat:
    """A uniform integer format.

    Args:
        bits: Width of one code, 2…8.
        symmetric: Levels symmetric around zero with no stored zero-point. Default False.
        group_size: Consecutive inputs that share a scale; 0 = one scale per row, -1 = one per matrix. The
            last group of a row may be shorter. Default 128 (GPTQ, AWQ).

    Raises:
        FormatError: ``bits`` or ``group_size`` is out of range.

    Example:
        >>> IntFormat(bits=4, group_size=128).bits_per_weight(1024, 1024)
        4.1875
    """

    bits: int
    symmetric: bool = False
    group_size: int = 128

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise FormatError(f"IntFormat: bits={self.bits!r}, expected an integer 2…8.")
        if type(self.group_size) is not int or self.group_size < -1:
            raise FormatError(
                f"IntFormat: group_size={self.group_size!r}, expected -1 (one scale per matrix), 0 (one per"
                " row) or a number of inputs."
            )

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def fixed_zero(self) -> int:
        """Zero-point of symmetric codes."""
        return 1 << (self.bits - 1)

    @property
    def qmin(self) -> int:
        """Smallest code in use: 1 when symmetric, else 0."""
        return 1 if self.symmetric else 0

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype scales are stored in: bfloat16 for groups (full exponent range), float32 otherwise."""
        return torch.bfloat16 if self.group_size > 0 else torch.float32

    def groups(self, columns: int) -> int:
        """Scales per row of ``columns`` inputs (1 for per-row and per-matrix scales)."""
        return -(-columns // self.group_size) if self.group_size > 0 else 1

    def scale_shape(self, batch: int, rows: int, columns: int) -> tuple[int, int, int]:
        """Shape of ``scale`` and ``zero`` for a ``[batch, rows, columns]`` matrix."""
        return (batch, 1, 1) if self.group_size == -1 else (batch, rows, self.groups(columns))

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits per weight of an ``[rows, columns]`` matrix: codes, padding, scales and zero-points."""
        overhead = torch.finfo(self.scale_dtype).bits + (0 if self.symmetric else 8)
        scales = math.prod(self.scale_shape(1, rows, columns))
        return (8 * rows * packed_width(columns, self.bits) + scales * overhead) / (rows * columns)


def find_parameters(
    w: Tensor, fmt: IntFormat, *, search: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero-points of a weight matrix.

    Args:
        w: ``[B, N, K]``, floating and finite. K may be smaller than the group size.
        fmt: The format.
        search: Shrink each range by the factor in {1, 0.99, …, 0.21} with the least ``Σ|ŵ − w|^2.4`` instead
            of covering it fully. Default False.
        importance: ``[K]`` non-negative weights of the error per input, e.g. mean squares of the
            activations; only used by the search. Default: all equal.

    Returns:
        ``scale``: :attr:`IntFormat.scale_dtype`, ``[B, N, G]`` (``[B, 1, 1]`` per matrix), always positive;
        ``zero``: uint8 of the same shape, or None when symmetric.

    Raises:
        FormatError: wrong rank or dtype, empty matrix, or float64 values outside the range of float32.
    """
    _check_matrix(w, "find_parameters")
    columns = w.shape[-1]
    units = as_units(w, fmt)  # [U, G, R, L]: one scale per (U, G)
    lo = units.amin(dim=(2, 3)).clamp(max=0)  # [U, G]
    hi = units.amax(dim=(2, 3)).clamp(min=0)
    lo, hi = lo.to(compute_dtype(w.dtype)), hi.to(compute_dtype(w.dtype))
    if w.dtype == torch.float64 and bool((torch.maximum(-lo, hi) > torch.finfo(torch.float32).max).any()):
        raise FormatError(
            "find_parameters: float64 weights exceed the range of float32, in which scales are stored.",
            fix="rescale the weight.",
        )
    if search:
        shrink = best_shrink(units, lo, hi, fmt, spread_importance(importance, columns, fmt, lo), w.dtype)
        lo, hi = lo * shrink, hi * shrink
    scale, zero = parameters_of(lo, hi, fmt, w.dtype)
    shape = fmt.scale_shape(*w.shape)
    stored = None if zero is None else zero.to(torch.uint8).reshape(shape)
    return scale.to(fmt.scale_dtype).reshape(shape), stored


def encode(w: Tensor, scale: Tensor, zero: Tensor | None, fmt: IntFormat) -> Tensor:
    """Codes of a weight matrix: ``clamp(round(w / scale) + zero, qmin, qmax)``.

    Args:
        w: ``[B, N, K]``, floating and finite.
        scale: ``[B, N, G]`` or ``[B, 1, 1]``, positive.
        zero: uint8 of that shape, or None when symmetric.
        fmt: The format.

    Returns:
        ``[B, N, K]`` uint8.

    Raises:
        FormatError: shapes do not belong together, or ``zero`` does not fit ``fmt.symmetric``.
    """
    _check_matrix(w, "encode")
    _check_scale(w.shape, scale, zero, fmt, "encode")
    batch, rows, columns = w.shape
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    step = max(1, _CHUNK // (batch * columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        rows_scale = scale if fmt.group_size == -1 else scale[:, part]
        rows_zero = zero if zero is None or fmt.group_size == -1 else zero[:, part]
        value = w[:, part].to(compute_dtype(w.dtype))
        value = torch.round(value / spread(rows_scale.to(value.dtype), fmt.group_size, columns))
        offset = fmt.fixed_zero if rows_zero is None else spread(rows_zero, fmt.group_size, columns)
        codes[:, part] = (value + offset).clamp_(fmt.qmin, fmt.qmax)
    return codes


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: IntFormat, dtype: torch.dtype) -> Tensor:
    """Values of codes: ``scale · (code − zero)``, computed in float32 (float64 if asked for), rounded once.

    Args:
        codes: ``[B, N, K]`` uint8 (not packed).
        scale: ``[B, N, G]`` or ``[B, 1, 1]``.
        zero: uint8 of that shape, or None when symmetric.
        fmt: The format.
        dtype: Floating dtype of the result.

    Returns:
        ``[B, N, K]`` in ``dtype``.

    Raises:
        FormatError: shapes do not belong together, or ``zero`` does not fit ``fmt.symmetric``.
    """
    _check_scale(codes.shape, scale, zero, fmt, "decode")
    return decode_rows(codes, scale, zero, fmt.bits, fmt.group_size, dtype)


def decode_rows(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """:func:`decode` for any leading dimensions, without checks: ``codes [..., K]``, ``scale [..., G]``."""
    compute = compute_dtype(dtype)
    columns = codes.shape[-1]
    scale = scale.to(compute)
    offset = 1 << (bits - 1) if zero is None else zero.to(compute)
    if 0 < group_size < columns and columns % group_size == 0:  # broadcast over [..., G, group_size]
        codes = codes.unflatten(-1, (-1, group_size))
        offset = offset.unsqueeze(-1) if isinstance(offset, Tensor) else offset
        return ((codes.to(compute) - offset) * scale.unsqueeze(-1)).to(dtype).flatten(-2)
    offset = spread(offset, group_size, columns) if isinstance(offset, Tensor) else offset
    return ((codes.to(compute) - offset) * spread(scale, group_size, columns)).to(dtype)


def spread(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    """``[..., G]`` per group to ``[..., K]`` per column; ``[..., 1]`` is left to broadcast."""
    if group_size <= 0 or group_size >= columns:
        return per_group
    wide = per_group.unsqueeze(-1).expand(*per_group.shape, group_size).flatten(-2)
    return wide if wide.shape[-1] == columns else wide[..., :columns]


def quantize_to_term(
    parameter: Tensor,
    layout: WeightLayout,
    fmt: IntFormat,
    *,
    search: bool = False,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Round a parameter to nearest codes.

    Args:
        parameter: Floating tensor of shape ``layout.shape``, finite.
        layout: How it is read as ``[B, N, K]``.
        fmt: The format.
        search: See :func:`find_parameters`.
        importance: See :func:`find_parameters`.

    Returns:
        The packed weight.

    Raises:
        FormatError: the group size exceeds K, or as for :func:`find_parameters`.

    Example:
        >>> from fxcompress.forms import WeightLayout
        >>> w = torch.tensor([[-1.0, -0.5, 0.2, 2.0]], dtype=torch.float64)
        >>> term = quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(bits=4, group_size=0))
        >>> term.zero.tolist(), term.codes.tolist()
        ([[[5]]], [[[48, 246]]])
    """
    w = layout.to_matrix(parameter.detach())
    if fmt.group_size > w.shape[-1]:
        raise FormatError(
            f"group_size={fmt.group_size} exceeds the {w.shape[-1]} inputs of a weight of shape"
            f" {tuple(parameter.shape)}.",
            fix="use a smaller group or group_size=0 (one scale per row).",
        )
    scale, zero = find_parameters(w, fmt, search=search, importance=importance)
    return make_term(encode(w, scale, zero, fmt), scale, zero, layout, fmt)


def make_term(
    codes: Tensor, scale: Tensor, zero: Tensor | None, layout: WeightLayout, fmt: IntFormat
) -> QuantizedWeight:
    """Pack codes found by any solver into a weight term.

    Args:
        codes: ``[B, N, K]`` uint8.
        scale: ``[B, N, G]`` or ``[B, 1, 1]``; stored as :attr:`IntFormat.scale_dtype`, in which it must be
            exact already (as :func:`find_parameters` returns it).
        zero: uint8 of that shape, or None when symmetric.
        layout: How the parameter is read as ``[B, N, K]``.
        fmt: The format.

    Raises:
        FormatError: shapes do not belong together, or the scale is not exact in its storage dtype.
    """
    from fxcompress.forms.terms import QuantizedWeight

    if tuple(codes.shape) != layout.matrix_shape:
        raise FormatError(f"make_term: codes {tuple(codes.shape)}, expected {layout.matrix_shape}.")
    _check_scale(codes.shape, scale, zero, fmt, "make_term")
    stored = scale.to(fmt.scale_dtype)
    if stored.dtype != scale.dtype and not torch.equal(stored.to(scale.dtype), scale):
        raise FormatError(
            f"make_term: scales are not exact in {fmt.scale_dtype}, so codes were made for other scales.",
            fix="round the scale to fmt.scale_dtype before encoding.",
        )
    return QuantizedWeight(
        bits=fmt.bits,
        symmetric=fmt.symmetric,
        group_size=fmt.group_size,
        shape=layout.shape,
        perm=layout.perm,
        batch_dims=layout.batch_dims,
        row_dims=layout.row_dims,
        codes=pack_codes(codes, fmt.bits).contiguous(),
        scale=stored.contiguous(),
        zero=None if zero is None else zero.contiguous(),
    )


def _check_matrix(w: Tensor, where: str) -> None:
    if w.dim() != 3 or w.numel() == 0 or not w.is_floating_point():
        raise FormatError(
            f"{where}: weight of shape {tuple(w.shape)} and dtype {w.dtype}, expected a non-empty floating"
            " [B, N, K]."
        )


def _check_scale(shape: torch.Size, scale: Tensor, zero: Tensor | None, fmt: IntFormat, where: str) -> None:
    batch, rows, columns = shape
    expected = fmt.scale_shape(batch, rows, columns)
    if tuple(scale.shape) != expected:
        raise FormatError(
            f"{where}: scale has shape {tuple(scale.shape)}, weight {tuple(shape)} with group_size="
            f"{fmt.group_size} needs {expected}."
        )
    if fmt.symmetric != (zero is None):
        raise FormatError(f"{where}: a zero-point is given exactly when the format is asymmetric.")
    if zero is not None and (tuple(zero.shape) != expected or zero.dtype != torch.uint8):
        raise FormatError(
            f"{where}: zero has shape {tuple(zero.shape)} and dtype {zero.dtype}, expected {expected} uint8."
        )
