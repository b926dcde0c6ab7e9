"""From a pruned weight to the sparse forms it can be stored in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxcompress.formats.packing import pack_codes, unpack_codes
from fxcompress.formats.semi_structured import encode_semi_structured, semi_structured_problem
from fxcompress.formats.sparse_index import csr_index, index_bits, nm_columns, pack_bits, pack_nm
from fxcompress.formats.tiled_sparse import encode_tiled
from fxcompress.forms import (
    BitmapIndex,
    CsrIndex,
    NmIndex,
    QuantizedWeight,
    SemiStructuredWeight,
    SparseIndex,
    SparseQuantizedWeight,
    SparseWeight,
    SparsityMask,
    TiledSparseWeight,
    WeightLayout,
    WeightTerm,
)


def sparse_forms(value: Tensor | QuantizedWeight, mask: SparsityMask) -> Iterator[WeightTerm]:
    """Every general form: N:M positions where the mask has a pattern, a bitmap, compressed rows.

    Args:
        value: The dense parameter, or its codes; zero where masked.
        mask: Its mask; entries that are zero without being masked are left out as well.
    """
    layout = mask.layout
    if isinstance(value, QuantizedWeight):
        entries = layout.to_matrix(value.dense(torch.float32)) != 0
        stored = unpack_codes(value.codes, value.bits, layout.matrix_shape[2])
    else:
        stored = layout.to_matrix(value.detach())
        entries = stored != 0
    if mask.m and mask.n * index_bits(mask.m) <= mask.m:  # more, and a bitmap is smaller
        yield _term(value, layout, *_nm(stored, entries, mask, value))
    yield _term(value, layout, BitmapIndex(pack_bits(entries)), stored[entries])
    yield _term(value, layout, CsrIndex(*csr_index(entries)), stored[entries])


def _nm(
    stored: Tensor, entries: Tensor, mask: SparsityMask, value: Tensor | QuantizedWeight
) -> tuple[SparseIndex, Tensor]:
    """Positions and the values at them; filled positions hold what stands for zero."""
    kept = nm_columns(entries, mask.n, mask.m)  # [B, N, G, n]
    padded = torch.nn.functional.pad(stored, (0, -stored.shape[-1] % mask.m))
    groups = padded.unflatten(-1, (-1, mask.m))
    return NmIndex(mask.n, mask.m, pack_nm(kept, mask.m)), groups.gather(-1, kept).flatten()


def _term(
    value: Tensor | QuantizedWeight, layout: WeightLayout, index: SparseIndex, stored: Tensor
) -> WeightTerm:
    if not stored.numel():  # a weight of zeros: terms hold at least one value
        stored = torch.zeros(1, dtype=stored.dtype)
    if not isinstance(value, QuantizedWeight):
        return SparseWeight(
            layout.shape, layout.perm, layout.batch_dims, layout.row_dims, index, stored.contiguous()
        )
    return SparseQuantizedWeight(
        bits=value.bits,
        symmetric=value.symmetric,
        group_size=value.group_size,
        shape=layout.shape,
        perm=layout.perm,
        batch_dims=layout.batch_dims,
        row_dims=layout.row_dims,
        index=index,
        stored=stored.numel(),
        codes=pack_codes(stored, value.bits),
        scale=value.scale,
        zero=value.zero,
    )


def semi_structured_form(value: Tensor, mask: SparsityMask) -> WeightTerm | str:
    """The layout of CUDA's sparse tensor cores, or why there is none."""
    layout = mask.layout
    if (mask.n, mask.m) != (2, 4):
        return f"it is {mask.describe()}, not 2:4"
    if len(layout.shape) != 2 or layout.batch_dims:
        return "it is no matrix"
    matrix = layout.to_matrix(value.detach())[0]
    problem = semi_structured_problem(matrix.shape[0], matrix.shape[1], matrix.dtype)
    if problem is not None:
        return problem
    return SemiStructuredWeight(layout.shape, layout.perm, *encode_semi_structured(matrix))


def tiled_form(value: Tensor, mask: SparsityMask) -> WeightTerm | str:
    """Tiles of 32-bit words, or why there are none."""
    layout = mask.layout
    if len(layout.shape) != 2 or layout.batch_dims:
        return "it is no matrix"
    if value.dtype not in (torch.float16, torch.bfloat16):
        return f"tiles hold 16-bit floats, and it is {value.dtype}"
    words, offsets = encode_tiled(layout.to_matrix(value.detach())[0])
    dtype = str(value.dtype).removeprefix("torch.")
    return TiledSparseWeight(layout.shape, layout.perm, dtype, words, offsets)
