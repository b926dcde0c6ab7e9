"""Where entries lie: every form gives back the matrix, at the bytes it claims."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats.sparse_index import (
    bitmap_slots,
    csr_index,
    csr_slots,
    index_bits,
    nm_columns,
    nm_slots,
    pack_bits,
    pack_nm,
    unpack_bits,
)

settings.register_profile("sparse", max_examples=30, deadline=None)
settings.load_profile("sparse")


def masks(batch: int, rows: int, columns: int, share: float, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(batch, rows, columns, generator=draw) < share


@given(
    st.integers(1, 2),
    st.integers(1, 5),
    st.integers(1, 37),
    st.floats(0, 1),
    st.integers(0, 1 << 16),
)
def test_bitmaps_and_compressed_rows_number_the_entries_in_order(
    batch: int, rows: int, columns: int, share: float, seed: int
) -> None:
    keep = masks(batch, rows, columns, share, seed)
    assert torch.equal(unpack_bits(pack_bits(keep), columns), keep)
    expected = torch.full(keep.shape, -1)
    expected[keep] = torch.arange(int(keep.sum()))
    assert torch.equal(bitmap_slots(pack_bits(keep), columns), expected)
    pointers, where = csr_index(keep)
    assert torch.equal(csr_slots(pointers, where, batch, columns), expected)


@given(
    st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (3, 5), (2, 16)]), st.integers(1, 40), st.integers(0, 99)
)
def test_positions_in_groups_give_back_the_matrix(pattern: tuple[int, int], columns: int, seed: int) -> None:
    n, m = pattern
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, 3, columns + (-columns % m), generator=draw)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    chosen = scores.unflatten(-1, (-1, m)).topk(n, dim=-1).indices
    keep = keep.unflatten(-1, (-1, m)).scatter(-1, chosen, True).flatten(-2)[..., :columns]
    keep &= torch.rand(keep.shape, generator=draw) < 0.8  # groups may hold fewer
    where = nm_columns(keep, n, m)
    assert bool((where[..., 1:] > where[..., :-1]).all())
    packed = pack_nm(where, m)
    assert packed.nbytes == 3 * -(-where[0, 0].numel() * index_bits(m) // 8)
    slots = nm_slots(packed, n, m, columns)
    values = torch.nn.functional.pad(scores[..., :columns].masked_fill(~keep, 0), (0, -columns % m))
    stored = values.unflatten(-1, (-1, m)).gather(-1, where).flatten()
    dense = torch.where(slots >= 0, stored[slots.clamp_min(0)], 0.0)
    assert torch.equal(dense, values[..., :columns])


def test_a_group_with_too_many_entries_is_refused() -> None:
    with pytest.raises(FormatError, match="1 groups of 4 inputs have more than 2"):
        nm_columns(torch.tensor([[[True, True, True, False]]]), 2, 4)
