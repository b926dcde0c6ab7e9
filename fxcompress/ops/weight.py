"""``fxcompress::dequantize_…weight``: codes to a dense, parameter-shaped tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.formats.floating import decode_float
from fxcompress.formats.integer import decode_rows
from fxcompress.formats.packing import unpack_codes
from fxcompress.forms.layout import WeightLayout
from fxcompress.forms.terms import WeightTerm
from fxcompress.ops._library import composite

__all__ = ["dequantize_weight"]


@composite(
    "dequantize_weight(Tensor codes, Tensor scale, Tensor? zero, int bits, int group_size, SymInt[] shape,"
    " int[] perm, int batch_dims, int row_dims, ScalarType dtype) -> Tensor"
)
def _dequantize_weight(
    codes: Tensor,  # [B, N, packed_width(K, bits)] uint8
    scale: Tensor,  # [B, N, G] or [B, 1, 1]
    zero: Tensor | None,  # uint8 like scale
    bits: int,
    group_size: int,
    shape: Sequence[int],
    perm: Sequence[int],
    batch_dims: int,
    row_dims: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``scale · (code − zero)`` in the parameter's shape, contiguous."""
    layout = WeightLayout(tuple(shape), tuple(perm), batch_dims, row_dims)
    unpacked = unpack_codes(codes, bits, layout.matrix_shape[2])
    value = layout.from_matrix(decode_rows(unpacked, scale, zero, bits, group_size, dtype))
    # A graph captured with the (contiguous) parameter may take views of it that strides must allow.
    return value.contiguous()


@composite(
    "dequantize_float_weight(Tensor codes, Tensor scale, int block_rows, int block_columns, SymInt[] shape,"
    " int[] perm, int batch_dims, int row_dims, ScalarType dtype) -> Tensor"
)
def _dequantize_float_weight(
    codes: Tensor,  # [B, N, K] float8
    scale: Tensor,  # [B, N / block_rows, K / block_columns] float32
    block_rows: int,
    block_columns: int,
    shape: Sequence[int],
    perm: Sequence[int],
    batch_dims: int,
    row_dims: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``scale · code`` in the parameter's shape, contiguous."""
    layout = WeightLayout(tuple(shape), tuple(perm), batch_dims, row_dims)
    return layout.from_matrix(decode_float(codes, scale, block_rows, block_columns, dtype)).contiguous()


def dequantize_weight(term: WeightTerm, dtype: torch.dtype) -> Tensor:
    """Dequantize a weight term.

    Args:
        term: The packed weight.
        dtype: Floating dtype of the result; products are computed in float32 (float64 if asked for).

    Returns:
        Contiguous tensor of shape ``term.parameter_shape``.
    """
    return term.dense(dtype)
