"""The layout of CUDA's sparse tensor cores, against known codes and torch's own conversion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from fxcompress.errors import FormatError
from fxcompress.formats.semi_structured import decode_semi_structured, encode_semi_structured


def two_of_four(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns // 4, 4, generator=draw).topk(2, dim=-1).indices
    values = torch.randint(1, 100, (rows, columns // 4, 2), generator=draw).to(dtype)
    return torch.zeros(rows, columns // 4, 4, dtype=dtype).scatter(2, keep, values).flatten(1)


def test_codes_of_known_rows() -> None:
    last = torch.tensor([0.0, 0.0, 3.0, 4.0]).half().repeat(32, 16)
    assert set(encode_semi_structured(last)[1].flatten().tolist()) == {-4370}  # every quad 0011
    row = torch.tensor([1.0, 0, 2, 0, 0, 3, 4, 0, 5, 6, 0, 0, 0, 0, 7, 8]).half()
    values, meta = encode_semi_structured(row.repeat(32, 2))
    assert values[0, :8].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert set(meta.flatten().tolist()) == {-7016}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [(32, 64), (64, 128), (160, 192)])
def test_the_layout_is_that_of_torch(dtype: torch.dtype, size: tuple[int, int]) -> None:
    matrix = two_of_four(*size, dtype, seed=sum(size))
    values, meta = encode_semi_structured(matrix)
    expected_values, expected_meta = sparse_semi_structured_from_dense_cutlass(matrix)
    assert torch.equal(values, expected_values)
    assert torch.equal(meta, expected_meta)
    assert torch.equal(decode_semi_structured(values, meta), matrix)
    share = (values.nbytes + meta.nbytes) / matrix.nbytes
    assert share == (0.625 if dtype == torch.int8 else 0.5625)


def test_quads_that_are_not_full_are_filled_with_zeros() -> None:
    matrix = torch.zeros(32, 32, dtype=torch.bfloat16)
    matrix[3, 5] = 2.0
    values, meta = encode_semi_structured(matrix)
    assert torch.equal(decode_semi_structured(values, meta), matrix)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(32, 32).half(), "groups of 4 inputs have more than 2"),
        (torch.zeros(32, 32), "values of torch.float32 have no such layout"),
        (torch.zeros(16, 32).half(), "no multiple of 32 × 32"),
        (torch.zeros(32, 32, dtype=torch.int8), "no multiple of 32 × 64"),
    ],
)
def test_what_has_no_such_layout_is_refused(matrix: Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        encode_semi_structured(matrix)
