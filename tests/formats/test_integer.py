from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats import (
    IntFormat,
    decode,
    encode,
    find_parameters,
    make_term,
    quantize_to_term,
    unpack_codes,
)
from fxcompress.formats import _ranges as ranges
from fxcompress.forms import WeightLayout
from tests.formats.cases import PROPERTY, formats, normal, round_trip, shapes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EXAMPLE = [-1.0, -0.5, 0.2, 2.0]


def per_column(per_group: Tensor, fmt: IntFormat, columns: int) -> Tensor:
    size = fmt.group_size if fmt.group_size > 0 else columns
    return per_group.repeat_interleave(size, dim=-1)[..., :columns]


# --- known answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [-1, 0])
def test_known_asymmetric(group_size: int) -> None:
    w = torch.tensor([[EXAMPLE]], dtype=torch.float64)
    fmt = IntFormat(bits=4, group_size=group_size)
    scale, zero = find_parameters(w, fmt)
    assert zero is not None
    assert scale.dtype == torch.float32
    assert zero.dtype == torch.uint8
    torch.testing.assert_close(scale, torch.full((1, 1, 1), 0.2))
    assert zero.tolist() == [[[5]]]
    codes = encode(w, scale, zero, fmt)
    assert codes.tolist() == [[[0, 3, 6, 15]]]
    expected = torch.tensor([[[-1.0, -0.4, 0.2, 2.0]]])
    torch.testing.assert_close(decode(codes, scale, zero, fmt, torch.float32), expected)


def test_known_symmetric() -> None:
    w = torch.tensor([[[-1.4, -0.5, 0.2, 2.0]]], dtype=torch.float64)
    fmt = IntFormat(bits=4, symmetric=True, group_size=0)
    scale, zero = find_parameters(w, fmt)
    assert zero is None
    torch.testing.assert_close(scale, torch.full((1, 1, 1), 2 / 7))
    assert encode(w, scale, zero, fmt).tolist() == [[[8 - 5, 8 - 2, 8 + 1, 8 + 7]]]


def test_known_eight_bit_channels() -> None:
    w = torch.tensor([[[127.0, -127.0, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]]])
    fmt = IntFormat(bits=8, symmetric=True, group_size=0)
    scale, zero = find_parameters(w, fmt)
    assert scale.flatten().tolist() == [1.0, 1.0]
    assert encode(w, scale, zero, fmt).tolist() == [[[255, 1, 128, 130], [128] * 4]]  # ties to even


def test_known_groups_with_a_partial_last_one() -> None:
    w = torch.tensor([[[1.0, 3.0, -6.0, 0.0, 12.0]]])
    fmt = IntFormat(bits=2, group_size=2)
    scale, zero = find_parameters(w, fmt)
    assert zero is not None
    assert scale.dtype == torch.bfloat16
    assert scale.tolist() == [[[1.0, 2.0, 4.0]]]
    assert zero.tolist() == [[[0, 3, 0]]]
    assert encode(w, scale, zero, fmt).tolist() == [[[1, 3, 0, 3, 3]]]
    assert torch.equal(round_trip(w, fmt, torch.float32), w)


def test_a_code_compensates_the_rounding_of_its_scale() -> None:
    w = torch.tensor([[[1.003 * i for i in range(256)]]])
    fmt = IntFormat(bits=8, group_size=256)
    scale, zero = find_parameters(w, fmt)
    assert scale.item() == 1.0  # 1.003 in bfloat16
    assert encode(w, scale, zero, fmt)[0, 0, 200].item() == 201  # 200.6, not the 200 of an unrounded scale


