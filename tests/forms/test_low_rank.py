from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcompress.ops  # noqa: F401
from fxcompress.apply import apply_state
from fxcompress.capture.export import capture_model
from fxcompress.edits import CompressionState, ReviseWeight, SetActivation, SetTransform, SetWeight
from fxcompress.errors import FormatError, RecipeError, WeightError
from fxcompress.formats import IntFormat
from fxcompress.formats.integer import quantize_to_term
from fxcompress.forms import (
    DenseWeight,
    DynamicPerToken,
    LowRank,
    Scale,
    SiteForm,
    WeightLayout,
    from_spec,
)

aten = torch.ops.aten


def pair(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)


def coded(matrix: Tensor, bits: int = 8, group: int = 0) -> Any:
    return quantize_to_term(matrix, WeightLayout.rows(matrix.shape), IntFormat(bits, True, group))


LAYOUTS = {
    "linear": WeightLayout((6, 10), (0, 1)),
    "transposed": WeightLayout((10, 6), (1, 0)),
    "convolution": WeightLayout((6, 5, 2, 1), (0, 1, 2, 3)),
    "transposed convolution": WeightLayout((5, 6, 2, 1), (1, 0, 2, 3)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_its_value_is_the_product_in_the_parameters_shape(layout: WeightLayout) -> None:
    u, v = pair(6, 10, 3)
    term = LowRank.of(layout, u, v)
    torch.testing.assert_close(term.dense(torch.float32), layout.from_matrix((u @ v)[None]))
    assert (term.rank, term.multiplications, term.nbytes) == (3, 3 * 16, 3 * 16 * 4)
    assert term.describe() == "rank 3 (float32)"


def test_a_batch_of_matrices() -> None:
    layout = WeightLayout((2, 7, 4), (0, 2, 1), batch_dims=1)
    u, v = torch.randn(2, 4, 2), torch.randn(2, 2, 7)
    term = LowRank.of(layout, u, v)
    torch.testing.assert_close(term.dense(torch.float32), (u @ v).mT)
    assert not term.factored
    assert SiteForm(terms=(term,)).dense(torch.float32).shape == (2, 7, 4)


def test_factors_may_be_codes_and_count_their_true_bytes() -> None:
    u, v = pair(6, 10, 4)
    term = LowRank.of(LAYOUTS["linear"], coded(u), coded(v, 4, 5))
    assert term.nbytes == (6 * 4 + 6 * 4) + (
        4 * 5 + 4 * 2 * 2
    )  # codes; scales float32 per row, bfloat16 in groups
    torch.testing.assert_close(
        term.dense(torch.float32), term.u.dense(torch.float32) @ term.v.dense(torch.float32)
    )
    assert term.describe() == "rank 4 (int8 sym per row, int4 sym g5)"


def test_saved_and_read_back() -> None:
    u, v = pair(6, 10, 4)
    term = LowRank.of(LAYOUTS["linear"], coded(u), v)
    tensors: dict[str, Tensor] = {}
    spec = term.to_spec("t", tensors)
    assert from_spec(spec, tensors).same_as(term)
    assert [path for path, _ in SiteForm(terms=(term,)).parts()] == ["", "terms.0", "terms.0.u", "terms.0.v"]


@pytest.mark.parametrize(
    ("u", "v"),
    [((6, 3), (4, 10)), ((5, 3), (3, 10)), ((6, 3), (3, 9)), ((6, 0), (0, 10)), ((1, 6, 3), (1, 3, 10))],
)
def test_factors_that_do_not_fit_are_refused(u: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="LowRank: u is"):
        LowRank.of(LAYOUTS["linear"], torch.zeros(u), torch.zeros(v))
    with pytest.raises(FormatError, match="no floating-point tensor"):
        DenseWeight(torch.zeros(3, dtype=torch.int32))


class Uses(nn.Module):
    """One weight as a product, with a bias, as a penalty; an addmm; a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(10, 12)
        self.conv = nn.Conv2d(3, 8, (3, 2), stride=2, padding=1, dilation=(1, 2))
        self.w = nn.Parameter(torch.randn(10, 7) * 0.3)
        self.c = nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, 10)
        return self.a(x), torch.addmm(self.c, flat, self.w), self.conv(image), self.w.square().sum()


INPUTS = (torch.randn(2, 5, 10), torch.randn(2, 3, 9, 8))


def state_of(program: Any, *, codes: bool = False, beside: bool = False) -> CompressionState:
    state = CompressionState(program.weights)
    layouts = {
        "a.weight": LAYOUTS["linear"].rows((12, 10)),
        "w": WeightLayout((10, 7), (1, 0)),
        "conv.weight": WeightLayout.rows((8, 3, 3, 2)),
    }
    for seed, (name, layout) in enumerate(layouts.items()):
        u, v = pair(*layout.matrix_shape[1:], 3, seed)
        low = LowRank.of(layout, *((coded(u), coded(v)) if codes else (u, v)))
        first = quantize_to_term(program.weights[name], layout, IntFormat(8, True, 0))
        state.apply(SetWeight(name, (first, low) if beside else (low,)), "test")
    return state


def dense_reference(program: Any, state: CompressionState) -> Any:
    """The captured graph with the forms' dense values."""
    given = dict(zip(program.inputs, INPUTS, strict=True))
    call = [
        given[node.name]
        if node.name in given
        else state.effective(program.weight_of[node.name])
        if program.weight_of[node.name] in program.parameters
        else program.weights[program.weight_of[node.name]]
        for node in program.placeholders()
    ]
    return program.graph_module(*call)


def run(program: Any, state: CompressionState) -> tuple[Any, fx.Graph]:
    applied = apply_state(program, state)
    given = dict(zip(program.inputs, INPUTS, strict=True))
    call = []
    for node in applied.module.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in applied.form_inputs:
            ref = applied.form_inputs[node.name]
            value: Any = state.forms[ref.name]
            for step in ref.path.split("."):
                value = value[int(step)] if isinstance(value, tuple) else getattr(value, step)
            call.append(value)
        else:
            call.append(
                given[node.name] if node.name in given else program.weights[program.weight_of[node.name]]
            )
    return applied.module(*call), applied.module.graph


@pytest.fixture(scope="module")
def program() -> Any:
    torch.manual_seed(0)
    return capture_model(Uses().eval(), INPUTS)


@pytest.mark.parametrize(("codes", "beside"), list(itertools.product((False, True), repeat=2)))
def test_graphs_compute_with_factors_what_the_dense_value_gives(
    program: Any, codes: bool, beside: bool
) -> None:
    state = state_of(program, codes=codes, beside=beside)
    found, graph = run(program, state)
    for y, z in zip(dense_reference(program, state), found, strict=True):
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-4)
    targets = [node.target for node in graph.nodes]
    assert targets.count(aten.matmul.default) == 1  # the penalty alone reads a product of the factors
    assert targets.count(aten.linear.default) == 4 + 2 * beside
    assert targets.count(aten.conv2d.default) == 2 + beside
    products = [node for node in graph.nodes if node.target is aten.linear.default]
    assert not any(node.args[1].target is aten.matmul.default for node in products)


def test_transforms_and_quantizers_act_on_the_input_of_the_right_factor(program: Any) -> None:
    state = state_of(program)
    state.apply(SetTransform("a.weight", transform_in=(Scale(torch.full((10,), 0.5)),)), "test")
    state.apply(SetActivation("a.weight", DynamicPerToken(8)), "test")
    found, graph = run(program, state)
    term: Any = state.forms["a.weight"].terms[0]
    ops = torch.ops.fxcompress
    q, scale = ops.quantize_per_token(INPUTS[0] * 0.5, 8)
    x = ops.dequantize_activation(q, scale, None, torch.float32)
    expected = x @ term.v.values.T @ term.u.values.T + program.weights["a.bias"]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert [node.target for node in graph.nodes].count(ops.quantize_per_token.default) == 1


def test_only_terms_can_be_revised(program: Any) -> None:
    state = CompressionState(program.weights)
    layout = WeightLayout.rows((12, 10))
    term = LowRank.of(layout, *pair(12, 10, 2))
    with pytest.raises(RecipeError, match="has none"):
        state.apply(ReviseWeight("a.weight", (term,)), "test")
    state.apply(SetWeight("a.weight", (term,)), "first")
    with pytest.raises(RecipeError, match="already compressed by first"):
        state.apply(SetWeight("a.weight", (term,)), "second")
    with pytest.raises(WeightError, match="term has shape"):
        state.apply(ReviseWeight("a.weight", (LowRank.of(LAYOUTS["linear"], *pair(6, 10, 2)),)), "second")
    state.apply(ReviseWeight("a.weight", (term, term)), "second")
    assert len(state.forms["a.weight"].terms) == 2
    assert state.dense_target("a.weight") is program.weights["a.weight"]
