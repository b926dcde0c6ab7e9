"""Unstructured sparsity in tiles for "load as sparse, compute as dense" kernels on GPUs.

A tile is 128 rows × 64 columns. Every entry is one 32-bit word: a 16-bit value in the low half, its place
``row · 64 + (column XOR (row mod 8) · 8)`` in the high half. The words of a tile are padded to a multiple of
four with zeros at places that hold none; ``offsets`` says where tiles begin, in units of four words, with one
entry more than tile ends (the form of Xia et al., 2024, "Flash-LLM"). Within a tile, words are ordered so
that runs of 32 meet distinct banks of shared memory as far as possible: place / 2 mod 32 is the bank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import FormatError

__all__ = ["COLUMNS", "ROWS", "decode_tiled", "encode_tiled", "places"]

ROWS, COLUMNS = 128, 64
_UNIT = 4  # words
_BANKS = 32


def places() -> Tensor:
    """``[128, 64]`` int64: the place of every element of a tile.

    Example:
        >>> places()[[1, 5, 127], [0, 17, 63]].tolist()
        [72, 377, 8135]
    """
    row, column = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)[None]
    return row * COLUMNS + (column ^ (row % 8 * 8))


def encode_tiled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Words and offsets of a matrix.

    Args:
        matrix: ``[N, K]`` float16 or bfloat16; padded with zeros to whole tiles (rows to multiples of 256).

    Returns:
        ``words: [W]`` int32 and ``offsets: [tiles + 2]`` int32.

    Raises:
        FormatError: values are not 16 bits wide.
    """
    if matrix.dim() != 2 or matrix.dtype not in (torch.float16, torch.bfloat16):
        raise FormatError(f"tiled: {tuple(matrix.shape)} {matrix.dtype}, expected a matrix of 16-bit floats.")
    rows, columns = matrix.shape
    padded = F.pad(matrix, (0, -columns % COLUMNS, 0, -rows % (2 * ROWS)))
    tiles = padded.unflatten(0, (-1, ROWS)).unflatten(2, (-1, COLUMNS)).transpose(1, 2).flatten(0, 1)
    place = places().flatten()
    words, offsets = [], [0]
    for tile in tiles.flatten(1):
        held = tile != 0
        chosen = held.nonzero().flatten()
        short = -chosen.numel() % _UNIT
        filled = torch.cat([chosen, (~held).nonzero().flatten()[:short]])
        ordered = filled[_bank_order(place[filled])]
        bits = tile[ordered].view(torch.int16).to(torch.int64) & 0xFFFF
        words.append(bits | place[ordered] << 16)
        offsets.append(offsets[-1] + filled.numel() // _UNIT)
    offsets.append(offsets[-1])
    joined = torch.cat(words) if words else torch.zeros(0, dtype=torch.int64)
    return joined.to(torch.int32), torch.tensor(offsets, dtype=torch.int32)


def _bank_order(place: Tensor) -> Tensor:
    """Order in which runs of 32 take one word of every bank, while there are such."""
    bank = place // 2 % _BANKS
    by_bank = torch.argsort(bank, stable=True)
    counts = torch.bincount(bank, minlength=_BANKS)
    start = counts.cumsum(0) - counts
    turn = torch.empty_like(by_bank)
    turn[by_bank] = torch.arange(by_bank.numel()) - start[bank[by_bank]]
    return torch.argsort(turn * _BANKS + bank, stable=True)


def decode_tiled(words: Tensor, offsets: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense ``[rows, columns]`` of 16-bit ``dtype``."""
    across, down = -(-columns // COLUMNS), -(-rows // (2 * ROWS)) * 2
    number = torch.arange(words.shape[0], device=words.device) // _UNIT
    tile = torch.searchsorted(offsets[:-1].to(torch.int64), number, right=True) - 1
    place = (words.to(torch.int64) >> 16) & 0xFFFF
    row, column = place // COLUMNS, place % COLUMNS
    column = column ^ (row % 8 * 8)
    target = ((tile // across) * ROWS + row) * (across * COLUMNS) + (tile % across) * COLUMNS + column
    bits = (words & 0xFFFF).to(torch.int16)
    empty = torch.zeros(down * ROWS * across * COLUMNS, dtype=torch.int16, device=words.device)
    dense = empty.scatter(0, target, bits).view(down * ROWS, across * COLUMNS)
    return dense[:rows, :columns].contiguous().view(dtype)
