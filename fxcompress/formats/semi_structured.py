"""2:4 matrices as CUDA's sparse tensor cores take them: values, and metadata in the order CUTLASS wants.

A quad of inputs with kept positions p < q has the code ``p | q << 2``; codes fill an integer from the lowest
bits, four quads in 16 bits for 2-byte values, eight in 32 bits for bytes. Then rows are interleaved within
groups of 32 (16), off-diagonal integers of every 2 × 2 block change places, and pairs of columns are stored
column by column. It is the layout of ``torch.sparse.to_sparse_semi_structured`` with CUTLASS. That of
cuSPARSELt is undocumented beyond "one buffer", and made by that library only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats.sparse_index import nm_columns

__all__ = ["decode_semi_structured", "encode_semi_structured", "semi_structured_problem"]

_KINDS = {  # bytes of a value → dtype of the metadata, quads in it, rows of a group, interleave
    2: (torch.int16, 4, 32, 4),
    1: (torch.int32, 8, 16, 2),
}


def semi_structured_problem(rows: int, columns: int, dtype: torch.dtype) -> str | None:
    """Why a matrix cannot have this layout, or None."""
    kind = _KINDS.get(dtype.itemsize)
    if kind is None:
        return f"values of {dtype} have no such layout (2-byte floats and int8 have)"
    quads = kind[1]
    if rows % 32 or columns % (8 * quads):
        return f"{rows} × {columns} is no multiple of 32 × {8 * quads}"
    return None


def encode_semi_structured(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compress a 2:4 matrix.

    Args:
        matrix: ``[N, K]`` float16, bfloat16 or int8, at most two of every four inputs not zero.

    Returns:
        ``values: [N, K / 2]`` and ``meta: [N, K / 16]`` int16 (bytes: ``[N, K / 32]`` int32), reordered.

    Raises:
        FormatError: sizes or dtype do not fit, or a quad has more than two entries.

    Example:
        >>> half = torch.tensor([0.0, 0.0, 1.0, 2.0]).half().repeat(32, 8)
        >>> values, meta = encode_semi_structured(half)
        >>> values.shape, int(meta[0, 0])
        (torch.Size([32, 16]), -4370)
    """
    problem = semi_structured_problem(matrix.shape[0], matrix.shape[1], matrix.dtype)
    if problem is not None:
        raise FormatError(f"semi-structured: {problem}.")
    kept = nm_columns(matrix != 0, 2, 4)  # [N, K/4, 2]
    values = matrix.unflatten(1, (-1, 4)).gather(2, kept).flatten(1)
    meta_dtype, quads, _, _ = _KINDS[matrix.dtype.itemsize]
    codes = (kept[..., 0] | kept[..., 1] << 2).unflatten(1, (-1, quads))
    shifts = 4 * torch.arange(quads, device=matrix.device)
    wide = (codes << shifts).sum(-1)  # [N, K / (4 · quads)], unsigned in int64
    limit = 1 << (4 * quads)
    signed = torch.where(wide >= limit // 2, wide - limit, wide).to(meta_dtype)
    place = _places(signed.shape[0], signed.shape[1], meta_dtype).to(matrix.device)
    meta = torch.empty_like(signed).flatten().scatter(0, place.flatten(), signed.flatten())
    return values.contiguous(), meta.view(signed.shape)


def decode_semi_structured(values: Tensor, meta: Tensor) -> Tensor:
    """The dense ``[N, K]`` of :func:`encode_semi_structured`."""
    rows = values.shape[0]
    quads = _KINDS[values.dtype.itemsize][1]
    place = _places(meta.shape[0], meta.shape[1], meta.dtype).to(values.device)
    plain = meta.flatten()[place.flatten()].view(meta.shape).to(torch.int64)
    shifts = 4 * torch.arange(quads, device=values.device)
    codes = (plain.unsqueeze(-1) >> shifts & 15).flatten(1)  # [N, K/4]
    kept = torch.stack([codes & 3, codes >> 2], dim=-1)
    dense = torch.zeros(*codes.shape, 4, dtype=values.dtype, device=values.device)
    return dense.scatter(2, kept, values.view(rows, -1, 2)).flatten(1)


def _places(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``[rows, columns]`` int64: where an integer of plain metadata goes in CUTLASS's order."""
    _, _, group, interleave = _KINDS[2 if dtype == torch.int16 else 1]
    r = torch.arange(rows)[:, None].expand(rows, columns)
    c = torch.arange(columns)[None].expand(rows, columns)
    row = r // group * group + r % 8 * interleave + r % group // 8
    # Of a 2 × 2 block, upper right and lower left change places.
    up = ((row % 2 == 0) & (c % 2 == 1)).to(torch.int64)
    down = ((row % 2 == 1) & (c % 2 == 0)).to(torch.int64)
    row, column = row + up - down, c - up + down
    return column // 2 * 2 * rows + row * 2 + column % 2
