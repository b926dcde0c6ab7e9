from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress.errors import FormatError
from fxcompress.forms import ActivationQuantizer, DynamicPerToken, StaticPerTensor
from fxcompress.ops import apply_quantizer
from tests.ops.graphs import compiled, decomposed, decomposes_export, dynamo, operators, pre_dispatch

PROPERTY = settings(deadline=None)  # times vary with the load of the machine
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PER_TOKEN = ["quantize_per_token", "dequantize_activation"]
PER_TENSOR = ["quantize_per_tensor", "dequantize_activation"]


def per_token(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    q, scale = torch.ops.fxcompress.quantize_per_token(x, bits)
    return q, scale


def static(scale: float, zero: int = 0, bits: int = 8) -> StaticPerTensor:
    return StaticPerTensor(bits, torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- per token -------------------------------------------------------------------------------------------


def test_known_tokens() -> None:
    x = torch.tensor([[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0], [-2.54, 0.0, 1.27, 0.02]])
    q, scale = per_token(x)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, torch.tensor([[1.0], [1.0], [0.02]]))
    assert q.tolist() == [[127, -64, 0, 2], [0, 0, 0, 0], [-127, 0, 64, 1]]  # 63.5 and 0.5 tie to even


@PROPERTY
@given(
    bits=st.integers(2, 8),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-4, 3),
    seed=st.integers(0, 1000),
)
def test_per_token_error_bound(
    bits: int, shape: tuple[int, ...], dtype: torch.dtype, exponent: int, seed: int
) -> None:
    x = (normal(shape, seed, torch.float64) * 10.0**exponent).to(dtype)
    q, scale = per_token(x, bits)
    qmax = 2 ** (bits - 1) - 1
    assert q.shape == x.shape
    assert scale.shape == (*shape[:-1], 1)
    assert int(q.abs().max()) <= qmax
    error = (q.double() * scale.double() - x.double()).abs()
    assert (error <= scale.double() * (0.5 + 2.0**-15)).all()
    top = x.double().abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double() * qmax, torch.where(top == 0, qmax, top), rtol=1e-6, atol=0)


