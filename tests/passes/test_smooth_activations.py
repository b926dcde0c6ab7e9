"""SmoothActivations: the formula's known answers, the function kept to the last bit, refusals and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis.sites import Site, find_sites
from fxcompress.calibration import as_calibration
from fxcompress.capture.export import capture_model
from fxcompress.capture.program import Program
from fxcompress.edits import Edit, Refuse, SetTensor
from fxcompress.errors import CalibrationError, CoverageError, RecipeError
from fxcompress.manager import run_recipe
from fxcompress.passes.smooth_activations import SmoothActivations
from tests.passes.one_block import OneBlock, refusals
from tests.zoo import entry

WIDTH = 8


class Plain(nn.Module):
    """LayerNorm with γ=1, β=0, then one matrix; so the matrix sees the normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=True)
        self.matrix = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix(self.norm(x))


class Two(nn.Module):
    """Matrix → ReLU → matrix, and a GELU pair behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(torch.relu(self.a(x)))))


class Gate(nn.Module):
    """A ReLU-gated unit: gate and up could both carry the scale of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


def block_of(
    model: nn.Module, *inputs: tuple[Any, ...], only: Callable[[Site], bool] = lambda site: True
) -> OneBlock:
    """One block with the model's own weights, which these tests plant."""
    return OneBlock(capture_model(model.eval(), inputs[0]), inputs, only)


def tensors(edits: Sequence[Edit]) -> dict[str, Tensor]:
    return {edit.name: edit.value for edit in edits if isinstance(edit, SetTensor)}


def planted(x_max: float, w_max: float) -> OneBlock:
    """A ReLU pair whose first channel has these maxima and whose others have 1 and 1."""
    model = Two()
    with torch.no_grad():
        model.a.weight.zero_()
        model.a.bias.fill_(1.0)
        model.a.bias[0] = x_max
        model.b.weight.fill_(-1.0)
        model.b.weight[:, 0] = w_max
    return block_of(model, (torch.randn(2, 5),))


def maxima(block: OneBlock) -> tuple[Tensor, Tensor]:
    """Per channel of ``b``: largest input and largest weight."""
    (site,) = [site for site in block.sites if site.name == "b.weight"]
    assert site.input is not None
    x = block.statistics([site])[site.input.name].absmax
    return x, block.weight("b.weight").abs().amax(0)


@torch.no_grad()
def run(block: OneBlock, *inputs: Any) -> Tensor:
    weights = {name: block.dense(name) for name in block.program.weights}
    (out,) = block.program.run_flat(inputs, weights)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("exact", [True, False])
