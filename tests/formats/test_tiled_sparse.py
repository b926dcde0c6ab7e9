"""Tiles of 32-bit words."""

from __future__ import annotations

import pytest
import torch

from fxcompress.errors import FormatError
from fxcompress.formats.tiled_sparse import decode_tiled, encode_tiled, places


def test_places_of_known_elements() -> None:
    table = places()
    assert [int(table[r, c]) for r, c in ((1, 0), (5, 17), (127, 63))] == [72, 377, 8135]
    assert torch.equal(table.flatten().sort().values, torch.arange(128 * 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "share"), [(256, 64, 0.4), (300, 130, 0.1), (1, 1, 1.0), (7, 200, 0.0)]
)
def test_decoding_gives_back_the_matrix(dtype: torch.dtype, rows: int, columns: int, share: float) -> None:
    draw = torch.Generator().manual_seed(rows + columns)
    keep = torch.rand(rows, columns, generator=draw) < share
    matrix = torch.randn(rows, columns, generator=draw).to(dtype) * keep
    words, offsets = encode_tiled(matrix)
    assert torch.equal(decode_tiled(words, offsets, rows, columns, dtype), matrix)
    assert words.numel() % 4 == 0
    assert words.numel() == 4 * int(offsets[-1])
    assert offsets.numel() == -(-rows // 256) * 2 * -(-columns // 64) + 2


@pytest.mark.parametrize(("sparsity", "ratio"), [(0.5, 1.0), (0.75, 0.5)])
def test_bytes_beside_the_dense_matrix(sparsity: float, ratio: float) -> None:
    keep = torch.arange(256 * 128).view(256, 128) % 4 >= 4 * sparsity
    words, offsets = encode_tiled(keep.half())
    assert words.nbytes / keep.half().nbytes == ratio
    assert offsets.nbytes == 4 * (2 * 2 + 2)


def test_words_that_follow_each_other_lie_in_different_banks() -> None:
    words, _ = encode_tiled(torch.ones(256, 64).half())
    banks = (words.to(torch.int64) >> 16 & 0xFFFF) // 2 % 32
    assert all(run.unique().numel() == 32 for run in banks.view(-1, 32))


def test_only_16_bit_floats() -> None:
    with pytest.raises(FormatError, match="expected a matrix of 16-bit floats"):
        encode_tiled(torch.ones(2, 2))