# --- the format ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, "4", None])
def test_refuses_bits(bits: object) -> None:
    with pytest.raises(FormatError, match="bits"):
        IntFormat(bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("group_size", [-2, 1.5, True, None])
def test_refuses_group_sizes(group_size: object) -> None:
    with pytest.raises(FormatError, match="group_size"):
        IntFormat(bits=4, group_size=group_size)  # type: ignore[arg-type]


def test_properties() -> None:
    fmt = IntFormat(bits=3, symmetric=True, group_size=32)
    assert (fmt.qmin, fmt.qmax, fmt.fixed_zero) == (1, 7, 4)
    assert (fmt.groups(64), fmt.groups(65), fmt.groups(1)) == (2, 3, 1)
    assert IntFormat(bits=3, group_size=0).groups(65) == 1
    assert fmt.scale_shape(2, 3, 65) == (2, 3, 3)
    assert IntFormat(bits=3, group_size=-1).scale_shape(2, 3, 65) == (2, 1, 1)


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        (IntFormat(4, False, 128), 4 + 24 / 128),
        (IntFormat(4, True, 64), 4 + 16 / 64),
        (IntFormat(8, True, 0), 8 + 32 / 256),
        (IntFormat(8, True, -1), 8 + 32 / (512 * 256)),
    ],
)
def test_bits_per_weight(fmt: IntFormat, expected: float) -> None:
    assert fmt.bits_per_weight(512, 256) == pytest.approx(expected)


@PROPERTY
@given(fmt=formats, shape=shapes)
def test_bits_per_weight_is_what_a_term_stores(fmt: IntFormat, shape: tuple[int, int, int]) -> None:
    _, rows, columns = shape
    w = normal((rows, max(columns, fmt.group_size)))
    term = quantize_to_term(w, WeightLayout.rows(w.shape), fmt)
    assert 8 * term.nbytes == pytest.approx(fmt.bits_per_weight(*w.shape) * w.numel())


# --- properties of rounding ------------------------------------------------------------------------------


@PROPERTY
@given(
    fmt=formats,
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-3, 3),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_error_bound(
    fmt: IntFormat, shape: tuple[int, int, int], dtype: torch.dtype, exponent: int, shift: float, seed: int
) -> None:
    w = ((normal(shape, seed, torch.float64) + shift) * 10.0**exponent).to(dtype)
    scale, zero = find_parameters(w, fmt)
    codes = encode(w, scale, zero, fmt)
    error = (decode(codes, scale, zero, fmt, torch.float64) - w.double()).abs()
    step = per_column(scale.double(), fmt, shape[-1]).expand(shape)
    # An unclamped code is the nearest one, but for ties that float32 cannot tell; a clamped one also pays for
    # the rounded zero-point and for what the stored scale lost in rounding.
    rounding = 2.0**-8 if fmt.group_size > 0 else 2.0**-20
    inner = (codes > fmt.qmin) & (codes < fmt.qmax)
    assert (error[inner] <= step[inner] * (0.5 + fmt.qmax * 2.0**-22)).all()
    assert (error <= step * (1 + fmt.qmax * rounding)).all()