def test_known_answer(exact: bool) -> None:
    """max|X| = 16, max|W| = 1, α = ½ → s = 4, and both maxima become 4."""
    block = planted(16.0, 1.0)
    edits = tensors(block.run(SmoothActivations(alpha=0.5, exact=exact)))
    assert set(edits) == {"a.weight", "a.bias", "b.weight"}
    assert edits["a.bias"].tolist() == [4.0] + [1.0] * (WIDTH - 1)
    assert edits["b.weight"][:, 0].tolist() == [4.0] * 7
    assert edits["b.weight"][:, 1:].abs().eq(1).all()
    x, w = maxima(block)
    assert (x[0], w[0]) == (4.0, 4.0)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_the_formula(alpha: float) -> None:
    model, x = Two(), torch.randn(64, 5)
    block = block_of(model, (x,))
    before_x, before_w = maxima(block)
    expected = before_x.double().pow(alpha) / before_w.double().pow(1 - alpha)
    block.run(SmoothActivations(alpha=alpha, exact=False))
    after_x, after_w = maxima(block)
    torch.testing.assert_close(after_x.double(), before_x / expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(after_w.double(), before_w * expected, rtol=1e-5, atol=0)
    if alpha == 0.5:
        torch.testing.assert_close(after_x, after_w, rtol=1e-5, atol=0)
    if alpha == 1.0:
        torch.testing.assert_close(after_x, torch.ones(WIDTH), rtol=1e-5, atol=0)
    if alpha == 0.0:
        torch.testing.assert_close(after_w, torch.ones(WIDTH), rtol=1e-5, atol=0)


def test_exact_scales_are_the_nearest_powers_of_two() -> None:
    model, x = Two(), torch.randn(64, 5)
    block = block_of(model, (x,))
    before_x, before_w = maxima(block)
    wanted = (before_x.double() / before_w.double()).sqrt()
    edits = tensors(block.run(SmoothActivations()))
    scale = edits["b.weight"][0] / model.b.weight.detach()[0]
    assert torch.equal(scale.log2(), scale.log2().round())
    assert (scale / wanted).log2().abs().max() <= 0.5 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_default_keeps_every_bit_of_the_output(dtype: torch.dtype) -> None:
    model, x = Gate().to(dtype), torch.randn(16, 5).to(dtype)
    block = block_of(model, (x,))
    before = run(block, x)
    edits = tensors(block.run(SmoothActivations()))
    assert edits
    assert any(not torch.equal(value, block.program.weights[name]) for name, value in edits.items())
    assert torch.equal(run(block, x), before)


def test_a_second_run_changes_nothing() -> None:
    block = block_of(Two(), (torch.randn(64, 5),))
    assert tensors(block.run(SmoothActivations(alpha=0.7)))
    again = block.run(SmoothActivations(alpha=0.7))
    assert not tensors(again)
    assert refusals(again)["b.weight"] == "nothing to move: every scale is 1"


def test_dead_channels_keep_their_scale() -> None:
    model = Two()
    with torch.no_grad():
        model.a.weight[0], model.a.bias[0] = 0.0, -1.0  # the ReLU never opens
        model.b.weight[:, 1] = 0.0  # nobody reads it
    edits = tensors(block_of(model, (torch.randn(64, 5),)).run(SmoothActivations(alpha=0.0)))
    assert torch.equal(edits["a.weight"][:2], model.a.weight[:2])
    assert torch.equal(edits["b.weight"][:, :2], model.b.weight[:, :2])
    assert not torch.equal(edits["a.weight"][2:], model.a.weight[2:])


def test_one_scale_per_input_channel_even_if_two_producers_could_carry_it() -> None:
    edits = tensors(block_of(Gate(), (torch.randn(64, 5),)).run(SmoothActivations()))
    assert set(edits) == {"gate.weight", "gate.bias", "down.weight"}


def test_refusals_say_why() -> None:
    edits = block_of(Two(), (torch.randn(64, 5),)).run(SmoothActivations())
    assert refusals(edits) == {
        "a.weight": "no norm gain and no matrix before its input can take a scale per channel",
        "c.weight": "b.weight → aten::gelu (gelu) does not commute with a scale per channel",
    }


def test_every_product_of_the_block_is_smoothed_or_refused() -> None:
    program, data = decoder("gpt2-odd")
    result = run_recipe(program, [SmoothActivations()], data)
    state = result.state
    for site in find_sites(program):
        if site.takes_activation:
            actions = {entry.action for entry in state.provenance.get(site.name, [])}
            assert actions & {"SetTensor", "Refuse"}, site.name


def test_a_stored_offset_that_would_round_is_refused() -> None:
    class PlusOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.matrix = nn.Parameter(torch.full((WIDTH,), 0.1)), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.matrix(torch.tanh(x) * (1 + self.gain))

    model = PlusOne()
    with torch.no_grad():
        model.matrix.weight.fill_(2.0**-8)
    reason = refusals(block_of(model, (torch.randn(64, WIDTH),)).run(SmoothActivations()))["matrix.weight"]
    assert reason == "gain: any scale but 1 would round a stored weight (exact=True)"
    with torch.no_grad():
        model.gain.fill_(0.25)  # (1 + 1/4) / 2^k − 1 is a short number
    assert set(tensors(block_of(model, (torch.randn(64, WIDTH),)).run(SmoothActivations()))) == {
        "gain",
        "matrix.weight",
    }


def test_out_of_range_is_refused_when_rounding_is_allowed() -> None:
    model = Two().half()
    with torch.no_grad():
        model.b.weight.fill_(6e4)
        model.a.bias.fill_(100.0)
    edits = block_of(model, (torch.randn(4, 5).half(),)).run(SmoothActivations(alpha=1.0, exact=False))
    assert not tensors(edits)
    assert "leaves the range of torch.float16" in refusals(edits)["b.weight"]


def test_patterns_leave_whole_groups_alone() -> None:
    def smoothed(**options: Any) -> tuple[set[str], dict[str, str]]:
        edits = block_of(Two(), (torch.randn(64, 5),)).run(SmoothActivations(**options))
        return set(tensors(edits)), refusals(edits)

    assert smoothed(include=("b.*",))[0] == {"a.weight", "a.bias", "b.weight"}
    names, reasons = smoothed(exclude=("a.bias",))
    assert not names
    assert reasons["b.weight"] == "a.bias is excluded by 'a.bias'"
    names, reasons = smoothed(include=("c.*",))
    assert not names
    assert reasons["b.weight"] == "b.weight matches none of the include patterns"
    with pytest.raises(RecipeError, match=r"pattern 'z\.\*' matches no parameter"):
        smoothed(include=("z.*",))


def test_folding_between_matrices_can_be_turned_off() -> None:
    edits = block_of(Two(), (torch.randn(64, 5),)).run(SmoothActivations(fold_linear=False))
    assert not tensors(edits)
    norm = block_of(Plain(), (torch.randn(64, WIDTH),)).run(SmoothActivations(fold_linear=False))
    assert set(tensors(norm)) == {"norm.weight", "norm.bias", "matrix.weight"}


def test_a_reader_in_another_block_is_refused() -> None:
    block = block_of(Two(), (torch.randn(64, 5),), only=lambda site: site.name != "b.weight")
    edits = block.run(SmoothActivations())
    assert not tensors(edits)
    assert set(refusals(edits)) == {"a.weight", "c.weight"}


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.5", True, None])
def test_alpha_is_checked(alpha: Any) -> None:
    with pytest.raises(RecipeError, match=r"alpha=.*expected a number from 0 to 1"):
        SmoothActivations(alpha=alpha)


def test_other_options_are_checked_and_the_promise_follows_exact() -> None:
    with pytest.raises(RecipeError, match="fold_linear=1, expected true or false"):
        SmoothActivations(fold_linear=1)  # type: ignore[arg-type]
    assert SmoothActivations().preserves_function
    assert not SmoothActivations(exact=False).preserves_function


def decoder(name: str) -> tuple[Program, Any]:
    animal = entry(name)
    program = capture_model(animal.build(), kwargs=animal.inputs())
    return program, as_calibration([animal.tensors(2, 12, seed=seed) for seed in range(2)], program)


@pytest.mark.parametrize("name", ["llama", "gpt2-odd", "mixtral"])
def test_the_manager_proves_the_function_unchanged(name: str) -> None:
    program, data = decoder(name)
    result = run_recipe(program, [SmoothActivations(alpha=0.85)], data)
    (check,) = [entry for entry in result.report.checks if entry.get("pass") == "smooth-activations"]
    assert check["passed"]
    assert check["max_relative_error"] == 0.0
    assert len(result.state.tensors) > 10


def test_output_heads_only_on_request() -> None:
    program, data = decoder("llama")
    assert "lm_head.weight" not in run_recipe(program, [SmoothActivations()], data).state.tensors
    assert "lm_head.weight" in run_recipe(program, [SmoothActivations(heads=True)], data).state.tensors


def test_smoothing_helps_where_activations_have_outliers() -> None:
    """8-bit weights and activations on a pair with one huge channel: the error must fall a lot."""
    from fxcompress.passes.quantize_activations import QuantizeActivations
    from fxcompress.passes.quantize_weights import QuantizeWeights

    torch.manual_seed(3)
    model, x = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)), torch.randn(64, 64)
    with torch.no_grad():
        model[0].weight[5] = 100.0
    program = capture_model(model.eval(), (x,))
    data = as_calibration([(x[:32],), (x[32:],)], program)
    steps = [QuantizeWeights(bits=8, group_size=0), QuantizeActivations()]
    plain = run_recipe(program, steps, data).report.relative_error
    smooth = run_recipe(program, [SmoothActivations(), *steps], data).report.relative_error
    assert plain is not None
    assert smooth is not None
    assert smooth < plain / 3


def test_order_and_data_are_enforced() -> None:
    from fxcompress.passes.quantize_weights import QuantizeWeights

    program, data = decoder("llama")
    with pytest.raises(RecipeError, match="smooth-activations"):
        run_recipe(program, [QuantizeWeights(), SmoothActivations()], data)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        run_recipe(program, [SmoothActivations()])


def test_a_model_without_any_group_is_an_error_with_the_reason() -> None:
    x = torch.randn(8, 5)
    program = capture_model(nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)), (x,))
    data = as_calibration([(x,)], program)
    with pytest.raises(CoverageError, match="'smooth-activations' made no edit"):
        run_recipe(program, [SmoothActivations()], data)


def test_refuse_edits_change_nothing() -> None:
    edits = block_of(Two(), (torch.randn(8, 5),)).run(SmoothActivations())
    assert {type(edit) for edit in edits} == {SetTensor, Refuse}
