"""``fxcompress::*_slots``, ``sparse_dense``, …: stored entries to a dense, parameter-shaped tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.formats.integer import decode_rows, spread
from fxcompress.formats.packing import unpack_codes
from fxcompress.formats.semi_structured import decode_semi_structured
from fxcompress.formats.sparse_index import bitmap_slots, csr_slots, nm_slots
from fxcompress.formats.tiled_sparse import decode_tiled
from fxcompress.forms.layout import WeightLayout
from fxcompress.ops._library import composite

__all__: list[str] = []


@composite("nm_slots(Tensor positions, int n, int m, int columns) -> Tensor")
def _nm_slots(positions: Tensor, n: int, m: int, columns: int) -> Tensor:
    """See :func:`fxcompress.formats.sparse_index.nm_slots`."""
    return nm_slots(positions, n, m, columns)


@composite("bitmap_slots(Tensor bits, int columns) -> Tensor")
def _bitmap_slots(bits: Tensor, columns: int) -> Tensor:
    """See :func:`fxcompress.formats.sparse_index.bitmap_slots`."""
    return bitmap_slots(bits, columns)


@composite("csr_slots(Tensor pointers, Tensor columns, int batch, int width) -> Tensor")
def _csr_slots(pointers: Tensor, columns: Tensor, batch: int, width: int) -> Tensor:
    """See :func:`fxcompress.formats.sparse_index.csr_slots`."""
    return csr_slots(pointers, columns, batch, width)


@composite(
    "sparse_dense(Tensor values, Tensor slots, int[] shape, int[] perm, int batch_dims, int row_dims,"
    " ScalarType dtype) -> Tensor"
)
def _sparse_dense(
    values: Tensor,  # [stored]
    slots: Tensor,  # [B, N, K] int64
    shape: Sequence[int],
    perm: Sequence[int],
    batch_dims: int,
    row_dims: int,
    dtype: torch.dtype,
) -> Tensor:
    """The values at their places, zero elsewhere, in the parameter's shape, contiguous."""
    layout = WeightLayout(tuple(shape), tuple(perm), batch_dims, row_dims)
    found = values.to(dtype)[slots.clamp_min(0)]
    zero = torch.zeros((), dtype=dtype, device=values.device)
    return layout.from_matrix(torch.where(slots >= 0, found, zero)).contiguous()


@composite("sparse_codes(Tensor codes, Tensor slots, Tensor? zero, int bits, int group_size) -> Tensor")
def _sparse_codes(
    codes: Tensor,  # [stored] uint8, not packed
    slots: Tensor,  # [B, N, K] int64
    zero: Tensor | None,  # [B, N, G] or [B, 1, 1] uint8
    bits: int,
    group_size: int,
) -> Tensor:
    """Codes ``[B, N, K]``, that of zero where none is stored."""
    columns = slots.shape[-1]
    if zero is None:
        fill = torch.full((), 1 << (bits - 1), dtype=torch.uint8, device=codes.device)
    else:
        fill = spread(zero, group_size, columns)
    return torch.where(slots >= 0, codes[slots.clamp_min(0)], fill)


@composite(
    "dequantize_sparse_weight(Tensor codes, int stored, Tensor slots, Tensor scale, Tensor? zero, int bits,"
    " int group_size, int[] shape, int[] perm, int batch_dims, int row_dims, ScalarType dtype) -> Tensor"
)
def _dequantize_sparse_weight(
    codes: Tensor,  # [packed_width(stored, bits)] uint8
    stored: int,
    slots: Tensor,  # [B, N, K] int64
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    shape: Sequence[int],
    perm: Sequence[int],
    batch_dims: int,
    row_dims: int,
    dtype: torch.dtype,
) -> Tensor:
    """``scale · (code − zero)`` where a code is stored, zero elsewhere, in the parameter's shape."""
    layout = WeightLayout(tuple(shape), tuple(perm), batch_dims, row_dims)
    full = _sparse_codes(unpack_codes(codes, bits, stored), slots, zero, bits, group_size)
    return layout.from_matrix(decode_rows(full, scale, zero, bits, group_size, dtype)).contiguous()


@composite("semi_structured_dense(Tensor values, Tensor meta, ScalarType dtype) -> Tensor")
def _semi_structured_dense(values: Tensor, meta: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`fxcompress.formats.semi_structured.decode_semi_structured`."""
    return decode_semi_structured(values, meta).to(dtype)


@composite(
    "tiled_dense(Tensor words, Tensor offsets, int rows, int columns, ScalarType half, ScalarType dtype)"
    " -> Tensor"
)
def _tiled_dense(
    words: Tensor, offsets: Tensor, rows: int, columns: int, half: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """See :func:`fxcompress.formats.tiled_sparse.decode_tiled`."""
    return decode_tiled(words, offsets, rows, columns, half).to(dtype)
