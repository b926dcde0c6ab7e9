from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.errors import FormatError
from fxcompress.formats import IntFormat, decode, quantize_to_term, unpack_codes
from fxcompress.forms import QuantizedWeight, WeightLayout
from fxcompress.ops import dequantize_weight
from tests.ops.graphs import compiled, decomposed, decomposes_export, dynamo, operators, pre_dispatch

LAYOUTS = {
    "linear": WeightLayout((12, 20), (0, 1)),
    "addmm": WeightLayout((20, 12), (1, 0)),
    "conv": WeightLayout((6, 4, 3, 3), (0, 1, 2, 3)),
    "conv_transposed": WeightLayout((4, 6, 3, 3), (1, 0, 2, 3)),
    "experts": WeightLayout((3, 20, 12), (0, 2, 1), batch_dims=1),
}
FORMATS = {
    "w4 groups": IntFormat(4, False, 4),
    "w4 partial groups": IntFormat(4, False, 8),
    "w3 symmetric": IntFormat(3, True, 8),
    "w8 rows": IntFormat(8, True, 0),
    "w5 rows": IntFormat(5, False, 0),
    "w2 matrix": IntFormat(2, False, -1),
}


def term_of(layout: WeightLayout, fmt: IntFormat) -> QuantizedWeight:
    w = torch.randn(layout.shape, generator=torch.Generator().manual_seed(0))
    return quantize_to_term(w, layout, fmt)


def tensors_of(term: QuantizedWeight) -> tuple[Tensor, ...]:
    return (term.codes, term.scale) if term.zero is None else (term.codes, term.scale, term.zero)


def call(term: QuantizedWeight, dtype: torch.dtype, codes: Tensor, scale: Tensor, *zero: Tensor) -> Tensor:
    layout = term.layout
    value: Tensor = torch.ops.fxcompress.dequantize_weight(
        *(codes, scale, zero[0] if zero else None, term.bits, term.group_size),
        *(layout.shape, layout.perm, layout.batch_dims, layout.row_dims, dtype),
    )
    return value


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_is_decode_in_the_shape_of_the_parameter(layout: WeightLayout, fmt: IntFormat) -> None:
    term = term_of(layout, fmt)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        value = dequantize_weight(term, dtype)
        codes = unpack_codes(term.codes, fmt.bits, layout.matrix_shape[2])
        expected = layout.from_matrix(decode(codes, term.scale, term.zero, fmt, dtype))
        assert value.dtype == dtype
        assert value.is_contiguous()
        assert torch.equal(value, expected)


def test_known_value() -> None:
    w = torch.tensor([[-1.0, -0.5, 0.2, 2.0]], dtype=torch.float64)
    term = quantize_to_term(w, WeightLayout.rows(w.shape), IntFormat(4, False, 0))
    expected = torch.tensor([[-1.0, -0.4, 0.2, 2.0]])
    torch.testing.assert_close(dequantize_weight(term, torch.float32), expected)


@pytest.mark.parametrize("name", ["w4 partial groups", "w3 symmetric", "w2 matrix"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_stays_one_node_until_decomposed(layout: WeightLayout, name: str) -> None:
    term = term_of(layout, FORMATS[name])
    expected = dequantize_weight(term, torch.float32)

    def function(*parts: Tensor) -> Tensor:
        return call(term, torch.float32, *parts)

    parts = tensors_of(term)
    for trace in (pre_dispatch, dynamo):
        graph_module = trace(function, parts)
        assert operators(graph_module.graph) == ["dequantize_weight"]
    assert torch.equal(pre_dispatch(function, parts)(*parts), expected)
    plain = decomposed(function, parts)
    assert operators(plain.graph) == []
    assert torch.equal(plain(*parts), expected)


class Linear(nn.Module):
    """A linear layer on packed weights."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, term: QuantizedWeight) -> None:
        super().__init__()
        self.term = term
        for name, tensor in zip(("codes", "scale", "zero"), tensors_of(term), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, call(self.term, x.dtype, self.codes, self.scale, self.zero))


@pytest.fixture
def linear() -> Linear:
    return Linear(term_of(LAYOUTS["linear"], FORMATS["w4 partial groups"]))


@pytest.mark.parametrize("strict", [False, True])
@decomposes_export
def test_export_with_dynamic_shapes(linear: Linear, strict: bool) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 1: length},)
    program = torch.export.export(linear, (torch.randn(2, 3, 20),), dynamic_shapes=shapes, strict=strict)
    assert operators(program.graph) == ["dequantize_weight"]
    assert operators(program.run_decompositions().graph) == []
    x = torch.randn(5, 7, 20)
    assert torch.equal(program.module()(x), linear(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_the_same_values(linear: Linear, dynamic: bool) -> None:
    function = compiled(linear, dynamic)
    for shape in ((2, 3, 20), (5, 20), (1, 7, 20)):
        x = torch.randn(shape)
        torch.testing.assert_close(function(x), linear(x), rtol=0, atol=0)


def test_gradients_reach_the_input_of_the_product(linear: Linear) -> None:
    x = torch.randn(4, 20, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, linear.term.dense(torch.float32).sum(0).expand(4, 20))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_opcheck(fmt: IntFormat) -> None:
    term = term_of(LAYOUTS["addmm"], fmt)
    layout = term.layout
    torch.library.opcheck(
        torch.ops.fxcompress.dequantize_weight.default,
        (
            *(term.codes, term.scale, term.zero, term.bits, term.group_size),
            *(layout.shape, layout.perm, layout.batch_dims, layout.row_dims, torch.float32),
        ),
    )


def test_codes_of_another_width_are_refused() -> None:
    term = term_of(LAYOUTS["linear"], FORMATS["w4 groups"])
    with pytest.raises(FormatError, match="rows have 9 bytes, 20 codes of 4 bits need 10"):
        call(term, torch.float32, term.codes[..., 1:], *tensors_of(term)[1:])
