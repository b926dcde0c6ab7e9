"""Codebook formats: a code is the index of a value in a table of ``2**bits``, ``ŵ = scale · table[code]``.

Fixed tables hold values within ±1, and every group of inputs (or row) is scaled by its largest magnitude:

* ``nf4``: quantiles of the normal distribution, zero included, as published (Dettmers et al., 2023,
  QLoRA, arXiv:2305.14314, appendix E);
* ``fp4``: the values of a floating-point number of 2 exponent bits and 1 mantissa bit (E2M1), over 6.

Learned tables hold weights as they are, one table per row or one for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats._ranges import compute_dtype
from fxcompress.formats.integer import spread
from fxcompress.formats.packing import packed_width

__all__ = [
    "FIXED_TABLES",
    "CodebookFormat",
    "decode_codebook",
    "encode_codebook",
    "fixed_table",
    "largest_magnitudes",
    "representable",
]

_CHUNK = 1 << 22  # elements encoded at once
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class CodebookFormat:
    """How large a codebook format is.

    Args:
        bits: Width of one code, 2…8.
        group_size: Consecutive inputs that share a scale; 0 = one scale per row; None = no scales.
        per_row: One table per row, in bfloat16; else one float32 table for all rows.

    Raises:
        FormatError: ``bits`` or ``group_size`` is out of range.

    Example:
        >>> CodebookFormat(4, 64, per_row=False).bits_per_weight(1024, 1024)
        4.25048828125
    """

    bits: int
    group_size: int | None
    per_row: bool

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise FormatError(f"CodebookFormat: bits={self.bits!r}, expected an integer 2…8.")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 0):
            raise FormatError(
                f"CodebookFormat: group_size={self.group_size!r}, expected a number of inputs, 0 (one scale"
                " per row) or null (no scales)."
            )

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype scales are stored in, as those of integer formats: bfloat16 for groups, else float32."""
        return torch.bfloat16 if self.group_size else torch.float32

    @property
    def table_dtype(self) -> torch.dtype:
        """Dtype tables are stored in."""
        return torch.bfloat16 if self.per_row else torch.float32

    def scale_shape(self, batch: int, rows: int, columns: int) -> tuple[int, int, int] | None:
        """Shape of the scales of a ``[batch, rows, columns]`` matrix, or None without scales."""
        if self.group_size is None:
            return None
        return batch, rows, -(-columns // self.group_size) if self.group_size else 1

    def table_shape(self, batch: int, rows: int) -> tuple[int, int, int]:
        """Shape of the tables of a matrix."""
        return (batch, rows, 1 << self.bits) if self.per_row else (1, 1, 1 << self.bits)

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits per weight of an ``[rows, columns]`` matrix: codes, padding, scales and tables."""
        shape = self.scale_shape(1, rows, columns)
        scales = 0 if shape is None else rows * shape[2] * torch.finfo(self.scale_dtype).bits
        tables = (rows if self.per_row else 1) * (1 << self.bits) * torch.finfo(self.table_dtype).bits
        return (8 * rows * packed_width(columns, self.bits) + scales + tables) / (rows * columns)

    def describe(self) -> str:
        """E.g. ``"4-bit codes, group 64"``."""
        tables = "table per row" if self.per_row else "one table"
        span = {None: "no scales", 0: "scale per row"}.get(self.group_size, f"group {self.group_size}")
        return f"{self.bits}-bit codes, {tables}, {span}"


def fixed_table(name: str) -> Tensor:
    """The values of a fixed table, float32 ``[16]``.

    Args:
        name: ``"nf4"`` or ``"fp4"``.

    Raises:
        FormatError: another name.

    Example:
        >>> fixed_table("nf4")[:3].tolist()
        [-1.0, -0.6961928009986877, -0.5250730514526367]
    """
    if name not in FIXED_TABLES:
        raise FormatError(f"fixed_table: {name!r} is unknown, expected {' or '.join(FIXED_TABLES)}.")
    return torch.tensor(FIXED_TABLES[name], dtype=torch.float64).to(torch.float32)


FIXED_TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ),
    "fp4": (*(value / 6 for value in _E2M1), *(-value / 6 for value in _E2M1)),
}
"""Values by code. Those of ``fp4`` are sign, exponent, exponent, mantissa, so that two codes are zero."""


def largest_magnitudes(w: Tensor, fmt: CodebookFormat) -> Tensor:
    """Scales that make the largest magnitude of every group 1; 0 for a group of zeros.

    Args:
        w: ``[B, N, K]``, floating and finite.
        fmt: The format, with scales.

    Returns:
        ``[B, N, G]`` in :attr:`CodebookFormat.scale_dtype`: no value they stand for exceeds the range of
        ``w.dtype``.

    Raises:
        FormatError: float64 values outside the range of float32.
    """
    columns = w.shape[-1]
    size = fmt.group_size or columns
    padded = torch.nn.functional.pad(w, (0, -columns % size))
    top = padded.abs().unflatten(-1, (-1, size)).amax(-1).to(compute_dtype(w.dtype))
    if bool((top > torch.finfo(torch.float32).max).any()):
        raise FormatError(
            "largest_magnitudes: float64 weights exceed the range of float32, in which scales are stored.",
            fix="rescale the weight.",
        )
    scale = representable(top, w.dtype, fmt.scale_dtype)
    smallest = torch.tensor(torch.finfo(fmt.scale_dtype).tiny, dtype=fmt.scale_dtype)
    return torch.where(top > 0, torch.maximum(scale, smallest), 0)


def representable(value: Tensor, dtype: torch.dtype, stored: torch.dtype) -> Tensor:
    """``value`` rounded to the dtype ``stored``, within the range of ``dtype``; 1/128 covers rounding."""
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    if torch.finfo(stored).eps > torch.finfo(dtype).eps or torch.finfo(stored).max >= limit:
        limit *= 1 - 1 / 128
    return value.clamp(-limit, limit).to(stored)


def encode_codebook(w: Tensor, table: Tensor, scale: Tensor | None, group_size: int) -> Tensor:
    """Index of the nearest value of the table; of two equally near ones, that of the smaller.

    Args:
        w: ``[B, N, K]``, floating and finite.
        table: ``[1, 1, C]`` or ``[B, N, C]``.
        scale: ``[B, N, G]`` or None.
        group_size: Inputs that share a scale; 0 = a row.

    Returns:
        ``[B, N, K]`` uint8.
    """
    batch, rows, columns = w.shape
    compute = compute_dtype(w.dtype)
    flat = w.reshape(batch * rows, columns)
    levels, order = table.to(compute).reshape(-1, table.shape[-1]).sort(dim=-1)
    bounds = (levels[:, 1:] + levels[:, :-1]) / 2
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=w.device)
    for part in _parts(batch * rows, columns):
        value = flat[part].to(compute)
        if scale is not None:
            factor = scale.reshape(batch * rows, -1)[part].to(compute)
            factor = torch.where(factor == 0, torch.ones_like(factor), factor)
            value = value / spread(factor, group_size, columns)
        if len(levels) == 1:
            codes[part] = order[0][torch.bucketize(value, bounds[0].contiguous())].to(torch.uint8)
        else:
            index = torch.searchsorted(bounds[part].contiguous(), value.contiguous())
            codes[part] = order[part].gather(1, index).to(torch.uint8)
    return codes.reshape(w.shape)


def _parts(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def decode_codebook(
    codes: Tensor, table: Tensor, scale: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """``scale · table[code]``, computed in float32 (float64 if asked for), rounded once.

    Args:
        codes: ``[..., K]`` uint8 (not packed).
        table: ``[1, C]`` float32, for all rows; or ``[..., C]`` bfloat16, one per row of codes.
        scale: ``[..., G]`` or None.
        group_size: Inputs that share a scale; 0 = a row.
        dtype: Floating dtype of the result.
    """
    compute = compute_dtype(dtype)
    index = codes.to(torch.int32)
    if table.dtype == torch.bfloat16:
        starts = torch.arange(codes[..., 0].numel(), dtype=torch.int32, device=codes.device)
        index = index + (starts * table.shape[-1]).reshape(codes.shape[:-1]).unsqueeze(-1)
    value = table.reshape(-1).to(compute).index_select(0, index.reshape(-1)).reshape(codes.shape)
    if scale is not None:
        value = value * spread(scale.to(compute), group_size, codes.shape[-1])
    return value.to(dtype)
