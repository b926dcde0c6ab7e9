"""Kernels made of ATen, and their layouts, against the reference value of a form over random shapes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.backends.cpu.kernel_types import Kernel, LinearSpec, QuantizedInput
from fxcompress.backends.cpu.kernels import ATEN_KERNELS, Int4Unpacked
from fxcompress.backends.cpu.layouts import INT4_BLOCKED, INT8_ROWS, int4_layout_is_known, unpack_int4_blocked
from fxcompress.formats.integer import IntFormat, quantize_to_term
from fxcompress.forms import QuantizedWeight, WeightLayout

ops = torch.ops.fxcompress


def weight(rows: int, columns: int, fmt: IntFormat, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(rows, columns, generator=generator)
    return quantize_to_term(value, WeightLayout.rows(value.shape), fmt)


def spec_of(terms: list[QuantizedWeight], tokens: int | None, activation: str | None) -> LinearSpec:
    return LinearSpec(
        bits=terms[0].bits,
        symmetric=terms[0].symmetric,
        group_size=terms[0].group_size,
        rows=sum(term.shape[0] for term in terms),
        columns=terms[0].shape[1],
        activation=activation,
        tokens=tokens,
        dtype=torch.float32,
    )


def run(
    kernel: Kernel, terms: list[QuantizedWeight], x: Tensor, quantized: QuantizedInput | None = None
) -> Tensor:
    activation = None if quantized is None else ("dynamic" if quantized.zero is None else "static")
    spec = spec_of(terms, x.numel() // x.shape[-1], activation)
    return kernel.run(x, quantized, kernel.layout.pack(terms), spec)


def reference(terms: list[QuantizedWeight], x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, torch.cat([term.dense(torch.float32) for term in terms]))


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm().clamp(min=1e-6))


shapes = st.tuples(st.integers(1, 70), st.integers(1, 90), st.integers(8, 300))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(5, 8), st.booleans())
def test_int8_row_kernels(shape: tuple[int, int, int], bits: int, symmetric: bool) -> None:
    tokens, rows, columns = shape
    terms = [
        weight(rows, columns, IntFormat(bits, symmetric, 0)),
        weight(3, columns, IntFormat(bits, symmetric, 0), 1),
    ]
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2))
    for kernel in ATEN_KERNELS:
        spec = spec_of(terms, tokens, None)
        if kernel.layout is INT8_ROWS and kernel.refuses(spec) is None:
            assert relative(run(kernel, terms, x), reference(terms, x)) < 0.02  # bfloat16 activations


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(2, 4), st.booleans(), st.sampled_from([0, 32, 64, 128, 256]))
def test_int4_kernels(shape: tuple[int, int, int], bits: int, symmetric: bool, group: int) -> None:
    tokens, rows, columns = shape
    fmt = IntFormat(bits, symmetric, group if group <= columns else 0)
    terms = [weight(rows, columns, fmt), weight(5, columns, fmt, 1)]
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(2))
    for kernel in ATEN_KERNELS:
        served = [kernel.refuses(spec_of(terms, number, None)) is None for number in (1, None)]
        if kernel.layout is INT4_BLOCKED and any(served):
            assert relative(run(kernel, terms, x), reference(terms, x)) < 0.03


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(2, 8), st.booleans(), st.booleans())
def test_integer_product_is_exact(
    shape: tuple[int, int, int], bits: int, symmetric: bool, static: bool
) -> None:
    tokens, rows, columns = shape
    terms = [weight(rows, columns, IntFormat(bits, symmetric, 0))]
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)) + 0.3
    if static:
        scale, zero = torch.tensor(0.03), torch.tensor(-7, dtype=torch.int32)
        codes = ops.quantize_per_tensor(x, scale, zero, 8)
        quantized = QuantizedInput(codes, scale, zero, x)
        seen = ops.dequantize_activation(codes, scale, zero, torch.float32)
    else:
        codes, scale = ops.quantize_per_token(x, 8)
        quantized = QuantizedInput(codes, scale, None, x)
        seen = ops.dequantize_activation(codes, scale, None, torch.float32)
    kernel = next(kernel for kernel in ATEN_KERNELS if kernel.name == "oneDNN int8×int8")
    assert relative(run(kernel, terms, seen, quantized), reference(terms, seen)) < 1e-5


def test_unpacking_inverts_the_machines_layout_or_is_refused() -> None:
    codes = torch.randint(0, 16, (192, 96), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    inverts = torch.equal(unpack_int4_blocked(packed, 192).int(), codes)
    assert int4_layout_is_known() == inverts
    spec = spec_of([weight(8, 64, IntFormat(4, False, 64))], None, None)
    assert (Int4Unpacked().refuses(spec) is None) == inverts