@PROPERTY
@given(fmt=formats, shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_codes_and_parameters_are_in_range(
    fmt: IntFormat, shape: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    w = normal(shape, seed, dtype)
    scale, zero = find_parameters(w, fmt)
    codes = encode(w, scale, zero, fmt)
    assert scale.dtype == fmt.scale_dtype
    assert tuple(scale.shape) == fmt.scale_shape(*shape)
    assert (scale > 0).all()
    assert codes.dtype == torch.uint8
    assert codes.shape == w.shape
    assert int(codes.min()) >= fmt.qmin
    assert int(codes.max()) <= fmt.qmax
    assert (zero is None) == fmt.symmetric
    assert zero is None or (zero.shape == scale.shape and int(zero.max()) <= fmt.qmax)


@PROPERTY
@given(fmt=formats, shape=shapes, seed=st.integers(0, 1000), search=st.booleans())
def test_zero_is_exact(fmt: IntFormat, shape: tuple[int, int, int], seed: int, search: bool) -> None:
    w = normal(shape, seed)
    w[..., ::2] = 0
    assert (round_trip(w, fmt, search=search)[..., ::2] == 0).all()


@PROPERTY
@given(fmt=formats, shape=shapes, seed=st.integers(0, 1000))
def test_encode_inverts_decode(fmt: IntFormat, shape: tuple[int, int, int], seed: int) -> None:
    w = normal(shape, seed)
    scale, zero = find_parameters(w, fmt)
    codes = encode(w, scale, zero, fmt)
    again = encode(decode(codes, scale, zero, fmt, torch.float32), scale, zero, fmt)
    assert torch.equal(again, codes)


@PROPERTY
@given(fmt=formats, value=st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-3]), seed=st.integers(0, 5))
def test_constant_weights(fmt: IntFormat, value: float, seed: int) -> None:
    w = torch.full((2, 3, 11), value)
    relative = 2.0**-8 if fmt.group_size > 0 else 2.0**-20
    torch.testing.assert_close(round_trip(w, fmt), w.double(), rtol=relative, atol=0)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dead_rows_stay_zero_and_leave_others_alone(symmetric: bool, search: bool) -> None:
    fmt = IntFormat(bits=4, symmetric=symmetric, group_size=4)
    w = normal((1, 6, 10))
    w[0, [1, 4]] = 0
    result = round_trip(w, fmt, search=search)
    assert (result[0, [1, 4]] == 0).all()
    alive = [0, 2, 3, 5]
    assert torch.equal(result[:, alive], round_trip(w[:, alive], fmt, search=search))


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("group_size", [-1, 0, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", ["tiny", "subnormal", "huge"])
def test_extreme_magnitudes(
    magnitude: str, dtype: torch.dtype, bits: int, symmetric: bool, group_size: int, search: bool
) -> None:
    info = torch.finfo(dtype)
    largest = min(info.max, torch.finfo(torch.float32).max)
    size = {"tiny": info.tiny, "subnormal": info.smallest_normal * info.eps * 3, "huge": largest}[magnitude]
    signs = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(1, 2, 10)
    w = (signs * size).to(dtype)
    fmt = IntFormat(bits=bits, symmetric=symmetric, group_size=group_size)
    scale, zero = find_parameters(w, fmt, search=search)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    result = decode(encode(w, scale, zero, fmt), scale, zero, fmt, dtype)
    assert torch.isfinite(result).all()
    smallest = torch.finfo(fmt.scale_dtype).tiny
    bound = per_column(scale.double(), fmt, 10) * (1 + 2.0**-6 * fmt.qmax)
    assert search or ((result.double() - w.double()).abs() <= bound.clamp_min(smallest)).all()


def test_float64_beyond_float32_is_refused() -> None:
    w = torch.full((1, 1, 4), 1e300, dtype=torch.float64)
    with pytest.raises(FormatError, match="exceed the range of float32"):
        find_parameters(w, IntFormat(bits=4, group_size=0))


@PROPERTY
@given(fmt=formats, seed=st.integers(0, 100))
def test_batches_are_independent(fmt: IntFormat, seed: int) -> None:
    w = normal((3, 4, 9), seed) * torch.tensor([1.0, 100.0, 0.01]).reshape(3, 1, 1)
    together = round_trip(w, fmt)
    for i in range(3):
        assert torch.equal(together[i : i + 1], round_trip(w[i : i + 1], fmt))


def test_strided_weights() -> None:
    w = normal((2, 10, 7)).transpose(1, 2)
    fmt = IntFormat(bits=4, group_size=4)
    assert torch.equal(round_trip(w, fmt), round_trip(w.contiguous(), fmt))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_rounds_once(dtype: torch.dtype) -> None:
    w = normal((1, 4, 32))
    fmt = IntFormat(bits=4, group_size=16)
    scale, zero = find_parameters(w, fmt)
    codes = encode(w, scale, zero, fmt)
    exact = decode(codes, scale, zero, fmt, torch.float64)  # 8-bit times 5-bit significands: exact
    assert torch.equal(decode(codes, scale, zero, fmt, dtype), exact.to(dtype))


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal((2, 9, 13))
    importance = torch.rand(13, generator=torch.Generator().manual_seed(1))
    for fmt in (IntFormat(4, False, 5), IntFormat(4, True, 0), IntFormat(4, False, -1)):
        whole = round_trip(w, fmt, search=True, importance=importance)
        with monkeypatch.context() as patch:
            patch.setattr(ranges, "_CHUNK", 30)
            patch.setattr("fxcompress.formats.integer._CHUNK", 30)
            torch.testing.assert_close(round_trip(w, fmt, search=True, importance=importance), whole)


# --- terms -----------------------------------------------------------------------------------------------

LAYOUTS = {
    "linear": WeightLayout((6, 10), (0, 1)),
    "addmm": WeightLayout((10, 6), (1, 0)),
    "conv": WeightLayout((6, 2, 3, 3), (0, 1, 2, 3)),
    "conv_transposed": WeightLayout((2, 6, 3, 3), (1, 0, 2, 3)),
    "experts": WeightLayout((3, 10, 6), (0, 2, 1), batch_dims=1),
    "heads": WeightLayout((10, 2, 3), (1, 2, 0), row_dims=2),
}


@pytest.mark.parametrize("fmt", [IntFormat(4, False, 4), IntFormat(8, True, 0), IntFormat(3, False, -1)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_terms_of_every_layout(name: str, fmt: IntFormat) -> None:
    layout = LAYOUTS[name]
    w = normal(layout.shape)
    term = quantize_to_term(w, layout, fmt)
    assert term.layout == layout
    assert term.format == fmt
    assert term.parameter_shape == layout.shape
    expected = layout.from_matrix(round_trip(layout.to_matrix(w), fmt, torch.float32))
    dense = term.dense(torch.float32)
    assert torch.equal(dense, expected)
    assert dense.is_contiguous()


def test_a_parameter_that_requires_gradients() -> None:
    w = torch.nn.Parameter(normal((4, 8)))
    term = quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(bits=4, group_size=0), search=True)
    assert not any(tensor.requires_grad for tensor in term.tensors().values())


def test_group_beyond_the_row_is_refused_with_a_fix() -> None:
    w = normal((4, 8))
    with pytest.raises(FormatError, match=r"group_size=16 exceeds the 8 inputs.*Fix: use a smaller group"):
        quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(bits=4, group_size=16))


@pytest.mark.parametrize(
    "w", [torch.zeros(2, 3), torch.zeros(1, 0, 4), torch.zeros(1, 2, 2, dtype=torch.int64)]
)
def test_refuses_what_is_no_matrix(w: Tensor) -> None:
    fmt = IntFormat(bits=4, group_size=0)
    with pytest.raises(FormatError, match=r"expected a non-empty floating \[B, N, K\]"):
        find_parameters(w, fmt)
    with pytest.raises(FormatError, match=r"expected a non-empty floating \[B, N, K\]"):
        encode(w, torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.uint8), fmt)


def test_refuses_parts_that_do_not_belong_together() -> None:
    w, fmt = normal((1, 3, 8)), IntFormat(bits=4, group_size=4)
    scale, zero = find_parameters(w, fmt)
    assert zero is not None
    codes = encode(w, scale, zero, fmt)
    with pytest.raises(FormatError, match=r"scale has shape \(1, 3, 1\).*needs \(1, 3, 2\)"):
        encode(w, scale[..., :1], zero, fmt)
    with pytest.raises(FormatError, match="exactly when the format is asymmetric"):
        decode(codes, scale, None, fmt, torch.float32)
    with pytest.raises(FormatError, match=r"zero has shape .* torch.int32"):
        decode(codes, scale, zero.int(), fmt, torch.float32)
    with pytest.raises(FormatError, match=r"codes \(1, 3, 8\), expected \(1, 4, 8\)"):
        make_term(codes, scale, zero, WeightLayout.rows((4, 8)), fmt)


def test_make_term_refuses_scales_its_storage_would_change() -> None:
    w, fmt = normal((1, 3, 8)), IntFormat(bits=4, symmetric=True, group_size=4)
    scale, zero = find_parameters(w, fmt)
    codes = encode(w, scale, zero, fmt)
    layout = WeightLayout.rows((3, 8))
    term = make_term(codes, scale.float(), zero, layout, fmt)
    assert torch.equal(term.scale, scale)
    assert torch.equal(unpack_codes(term.codes, 4, 8), codes)
    with pytest.raises(FormatError, match=r"not exact in torch\.bfloat16"):
        make_term(codes, scale.float() * 1.001, zero, layout, fmt)
