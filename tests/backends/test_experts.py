"""Products with several matrices: the operator against its reference, and models with experts as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress
from fxcompress.backends.cpu import native
from fxcompress.backends.cpu.experts import experts_layout, matrices
from fxcompress.backends.cpu.generator import KernelForm
from fxcompress.backends.cpu.isa import best_isa, processor_flags
from fxcompress.backends.cpu.native import ensure_kernel
from fxcompress.backends.cpu.tiled import kernel_group, tiled_layout
from fxcompress.formats import IntFormat, quantize_to_term
from fxcompress.forms import DynamicPerToken, QuantizedWeight, WeightLayout
from fxcompress.ops import apply_quantizer
from tests.backends.kernel_cases import error
from tests.zoo import entry

BEST = best_isa(processor_flags())
FORMS = {None: KernelForm("linear", 4, True, True, None, 0, "float32", "float32")}
FORMS["dynamic"] = KernelForm("linear", 4, True, True, "dynamic", 8, "float32", "float32")


def random_term(count: int, rows: int, columns: int) -> QuantizedWeight:
    w = torch.randn(count, columns, rows)
    return quantize_to_term(
        w, WeightLayout(tuple(w.shape), (0, 2, 1), batch_dims=1), IntFormat(4, False, min(16, columns))
    )


def call(term: QuantizedWeight, x: Tensor, ends: Tensor, form: KernelForm, function: Any = None) -> Tensor:
    assert ensure_kernel(form, BEST) is None
    packed = experts_layout(tiled_layout(BEST)).pack([term])
    run = function or torch.ops.fxcompress_cpu.experts
    y: Tensor = run(
        *(x, packed["weight"], packed["scale"], packed["zero"], packed["total"], ends, None, None),
        form.call_number(BEST, kernel_group(term.group_size, x.shape[1])),
    )
    return y


def reference(term: QuantizedWeight, x: Tensor, ends: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], term.shape[2], dtype=torch.float64)
    start = 0
    for weight, end in zip(term.dense(torch.float64), ends.tolist(), strict=True):
        y[start:end] = x[start:end].double() @ weight
        start = max(start, end)
    return y


@pytest.mark.parametrize("activation", [None, "dynamic"])
def test_rows_meet_their_expert(activation: str | None) -> None:
    @settings(max_examples=25, deadline=None)
    @given(
        counts=st.lists(st.sampled_from([0, 0, 1, 2, 5, 20]), min_size=1, max_size=6),
        rows=st.integers(1, 40),
        columns=st.integers(1, 70),
        behind=st.integers(0, 3),
    )
    def run(counts: list[int], rows: int, columns: int, behind: int) -> None:
        torch.manual_seed(len(counts) + rows)
        term = random_term(len(counts), rows, columns)
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        x = torch.randn(sum(counts) + behind, columns)
        seen = x if activation is None else apply_quantizer(x, DynamicPerToken(8))
        expected = reference(term, seen, ends)
        for function in (None, native.python_experts):
            y = call(term, x, ends, FORMS[activation], function)
            assert y.shape == expected.shape
            assert (y[sum(counts) :] == 0).all()
            assert not sum(counts) or error(y, expected) < 4e-6

    run()


def test_experts_without_rows_are_not_read() -> None:
    """Their scales are NaN: any use of them would show."""
    term = random_term(4, 24, 32)
    packed = experts_layout(tiled_layout(BEST)).pack([term])
    packed["scale"][[0, 2]] = float("nan")
    x, ends = torch.randn(5, 32), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    y = torch.ops.fxcompress_cpu.experts(
        *(x, packed["weight"], packed["scale"], packed["zero"], packed["total"], ends, None, None),
        FORMS[None].call_number(BEST, 16),
    )
    assert error(y, reference(term, x, ends)) < 4e-6


def test_strided_rows() -> None:
    term = random_term(2, 24, 32)
    wide, ends = torch.randn(5, 64), torch.tensor([2, 5], dtype=torch.int32)
    for x in (wide[:, :32], wide[:, ::2]):
        assert error(call(term, x, ends, FORMS[None]), reference(term, x.contiguous(), ends)) < 4e-6


def test_matrices_are_those_of_the_term() -> None:
    term = random_term(3, 5, 20)
    for matrix, dense in zip(matrices(term), term.dense(torch.float32), strict=True):
        assert torch.equal(matrix.dense(torch.float32), dense.T)
    one = quantize_to_term(
        torch.randn(3, 20, 5), WeightLayout((3, 20, 5), (0, 2, 1), 1), IntFormat(8, True, -1)
    )
    assert torch.equal(matrices(one)[2].dense(torch.float32), one.dense(torch.float32)[2].T)


class Batched(nn.Module):
    """A product of batches with a matrix each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 40, 24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


@pytest.mark.parametrize(
    "recipe",
    [
        [{"quantize-weights": {"bits": 4, "group_size": 8}}],
        [{"quantize-weights": {"bits": 8}}, "quantize-activations"],
        [{"quantize-codebook": {"group_size": 8}}],
    ],
    ids=["w4a16", "w8a8", "nf4"],
)
def test_batched_products(recipe: Any) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 7, 40)
    small = fxcompress.compress(Batched().eval(), recipe, example_inputs=(x,), progress=False, verify="off")
    compiled = small(x)
    assert list(small.explain()) == ["weight"]
    assert "only experts with tokens" in small.explain()["weight"]
    small.set_backend("eager")
    torch.testing.assert_close(compiled, small(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("model", "recipe"),
    [("mixtral", "w8a8"), ("gpt-oss", [{"quantize-weights": {"bits": 4, "group_size": 8}}])],
)
def test_decoders_with_experts(model: str, recipe: Any) -> None:
    torch._dynamo.reset()
    small = fxcompress.compress(entry(model).build(), recipe, verify="off", progress=False)
    inputs = entry(model).tensors(1, 5)
    with torch.no_grad():
        compiled = small(**inputs).logits
        names = [name for name in small.explain() if "experts" in name and "bias" not in name]
        assert names
        assert all("only experts with tokens" in small.explain()[name] for name in names)
        small.set_backend("eager")
        expected = small(**inputs).logits
    torch.testing.assert_close(compiled, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    torch._dynamo.reset()