@PROPERTY
@given(bits=st.integers(2, 8), seed=st.integers(0, 1000))
def test_per_token_is_idempotent(bits: int, seed: int) -> None:
    q, scale = per_token(normal((3, 9), seed, torch.float32), bits)
    again, _ = per_token(q * scale, bits)
    assert torch.equal(again, q)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_tokens_stay_finite(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    largest = min(info.max, torch.finfo(torch.float32).max)
    x = torch.tensor([[largest, -largest / 3, 0], [info.tiny, 0, 0], [-0.0, 0, 0]], dtype=dtype)
    q, scale = per_token(x)
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()
    assert q[0].tolist() == [127, -42, 0]
    assert q[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_tokens_stay_visible_and_alone(dtype: torch.dtype, bad: float) -> None:
    x = normal((3, 5), 0, dtype)
    x[1, 2] = bad
    _, scale = per_token(x)
    assert not torch.isfinite(scale[1]).any()
    value = apply_quantizer(x, DynamicPerToken())
    assert not torch.isfinite(value[1, 2])
    assert torch.equal(value[[0, 2]], apply_quantizer(x[[0, 2]], DynamicPerToken()))


def test_no_tokens() -> None:
    q, scale = per_token(torch.zeros(2, 0, 5))
    assert q.shape == (2, 0, 5)
    assert scale.shape == (2, 0, 1)


# --- per tensor ------------------------------------------------------------------------------------------


def test_known_tensor() -> None:
    x = torch.tensor([-10.0, -0.25, 0.0, 0.25, 0.75, 100.0])
    quantizer = static(0.5, zero=-3, bits=4)
    q = torch.ops.fxcompress.quantize_per_tensor(x, quantizer.scale, quantizer.zero, 4)
    assert q.dtype == torch.int8
    assert q.tolist() == [-8, -3, -3, -3, -1, 7]
    assert apply_quantizer(x, quantizer).tolist() == [-2.5, 0.0, 0.0, 0.0, 1.0, 5.0]


@PROPERTY
@given(
    bits=st.integers(2, 8),
    zero=st.integers(-2, 1),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 0.037, 2.0]),
    seed=st.integers(0, 1000),
)
def test_per_tensor_error_bound(bits: int, zero: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    quantizer = static(scale, zero, bits)
    x = normal((4, 7), seed, dtype)
    q = torch.ops.fxcompress.quantize_per_tensor(x, quantizer.scale, quantizer.zero, bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = quantizer.scale.double()
    inside = x.double().clamp((low - zero) * step, (high - zero) * step)
    assert int(q.min()) >= low
    assert int(q.max()) <= high
    error = ((q.double() - zero) * step - inside).abs()
    assert (error <= step * (0.5 + 2.0**-10)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_is_exact(bits: int) -> None:
    x = torch.zeros(2, 3)
    for quantizer in (DynamicPerToken(bits), static(0.1, -1, bits), static(0.1, 1, bits)):
        assert torch.equal(apply_quantizer(x, quantizer), x)


# --- both ------------------------------------------------------------------------------------------------

QUANTIZERS: dict[str, tuple[ActivationQuantizer, list[str]]] = {
    "per token": (DynamicPerToken(8), PER_TOKEN),
    "per token, 4 bits": (DynamicPerToken(4), PER_TOKEN),
    "per tensor": (static(0.02, zero=5), PER_TENSOR),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_keeps_dtype_and_rounds_once(name: str, dtype: torch.dtype) -> None:
    quantizer, _ = QUANTIZERS[name]
    x = normal((3, 5), 0, dtype)
    value = apply_quantizer(x, quantizer)
    assert value.dtype == dtype
    if dtype != torch.float64:
        assert torch.equal(value, apply_quantizer(x.float(), quantizer).to(dtype))


def test_an_unknown_quantizer_is_refused() -> None:
    with pytest.raises(FormatError, match=r"ActivationQuantizer does not implement emit\(\)"):
        apply_quantizer(torch.zeros(2), ActivationQuantizer())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_stays_whole_until_decomposed(name: str) -> None:
    quantizer, expected = QUANTIZERS[name]

    def function(x: Tensor) -> Tensor:
        return apply_quantizer(x, quantizer)

    x, other = torch.randn(2, 3, 8), torch.randn(4, 5, 8)
    if isinstance(quantizer, DynamicPerToken):
        kept = pre_dispatch(function, (x,))
        assert operators(kept.graph) == expected
        assert torch.equal(kept(other), function(other))
        plain = decomposed(function, (x,))
        assert operators(plain.graph) == []
        assert torch.equal(plain(other), function(other))
    assert operators(dynamo(function, (x,)).graph) == expected


class Quantize(nn.Module):
    """A quantizer whose tensors are buffers."""

    scale: Tensor
    zero: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.bits = quantizer.bits if isinstance(quantizer, DynamicPerToken | StaticPerTensor) else 8
        self.dynamic = isinstance(quantizer, DynamicPerToken)
        for key, tensor in quantizer.tensors().items():
            self.register_buffer(key, tensor)

    def forward(self, x: Tensor) -> Tensor:
        if self.dynamic:
            return apply_quantizer(x, DynamicPerToken(self.bits))
        ops = torch.ops.fxcompress
        q = ops.quantize_per_tensor(x, self.scale, self.zero, self.bits)
        value: Tensor = ops.dequantize_activation(q, self.scale, self.zero, x.dtype)
        return value


@decomposes_export
@pytest.mark.parametrize("name", QUANTIZERS)
def test_export_with_dynamic_shapes(name: str) -> None:
    quantizer, expected = QUANTIZERS[name]
    module = Quantize(quantizer)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    program = torch.export.export(module, (torch.randn(2, 3, 8),), dynamic_shapes=shapes)
    assert operators(program.graph) == expected
    assert operators(program.run_decompositions().graph) == []
    x = torch.randn(4, 6, 8)
    assert torch.equal(program.module()(x), apply_quantizer(x, quantizer))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_compiles_to_the_same_values(name: str, dynamic: bool) -> None:
    quantizer, _ = QUANTIZERS[name]
    module = Quantize(quantizer)
    function = compiled(module, dynamic)
    for shape in ((2, 3, 8), (4, 6, 8)):
        x = torch.randn(shape)
        assert torch.equal(function(x), apply_quantizer(x, quantizer))


def test_opcheck() -> None:
    x = torch.randn(2, 3, 8)
    ops = torch.ops.fxcompress
    q, scale = ops.quantize_per_token(x, 8)
    tensor_scale, zero = torch.tensor(0.02), torch.tensor(5, dtype=torch.int32)
    torch.library.opcheck(ops.quantize_per_token.default, (x, 8))
    torch.library.opcheck(ops.quantize_per_tensor.default, (x, tensor_scale, zero, 8))
    torch.library.opcheck(ops.dequantize_activation.default, (q, scale, None, torch.float32))
    torch.library.opcheck(ops.dequantize_activation.default, (q, tensor_scale, zero, torch.bfloat16))
