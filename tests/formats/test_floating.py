from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats import FloatFormat, quantize_to_float_term
from fxcompress.formats.floating import encode_float
from fxcompress.forms import Component, FloatWeight, WeightLayout, from_spec

SHAPES = ((1, 0), (0, 0), (128, 128), (3, 5), (1, 4), (4, 1))


def term_of(w: Tensor, fmt: FloatFormat) -> FloatWeight:
    return quantize_to_float_term(w, WeightLayout.rows(w.shape), fmt)


def every_code(fmt: FloatFormat) -> Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).float()
    return values[torch.isfinite(values)].unique()


# Largest, smallest normal and smallest denormal values of the OCP specification.
@pytest.mark.parametrize(
    ("kind", "largest", "normal", "denormal"),
    [("e4m3", 448.0, 2.0**-6, 2.0**-9), ("e5m2", 57344.0, 2.0**-14, 2.0**-16)],
)
def test_limits_of_the_formats(kind: str, largest: float, normal: float, denormal: float) -> None:
    fmt = FloatFormat(kind)
    one = torch.ones(())
    x = torch.tensor(
        [largest, largest * 4, -largest * 4, normal, denormal, denormal / 2, denormal * 0.51, 0.0]
    )
    q = encode_float(x, one, fmt.dtype).float()
    # Half of the least denormal ties to even, zero; a little more is the least denormal.
    assert q.tolist() == [largest, largest, -largest, normal, denormal, 0.0, denormal, 0.0]
    assert fmt.largest == largest
    step = normal * (2.0**-3 if kind == "e4m3" else 2.0**-2)
    assert step == denormal  # denormals continue the grid of the first normal numbers
    bad = encode_float(torch.tensor([math.nan, math.inf, -math.inf]), one, fmt.dtype).float()
    assert math.isnan(bad[0])
    assert bad[1:].tolist() == [largest, -largest]


def test_known_codes_with_a_scale_of_one() -> None:
    w = torch.tensor([[448.0, 240.0, 1.0, 1.0625, 1.1875, -0.3]])  # 1.0625 ties down, 1.1875 ties up
    term = term_of(w, FloatFormat())
    assert term.scale.tolist() == [[[1.0]]]
    assert term.dense(torch.float32).tolist() == [[448.0, 240.0, 1.0, 1.0, 1.25, -0.3125]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 11),
    block=st.sampled_from(SHAPES),
    kind=st.sampled_from(["e4m3", "e5m2"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    exponent=st.integers(-3, 3),
    seed=st.integers(0, 1000),
)
def test_every_value_is_the_nearest_of_its_block(
    rows: int, columns: int, block: tuple[int, int], kind: str, dtype: Any, exponent: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    w = (torch.randn(rows, columns, generator=draw) * 10.0**exponent).to(dtype)
    fmt = FloatFormat(kind, *block)
    term = term_of(w, fmt)
    grid = every_code(fmt)
    for i in range(rows):
        for j in range(columns):
            b = (i // block[0] if block[0] else 0, j // block[1] if block[1] else 0)
            scale = float(term.scale[0, b[0], b[1]])
            around = w[
                b[0] * block[0] : (b[0] + 1) * block[0] if block[0] else rows,
                b[1] * block[1] : (b[1] + 1) * block[1] if block[1] else columns,
            ]
            assert scale == pytest.approx(float(around.abs().max()) / fmt.largest, rel=1e-6)
            found = float(term.codes[0, i, j].float())
            best = float((grid - float(w[i, j]) / scale).abs().min())
            assert abs(found - float(w[i, j]) / scale) <= best + 1e-6 * max(
                1.0, abs(found)
            )  # the division is float32


@pytest.mark.parametrize("block", SHAPES)
def test_shapes_bytes_and_round_trip(block: tuple[int, int]) -> None:
    w = torch.randn(130, 257)
    fmt = FloatFormat("e4m3", *block)
    term = term_of(w, fmt)
    assert tuple(term.scale.shape) == fmt.scale_shape(1, 130, 257)
    assert term.nbytes * 8 == pytest.approx(fmt.bits_per_weight(130, 257) * w.numel())
    tensors: dict[str, Tensor] = {}
    spec = term.to_spec("t", tensors)
    again: Component = from_spec(spec, tensors)
    assert isinstance(again, FloatWeight)
    assert torch.equal(again.dense(torch.float32), term.dense(torch.float32))
    error = (term.dense(torch.float32) - w).norm() / w.norm()
    assert float(error) < 0.035


def test_dead_rows_and_tiny_weights_stay_finite() -> None:
    w = torch.tensor([[0.0, 0.0], [1e-40, 0.0], [3.0, -1.0]])
    value = term_of(w, FloatFormat()).dense(torch.float32)
    assert value.tolist() == [[0.0, 0.0], [0.0, 0.0], [3.0, pytest.approx(-1.0, rel=0.04)]]
    assert term_of(torch.zeros(2, 2), FloatFormat()).scale.flatten().tolist() == [1.0, 1.0]


def test_a_transposed_layout_keeps_its_rows() -> None:
    w = torch.randn(6, 4)  # stored [K, N]
    layout = WeightLayout((6, 4), (1, 0))
    term = quantize_to_float_term(w, layout, FloatFormat())
    other = quantize_to_float_term(w.T.contiguous(), WeightLayout.rows((4, 6)), FloatFormat())
    assert torch.equal(term.dense(torch.float32), other.dense(torch.float32).T)
    assert term.dense(torch.float32).is_contiguous()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(FormatError, match="NaN, inf"):
        term_of(torch.tensor([[1.0, value]]), FloatFormat())
    with pytest.raises(FormatError, match="range of float32"):
        term_of(torch.tensor([[1e300]], dtype=torch.float64), FloatFormat())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "e3m4"}, "kind='e3m4'"),
        ({"block_rows": -1}, "block_rows=-1"),
        ({"block_columns": 1.5}, "1.5"),
    ],
)
def test_options_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        FloatFormat(**arguments)


def test_fields_are_checked() -> None:
    term = term_of(torch.randn(3, 4), FloatFormat())
    tensors: dict[str, Tensor] = {}
    spec = term.to_spec("t", tensors)
    with pytest.raises(FormatError, match=r"FloatWeight: codes is \(1, 3, 4\) torch.float8_e4m3fn"):
        FloatWeight(**{**{f: getattr(term, f) for f in spec if f != "kind"}, "format_kind": "e5m2"})
    with pytest.raises(FormatError, match=r"FloatWeight: scale is \(1, 3, 1\)"):
        FloatWeight(**{**{f: getattr(term, f) for f in spec if f != "kind"}, "block_rows": 0})
