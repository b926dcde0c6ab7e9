"""Where the entries of a sparse matrix lie: bitmaps, positions within N:M groups, and compressed rows.

Each form is turned into *slots*: for every element of ``[B, N, K]`` the number of the stored value it takes,
or −1. So one gather gives the dense matrix, whatever the form and whatever is stored.

Only tensor operations with static shapes are used, so that decoding traces and compiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats.packing import pack_codes, packed_width, unpack_codes

__all__ = [
    "bitmap_slots",
    "csr_index",
    "csr_slots",
    "index_bits",
    "nm_columns",
    "nm_slots",
    "pack_bits",
    "pack_nm",
    "unpack_bits",
]


def pack_bits(mask: Tensor) -> Tensor:
    """``[..., K]`` bool to ``[..., ceil(K / 8)]`` uint8; column i is bit ``i % 8`` of byte ``i // 8``.

    Example:
        >>> pack_bits(torch.tensor([True, False, True])).tolist()
        [5]
    """
    bits = F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    packed: Tensor = (bits << places).sum(-1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`pack_bits`: ``[..., columns]`` bool."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> places) & 1).flatten(-2)[..., :columns].to(torch.bool)


def bitmap_slots(packed: Tensor, columns: int) -> Tensor:
    """Slots ``[B, N, K]`` int64 of a bitmap ``[B, N, ceil(K / 8)]``; values in row-major order."""
    mask = unpack_bits(packed, columns)
    count = mask.flatten().cumsum(0).view(mask.shape)
    return torch.where(mask, count - 1, -1)


def index_bits(m: int) -> int:
    """Bits of a stored position within a group of ``m``, at least 2 (the narrowest codes there are)."""
    return max(2, (m - 1).bit_length())


def nm_columns(keep: Tensor, n: int, m: int) -> Tensor:
    """Columns ``[..., G, n]`` int64 within their groups of the kept entries of ``[..., K]``, ascending.

    A group that keeps fewer is filled with its first free columns, which may lie behind K; their values are
    zero.

    Raises:
        FormatError: a group keeps more than ``n``.
    """
    groups = F.pad(keep, (0, -keep.shape[-1] % m)).unflatten(-1, (-1, m))
    over = int((groups.sum(-1) > n).sum())
    if over:
        raise FormatError(f"{over} groups of {m} inputs have more than {n} entries.")
    first: Tensor = (~groups).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :n].sort(dim=-1).values
    return first


def pack_nm(columns: Tensor, m: int) -> Tensor:
    """``[B, N, G, n]`` of :func:`nm_columns` to ``[B, N, packed]`` uint8, a bit stream per row."""
    return pack_codes(columns.flatten(-2).to(torch.uint8), index_bits(m))


def nm_slots(packed: Tensor, n: int, m: int, columns: int) -> Tensor:
    """Slots ``[B, N, columns]`` int64 of packed positions; values ``[B, N, G, n]`` in row-major order."""
    groups = -(-columns // m)
    within = unpack_codes(packed, index_bits(m), groups * n).unflatten(-1, (groups, n)).to(torch.int64)
    number = torch.arange(within.numel(), device=packed.device).view(within.shape)
    empty = torch.full((*within.shape[:-1], m), -1, dtype=torch.int64, device=packed.device)
    return empty.scatter(-1, within, number).flatten(-2)[..., :columns]


def nm_bytes(rows: int, columns: int, n: int, m: int) -> int:
    """Bytes of the packed positions of ``rows`` rows."""
    return rows * packed_width(-(-columns // m) * n, index_bits(m))


def csr_index(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Row pointers ``[B · N + 1]`` int32 and columns ``[nnz]`` (int16 up to 32768 columns, else int32).

    Args:
        keep: ``[B, N, K]`` bool.
    """
    rows = keep.flatten(0, 1)
    pointers = F.pad(rows.sum(-1).cumsum(0), (1, 0)).to(torch.int32)
    narrow = torch.int16 if keep.shape[-1] <= 1 << 15 else torch.int32
    return pointers, rows.nonzero()[:, 1].to(narrow)


def csr_slots(pointers: Tensor, columns: Tensor, batch: int, width: int) -> Tensor:
    """Slots ``[batch, N, width]`` int64 of compressed rows."""
    rows = pointers.shape[0] - 1
    number = torch.arange(columns.shape[0], device=pointers.device)
    row = torch.searchsorted(pointers.to(torch.int64), number, right=True) - 1
    place = row * width + columns.to(torch.int64)
    empty = torch.full((rows * width,), -1, dtype=torch.int64, device=pointers.device)
    return empty.scatter(0, place, number).view(batch, rows // batch, width)
