from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxcompress.errors import FormatError
from fxcompress.formats import pack_codes, packed_width, unpack_codes

BITS = range(2, 9)
PROPERTY = settings(deadline=None)  # times vary with the load of the machine


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """The definition, one bit at a time: the row is one little-endian integer."""
    total = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(total.to_bytes(packed_width(len(codes), bits), "little"))


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("columns", "bits", "width"),
    [(0, 3, 0), (1, 2, 1), (5, 3, 2), (8, 3, 3), (9, 3, 4), (7, 8, 7), (3, 4, 2)],
)
def test_width(columns: int, bits: int, width: int) -> None:
    assert packed_width(columns, bits) == width


@pytest.mark.parametrize(
    ("codes", "bits", "packed"),
    [
        ([1, 2, 3], 4, [0x21, 0x03]),
        ([3, 0, 2, 1, 1], 2, [0b01_10_00_11, 0b01]),
        ([1, 2, 3, 4, 5, 6, 7, 0], 3, [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
        ([200, 7], 8, [200, 7]),
    ],
)
def test_known_bytes(codes: list[int], bits: int, packed: list[int]) -> None:
    assert bit_stream(codes, bits) == packed
    assert pack_codes(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == packed


@PROPERTY
@given(bits=st.integers(2, 8), data=st.data())
def test_is_the_bit_stream(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=37))
    packed = pack_codes(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == bit_stream(codes, bits)
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 31, 64, 65])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0, 4)])
def test_round_trip_in_any_shape(bits: int, columns: int, leading: tuple[int, ...]) -> None:
    codes = random_codes((*leading, columns), bits)
    packed = pack_codes(codes, bits)
    assert packed.shape == (*leading, packed_width(columns, bits))
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_round_trip_of_strided_codes(bits: int) -> None:
    codes = random_codes((11, 6), bits).t()
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 11), codes)


@pytest.mark.parametrize("bits", BITS)
def test_higher_bits_are_dropped(bits: int) -> None:
    codes = random_codes((13,), 8)
    expected = codes & ((1 << bits) - 1)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 13), expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_traces_with_a_dynamic_number_of_rows(bits: int) -> None:
    def round_trip(codes: Tensor) -> Tensor:
        return unpack_codes(pack_codes(codes, bits), bits, 19)

    traced = make_fx(round_trip, tracing_mode="symbolic")(random_codes((5, 19), bits))
    codes = random_codes((8, 19), bits, seed=1)
    assert torch.equal(traced(codes), codes)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_refuses_other_widths(bits: int) -> None:
    codes = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(FormatError, match="expected 2…8"):
        pack_codes(codes, bits)
    with pytest.raises(FormatError, match="expected 2…8"):
        unpack_codes(codes, bits, 4)


def test_refuses_other_dtypes() -> None:
    with pytest.raises(FormatError, match=r"torch.int32, expected torch.uint8"):
        pack_codes(torch.zeros(4, dtype=torch.int32), 4)
    with pytest.raises(FormatError, match=r"torch.int8, expected torch.uint8"):
        unpack_codes(torch.zeros(4, dtype=torch.int8), 4, 8)


def test_refuses_rows_of_another_length() -> None:
    with pytest.raises(FormatError, match="rows have 4 bytes, 9 codes of 4 bits need 5"):
        unpack_codes(torch.zeros(2, 4, dtype=torch.uint8), 4, 9)
