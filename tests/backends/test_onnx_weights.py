"""Layouts of quantized weights in ONNX hold exactly the values of the terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.backends.onnx.operators import ops
from fxcompress.backends.onnx.weights import Packed, block_size, blocks_of, codes_of, container, signed_matrix
from fxcompress.formats.integer import IntFormat, quantize_to_term
from fxcompress.forms import QuantizedWeight, WeightLayout

FORMATS = st.builds(
    IntFormat,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([-1, 0, 5, 16, 32, 48, 64]),
)


def packed_of(term: QuantizedWeight) -> Packed:
    return Packed(term.codes, term.scale, term.zero, term.bits, term.group_size, term.layout)


def term_of(layout: WeightLayout, fmt: IntFormat, seed: int = 0) -> QuantizedWeight:
    weight = torch.randn(layout.shape, generator=torch.Generator().manual_seed(seed))
    return quantize_to_term(weight, layout, fmt)


@settings(deadline=None, max_examples=60)
@given(fmt=FORMATS, rows=st.integers(1, 9), columns=st.integers(64, 150))
def test_blocks(fmt: IntFormat, rows: int, columns: int) -> None:
    term = term_of(WeightLayout.rows((rows, columns)), fmt)
    packed = packed_of(term)
    block = block_size(packed)
    if fmt.group_size == 5:
        assert block is None, "no power of two divides the group"
        return
    assert block is not None
    laid_out = blocks_of(packed, block)
    assert laid_out.bits == container(fmt.bits)
    assert (laid_out.zeros is None) == (fmt.symmetric and fmt.bits in (2, 4, 8))
    arguments = (laid_out.data, laid_out.scales, laid_out.zeros)
    found = ops.gather_nbits(torch.arange(rows), *arguments, laid_out.bits, block, columns)
    assert torch.equal(found, term.dense(torch.float32))
    x = torch.randn(3, columns)
    y = ops.matmul_nbits(x, *arguments, None, columns, rows, laid_out.bits, block, 4)
    torch.testing.assert_close(y, x @ term.dense(torch.float32).t())


LAYOUTS: dict[str, Any] = {
    "linear": WeightLayout.rows((6, 70)),
    "transposed linear": WeightLayout((70, 6), (1, 0)),
    "convolution": WeightLayout.rows((4, 6, 3, 3)),
    "transposed convolution": WeightLayout((6, 4, 3, 3), (1, 0, 2, 3)),
    "experts": WeightLayout((3, 70, 5), (0, 2, 1), batch_dims=1),
    "two dimensions of outputs": WeightLayout((2, 3, 70), (0, 1, 2), row_dims=2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@settings(deadline=None, max_examples=15)
@given(fmt=FORMATS)
def test_codes_for_dequantize_linear(layout: WeightLayout, fmt: IntFormat) -> None:
    if fmt.group_size > layout.matrix_shape[2]:
        return
    term = term_of(layout, fmt)
    found = codes_of(packed_of(term))
    value = ops.dequantize_linear(found.codes, found.scale, found.zero, found.axis, found.block)
    if found.block:
        value = layout.from_matrix(value)
    assert torch.equal(value, term.dense(torch.float32))
    if found.four_bits:
        low, high = (-8, 7) if found.codes.dtype == torch.int8 else (0, 15)
        assert low <= int(found.codes.min())
        assert int(found.codes.max()) <= high


@settings(deadline=None, max_examples=30)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), per_matrix=st.booleans())
def test_signed_codes_of_rows(bits: int, symmetric: bool, per_matrix: bool) -> None:
    term = term_of(WeightLayout.rows((5, 33)), IntFormat(bits, symmetric, -1 if per_matrix else 0))
    matrix = signed_matrix(packed_of(term))
    assert matrix is not None
    codes, scale, zero = matrix
    value = codes.float() if zero is None else codes.float() - zero.float().unsqueeze(1)
    assert torch.equal(value * scale.unsqueeze(1), term.dense(torch.float32))
    q = torch.randint(-127, 128, (4, 33), dtype=torch.int8)
    product = ops.matmul_integer(ops.counted(q), codes.t(), zero).float()
    assert torch.equal(product, q.float() @ value.t())
    assert torch.equal(ops.matmul_scaled(ops.counted(q), codes.t(), scale, zero), product * scale)


@settings(deadline=None, max_examples=30)
@given(bits=st.integers(5, 8), tokens=st.integers(1, 4), width=st.integers(1, 40), power=st.integers(-30, 30))
def test_codes_of_tokens_are_those_of_the_reference(bits: int, tokens: int, width: int, power: int) -> None:
    x = torch.randn(tokens, width) * 10.0**power
    x[0] = 0
    q, scale = ops.token_codes(x, bits)
    expected, steps = torch.ops.fxcompress.quantize_per_token(x, bits)
    assert torch.equal(q, ops.counted(expected))
    assert torch.equal(scale[1:], steps[1:])
    assert (q[0] == 128).all()


def test_grouped_codes_are_no_signed_matrix() -> None:
    assert signed_matrix(packed_of(term_of(WeightLayout.rows((4, 64)), IntFormat(8, True, 32)))) is None
