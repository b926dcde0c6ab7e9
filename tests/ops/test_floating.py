from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats import FloatFormat, quantize_to_float_term
from fxcompress.forms import ActivationQuantizer, FloatPerTensor, FloatPerToken, WeightLayout
from fxcompress.ops import apply_quantizer
from tests.ops.graphs import compiled, decomposed, decomposes_export, operators, pre_dispatch

QUANTIZERS = [FloatPerToken(), FloatPerToken("e5m2"), FloatPerTensor("e4m3", torch.tensor(0.01))]


def test_known_tokens() -> None:
    x = torch.tensor([[448.0, 1.0625, -0.3], [896.0, 2.125, -0.6], [0.0, 0.0, 0.0]])
    assert apply_quantizer(x, FloatPerToken()).tolist() == [
        [448.0, 1.0, -0.3125],
        [896.0, 2.0, -0.625],
        [0.0, 0.0, 0.0],
    ]


def test_the_scale_has_a_floor() -> None:
    _, scale = torch.ops.fxcompress.quantize_float_per_token(torch.tensor([[1e-6, 0.0]]), torch.float8_e4m3fn)
    assert scale.item() == pytest.approx(1 / (448 * 512))


def test_calibrated_scales_saturate() -> None:
    quantizer = FloatPerTensor("e4m3", torch.tensor(0.5))
    x = torch.tensor([100.0, 224.0, 225.0, -1e9, math.inf, math.nan])
    value = apply_quantizer(x, quantizer)
    assert value[:5].tolist() == [pytest.approx(104.0, abs=8), 224.0, 224.0, -224.0, 224.0]
    assert math.isnan(value[5])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_fault_in_a_token_stays_visible_and_stays_there(bad: float) -> None:
    x = torch.tensor([[1.0, bad, 2.0], [1.0, 0.5, 2.0]])
    value = apply_quantizer(x, FloatPerToken())
    assert bool(value[0].isnan().any())
    assert torch.equal(value[1], apply_quantizer(x[1:], FloatPerToken())[0])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    kind=st.sampled_from(["e4m3", "e5m2"]),
    seed=st.integers(0, 1000),
)
def test_relative_error_of_normal_values(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    value = apply_quantizer(x, FloatPerToken(kind))
    assert value.dtype == dtype
    half_step = 2.0**-4 if kind == "e4m3" else 2.0**-3
    scale = x.double().abs().amax(-1, keepdim=True).clamp_min(1 / 512) / FloatFormat(kind).largest
    least = scale * float(torch.finfo(FloatFormat(kind).dtype).smallest_normal)
    bound = torch.maximum(x.double().abs(), least) * half_step * 1.01
    assert bool(((value - x).double().abs() <= bound).all())


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_one_node_per_step_that_decomposes(quantizer: ActivationQuantizer) -> None:
    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        if isinstance(quantizer, FloatPerTensor) and tensors:
            return apply_quantizer(x, dataclasses.replace(quantizer, scale=tensors[0]))
        return apply_quantizer(x, quantizer)

    x = torch.randn(3, 5)
    given = (x, *quantizer.tensors().values())
    assert len(operators(pre_dispatch(function, given).graph)) == 2
    assert operators(decomposed(function, given).graph) == []
    assert torch.equal(compiled(function, dynamic=True)(x), function(x))


@decomposes_export
def test_exported_programs_run_and_decompose() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return apply_quantizer(x, FloatPerToken()) @ term.dense(torch.float32).T

    term = quantize_to_float_term(torch.randn(4, 5), WeightLayout.rows((4, 5)), FloatFormat())
    x = torch.randn(3, 5)
    program = torch.export.export(Layer(), (x,))
    expected = Layer()(x)
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(program.run_decompositions().module()(x), expected)


def test_kinds_and_scales_are_checked() -> None:
    with pytest.raises(FormatError, match="format_kind='e2m1'"):
        FloatPerToken("e2m1")
    with pytest.raises(FormatError, match=r"scale is \(1,\)"):
        FloatPerTensor("e4m3", torch.ones(1))


def test_quantizers_know_whether_they_are_alike() -> None:
    a, b = FloatPerTensor("e4m3", torch.tensor(1.0)), FloatPerTensor("e4m3", torch.tensor(1.0))
    assert a.same_as(b)
    assert not a.same_as(FloatPerTensor("e4m3", torch.tensor(2.0)))
    assert not a.same_as(FloatPerTensor("e5m2", torch.tensor(1.0)))
    assert not a.same_as(FloatPerToken())
    assert FloatPerToken().same_as(FloatPerToken())
