"""``fxcompress::dequantize_codebook`` and ``codebook_embedding``: codes that index a table of values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.formats.codebook import decode_codebook
from fxcompress.formats.packing import unpack_codes
from fxcompress.forms.layout import WeightLayout
from fxcompress.ops._library import composite

__all__: list[str] = []


@composite(
    "dequantize_codebook(Tensor codes, Tensor table, Tensor? scale, int bits, int group_size,"
    " SymInt[] shape, int[] perm, int batch_dims, int row_dims, ScalarType dtype) -> Tensor"
)
def _dequantize_codebook(
    codes: Tensor,  # [B, N, packed_width(K, bits)] uint8
    table: Tensor,  # [1, 1, 2**bits] float32 or [B, N, 2**bits] bfloat16
    scale: Tensor | None,  # [B, N, G]
    bits: int,
    group_size: int,
    shape: Sequence[int],
    perm: Sequence[int],
    batch_dims: int,
    row_dims: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``scale · table[code]`` in the parameter's shape, contiguous."""
    layout = WeightLayout(tuple(shape), tuple(perm), batch_dims, row_dims)
    unpacked = unpack_codes(codes, bits, layout.matrix_shape[2])
    value = decode_codebook(unpacked, table, scale, group_size, dtype)
    return layout.from_matrix(value).contiguous()


@composite("scales_of_codes(Tensor codes, Tensor steps, Tensor mean) -> Tensor")
def _scales_of_codes(
    codes: Tensor,  # [B, N, G] float8_e4m3fn
    steps: Tensor,  # [ceil(B·N·G / 256)] float32
    mean: Tensor,  # [] float32
) -> Tensor:
    """Return ``max(mean + step · code, 0)`` in bfloat16: scales that were quantized themselves."""
    flat = codes.to(torch.float32).reshape(-1)
    wide = steps.unsqueeze(-1).expand(-1, 256).reshape(-1)[: flat.shape[0]]
    return (flat * wide + mean).clamp_min(0).to(torch.bfloat16).reshape(codes.shape)


@composite(
    "codebook_embedding(Tensor indices, Tensor codes, Tensor table, Tensor? scale, int bits, int group_size,"
    " int columns, ScalarType dtype) -> Tensor"
)
def _codebook_embedding(
    indices: Tensor,  # [...] int32 or int64
    codes: Tensor,  # [1, V, packed_width(columns, bits)] uint8
    table: Tensor,  # [1, 1, 2**bits] float32 or [1, V, 2**bits] bfloat16
    scale: Tensor | None,  # [1, V, G]
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the rows ``[..., columns]`` of the dequantized table of embeddings."""
    unpacked = unpack_codes(F.embedding(indices, codes[0]), bits, columns)
    tables = F.embedding(indices, table[0]) if table.dtype == torch.bfloat16 else table[0]
    scales = None if scale is None else F.embedding(indices, scale[0])
    return decode_codebook(unpacked, tables, scales, group_size, dtype)
