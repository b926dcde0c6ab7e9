"""``fxcompress::quantized_embedding``: look up packed rows, then dequantize only those."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.formats.integer import decode_rows
from fxcompress.formats.packing import unpack_codes
from fxcompress.ops._library import composite

__all__: list[str] = []


@composite(
    "quantized_embedding(Tensor indices, Tensor codes, Tensor scale, Tensor? zero, int bits, int group_size,"
    " int columns, ScalarType dtype) -> Tensor"
)
def _quantized_embedding(
    indices: Tensor,  # [...] int32 or int64
    codes: Tensor,  # [1, V, packed_width(columns, bits)] uint8
    scale: Tensor,  # [1, V, G] or [1, 1, 1]
    zero: Tensor | None,  # uint8 like scale
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the rows ``[..., columns]`` of the dequantized table."""

    def rows(table: Tensor) -> Tensor:
        return table[0, 0] if group_size == -1 else F.embedding(indices, table[0])

    unpacked = unpack_codes(F.embedding(indices, codes[0]), bits, columns)
    return decode_rows(unpacked, rows(scale), None if zero is None else rows(zero), bits, group_size, dtype)
