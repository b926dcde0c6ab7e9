"""The rewritten graph computes what the reference interpreter computes, for every part of a form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.apply import apply_state
from fxcompress.calibration.walk import Plan, Walk
from fxcompress.capture.export import capture_model
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState, Edit, SetActivation, SetTransform, SetWeight
from fxcompress.errors import BackendError
from fxcompress.form_inputs import form_tensor
from fxcompress.formats.integer import IntFormat, quantize_to_term
from fxcompress.forms import DynamicPerToken, Scale, Shift, WeightLayout
from tests.passes.models import Language

WIDTH = 6


class Pair(nn.Module):
    """Two linear layers of one input, with and without bias, and one in another spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 5, bias=False)
        self.turned = nn.Parameter(torch.randn(WIDTH, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.one(x), self.two(x), x @ self.turned


def reference(program: Program, state: CompressionState, *inputs: Any) -> list[Any]:
    plan = Plan(program)
    walk = Walk(plan, [inputs])
    for _ in plan.blocks:
        walk.advance(state)
    return walk.outputs()[0]


def rewritten(program: Program, state: CompressionState, *inputs: Any) -> tuple[list[Any], list[str]]:
    """Outputs of the rewritten graph and the ops it has."""
    applied = apply_state(program, state)
    given = dict(zip(program.inputs, inputs, strict=True))
    values = []
    for node in applied.module.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in applied.form_inputs:
            values.append(form_tensor(state, applied.form_inputs[node.name]))
        else:
            name = program.weight_of.get(node.name)
            values.append(given[node.name] if name is None else state.weight(name))
    with torch.no_grad():
        found = applied.module(*values)
    ops = [str(node.target) for node in applied.module.graph.nodes if node.op == "call_function"]
    return list(found), ops


def check(program: Program, edits: list[Edit], *inputs: Any) -> list[str]:
    """Apply edits both ways and compare; something must have changed. Returns the ops of the new graph."""
    state = CompressionState(program.weights)
    before = reference(program, state, *inputs)
    for edit in edits:
        state.apply(edit, "test")
    expected = reference(program, state, *inputs)
    found, ops = rewritten(program, state, *inputs)
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
        assert one.dtype == two.dtype
    assert any(not torch.equal(one, two) for one, two in zip(before, expected, strict=True))
    return ops


def quantized(program: Program, name: str) -> SetWeight:
    weight = program.weights[name]
    layout = WeightLayout.rows(tuple(weight.shape))
    return SetWeight(name, (quantize_to_term(weight, layout, IntFormat(8, True, 0)),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", [False, True])
def test_transforms_and_biases_of_products(dtype: torch.dtype, terms: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, WIDTH, dtype=dtype)
    program = capture_model(Pair().to(dtype).eval(), (x,))
    edits: list[Edit] = []
    for name, rows in (("one.weight", 4), ("two.weight", 5)):
        transform = (Shift(torch.arange(6.0)), Scale(torch.tensor([2.0, 1, 4, 1, 0.5, 1])))
        edits.append(SetTransform(name, transform, bias=torch.arange(float(rows), dtype=torch.float64)))
        if terms:
            edits.append(quantized(program, name))
    ops = check(program, edits, x)
    assert ops.count("aten.mul.Tensor") == 1, "sites that transform one input alike share the result"


def test_different_transforms_are_not_shared() -> None:
    x = torch.randn(2, 3, WIDTH)
    program = capture_model(Pair().eval(), (x,))
    edits: list[Edit] = [
        SetTransform(name, (Scale(torch.full((WIDTH,), factor)),))
        for name, factor in (("one.weight", 2.0), ("two.weight", 3.0), ("turned", 2.0))
    ]
    assert check(program, edits, x).count("aten.mul.Tensor") == 2


def test_a_transform_comes_before_the_quantizer() -> None:
    x = torch.randn(2, 3, WIDTH) * torch.tensor([1.0, 1, 1, 1, 1, 100])
    program = capture_model(Pair().eval(), (x,))
    factor = torch.tensor([1.0, 1, 1, 1, 1, 0.01])
    edits: list[Edit] = [
        SetTransform("one.weight", (Scale(factor),)),
        SetActivation("one.weight", DynamicPerToken()),
    ]
    check(program, edits, x)


@pytest.mark.parametrize("terms", [False, True])
def test_a_table_that_is_looked_up_and_multiplied_with(terms: bool) -> None:
    ids = torch.arange(12).reshape(2, 6)
    program = capture_model(Language(tied=True).eval(), (ids,))
    edits: list[Edit] = [SetTransform("table.weight", (Scale(torch.linspace(0.5, 3, 20)),))]
    if terms:
        edits.append(quantized(program, "table.weight"))
    check(program, edits, ids)


def test_a_bias_that_cannot_be_added_is_an_error() -> None:
    x = torch.randn(2, 3, 8)
    program = capture_model(nn.Conv1d(3, 4, 2, bias=False).eval(), (x,))
    state = CompressionState(program.weights)
    state.apply(SetTransform("weight", bias=torch.zeros(4)), "test")
    with pytest.raises(BackendError, match="weight: a conv site without a bias cannot be given one"):
        apply_state(program, state)


@pytest.mark.parametrize("turned", [False, True])
def test_a_use_without_an_input_reads_the_parameter_itself(turned: bool) -> None:
    """A graph compiled later may use a weight in ways that the one the recipe saw did not."""

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(WIDTH, 4) if turned else torch.randn(4, WIDTH))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ (self.matrix if turned else self.matrix.t()), self.matrix.abs().sum(0)

    model = Penalised()
    program = capture_model(model, (torch.randn(2, WIDTH),))
    factor = torch.rand(WIDTH) + 0.5
    value = model.matrix.detach() / (factor[:, None] if turned else factor)
    layout = WeightLayout((WIDTH, 4), (1, 0)) if turned else WeightLayout.rows((4, WIDTH))
    term = quantize_to_term(value, layout, IntFormat(8, True, 0))
    state = CompressionState(program.weights)
    for edit in (SetWeight("matrix", (term,)), SetTransform("matrix", (Scale(factor),))):
        state.apply(edit, "test")
    x = torch.randn(3, WIDTH)
    (product, total), _ = rewritten(program, state, x)
    wanted_product, wanted_total = model(x)
    torch.testing.assert_close(product, wanted_product, rtol=0.05, atol=0.05)
    torch.testing.assert_close(total, wanted_total, rtol=0.02, atol=0.02)
    state.apply(SetTransform("matrix", (Shift(factor),)), "test")
    with pytest.raises(BackendError, match=r"matrix: .*cannot be undone.*\n?.*"):
        apply_state(program, state)


def test_one_view_for_both_kinds_of_use_is_an_error() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, WIDTH))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            turned = self.matrix.t()
            return torch.einsum("bk,kn->bn", x, turned), turned.abs().sum()

    program = capture_model(Both().eval(), (torch.randn(2, WIDTH),))
    state = CompressionState(program.weights)
    state.apply(quantized(program, "matrix"), "test")
    state.apply(SetTransform("matrix", (Scale(torch.rand(WIDTH) + 0.5),)), "test")
    with pytest.raises(BackendError, match=r"matrix: .*cannot be undone"):
        apply_state(program, state)
