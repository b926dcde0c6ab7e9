"""Tables of values: published ones, nearest codes, ranges."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import FormatError
from fxcompress.formats import CodebookFormat
from fxcompress.formats.codebook import (
    decode_codebook,
    encode_codebook,
    fixed_table,
    largest_magnitudes,
    representable,
)

NF4 = CodebookFormat(4, 8, per_row=False)


def test_nf4_is_made_of_normal_quantiles() -> None:
    """Seven below zero, eight above, evenly spaced in probability, over the largest."""
    inverse = statistics.NormalDist().inv_cdf
    outermost = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above = [inverse(0.5 + (outermost - 0.5) * i / 8) for i in range(1, 9)]
    below = [-inverse(0.5 + (outermost - 0.5) * i / 7) for i in range(7, 0, -1)]
    expected = torch.tensor([*below, 0.0, *above]) / above[-1]
    torch.testing.assert_close(fixed_table("nf4"), expected, rtol=0, atol=3e-7)


def test_fp4_is_e2m1() -> None:
    values = [(-1) ** s * (m / 2 if e == 0 else (1 + m / 2) * 2 ** (e - 1)) for s, e, m in _bits()]
    torch.testing.assert_close(fixed_table("fp4") * 6, torch.tensor(values))


def _bits() -> list[tuple[int, int, int]]:
    return [(code >> 3, code >> 1 & 3, code & 1) for code in range(16)]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_round_trip_is_idempotent_and_keeps_zero_and_the_largest(name: str) -> None:
    w = torch.randn(1, 5, 21)
    w[0, 0] = 0
    w[0, 1, 3] = 0
    table = fixed_table(name)[None, None]
    scale = largest_magnitudes(w, NF4)
    codes = encode_codebook(w, table, scale, 8)
    once = decode_codebook(codes, table[0], scale, 8, torch.float32)
    again = encode_codebook(once, table, scale, 8)
    assert torch.equal(decode_codebook(again, table[0], scale, 8, torch.float32), once)
    assert (once[0, 0] == 0).all()
    assert once[0, 1, 3] == 0
    top = w[..., :8].abs().amax(-1)
    torch.testing.assert_close(once[..., :8].abs().amax(-1), top, rtol=2**-8, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    group=st.one_of(st.none(), st.integers(0, 50)),
    per_row=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 99),
)
def test_every_code_is_the_nearest(
    bits: int,
    rows: int,
    columns: int,
    group: int | None,
    per_row: bool,
    dtype: torch.dtype,
    exponent: int,
    seed: int,
) -> None:
    fmt = CodebookFormat(bits, group, per_row)
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(2, rows, columns, generator=generator).double() * 2.0**exponent).to(dtype)
    if not w.isfinite().all():
        return
    table = torch.randn(fmt.table_shape(2, rows), generator=generator)
    scale = largest_magnitudes(w, fmt) if group is not None else None
    if scale is None:
        table = table * 2.0**exponent
    table = representable(table, dtype, fmt.table_dtype)
    size = group or 0
    codes = encode_codebook(w, table, scale, size)
    value = decode_codebook(codes, table if per_row else table[0], scale, size, torch.float64)
    assert value.to(dtype).isfinite().all()
    spread = torch.ones(2, rows, columns).double()
    if scale is not None:
        spread = scale.double().repeat_interleave(size or columns, dim=-1)[..., :columns]
    every = spread[..., None] * table.double()[..., None, :]  # [2, rows, columns, levels]
    best = (every - w.double()[..., None]).abs().amin(-1)
    top = every.abs().amax(-1) + w.double().abs()
    assert ((value - w.double()).abs() <= best + 1e-6 * top).all()  # comparisons are made in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_weights_do_not_overflow(dtype: torch.dtype) -> None:
    w = torch.full((1, 1, 8), torch.finfo(dtype).max, dtype=dtype)
    w[..., 4:] *= -1
    table = fixed_table("nf4")[None, None]
    scale = largest_magnitudes(w, NF4)
    value = decode_codebook(encode_codebook(w, table, scale, 8), table[0], scale, 8, dtype)
    assert value.isfinite().all()
    torch.testing.assert_close(value.double(), w.double(), rtol=0.01, atol=0)


def test_tiny_weights_keep_a_scale() -> None:
    w = torch.full((1, 1, 8), 1e-42)
    assert (largest_magnitudes(w, NF4) > 0).all()


def test_float64_out_of_range_is_refused() -> None:
    with pytest.raises(FormatError, match="exceed the range of float32"):
        largest_magnitudes(torch.full((1, 1, 8), 1e300, dtype=torch.float64), NF4)


@pytest.mark.parametrize(("bits", "group"), [(1, 8), (9, 8), (4, -1), (4, 2.0), (True, 8)])
def test_formats_are_checked(bits: int, group: int) -> None:
    with pytest.raises(FormatError, match="CodebookFormat"):
        CodebookFormat(bits, group, per_row=False)


def test_bits_per_weight() -> None:
    assert CodebookFormat(4, 64, per_row=False).bits_per_weight(512, 64) == 4 + 16 / 64 + 512 / (512 * 64)
    assert CodebookFormat(3, None, per_row=True).bits_per_weight(7, 128) == 3 + 8 * 16 / 128


def test_unknown_tables_are_refused() -> None:
    with pytest.raises(FormatError, match="'nf3' is unknown, expected nf4 or fp4"):
        fixed_table("nf3")
