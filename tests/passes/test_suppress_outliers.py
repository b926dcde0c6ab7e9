"""SuppressOutliers: the formulas' known answers, where shifts go, the function kept, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.analysis.smoothing_group import ScaledParameter
from fxcompress.calibration import as_calibration
from fxcompress.capture.export import capture_model
from fxcompress.edits import SetTensor, SetTransform
from fxcompress.errors import CalibrationError, RecipeError, WeightError
from fxcompress.forms import Scale, Shift
from fxcompress.manager import RunResult, run_recipe
from fxcompress.passes import QuantizeActivations, QuantizeWeights, SmoothActivations, SuppressOutliers
from fxcompress.passes.suppress_outliers import centre, shifted_bias, threshold_scale, thresholds
from fxcompress.recipe import Recipe
from tests.passes.one_block import OneBlock, refusals
from tests.passes.test_smooth_activations import decoder

WIDTH = 12


class Normed(nn.Module):
    """A norm with far-off channels before two matrices, one of them without bias; ``trap`` adds a reader."""

    def __init__(self, trap: str = "") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, bias=trap != "no bias")
        self.one, self.two = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 7, bias=False)
        self.trap = trap
        with torch.no_grad():
            if self.norm.bias is not None:
                self.norm.bias[2], self.norm.bias[7] = -70.0, 40.0
            else:
                self.norm.weight[2] = 40.0

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.norm(x)
        if self.trap == "returned":
            return self.one(h), h
        if self.trap == "residual":
            return self.one(h) + self.two(h).sum(), x + h
        if self.trap == "relu":
            h = torch.relu(h)
        return self.one(h), self.two(h)


def block_of(model: nn.Module) -> OneBlock:
    torch.manual_seed(0)
    return OneBlock(
        capture_model(model.eval(), (torch.randn(3, 8, WIDTH),)), [(torch.randn(3, 8, WIDTH),)] * 2
    )


def proven(model: nn.Module, method: SuppressOutliers) -> tuple[RunResult, float]:
    """Run under the manager; the result and the proof's largest relative difference."""
    torch.manual_seed(0)
    x = torch.randn(3, 8, WIDTH)
    program = capture_model(model.eval(), (x,))
    result = run_recipe(program, [method], as_calibration([(x,), (x * 1.1,)], program))
    (check,) = [entry for entry in result.report.checks if entry.get("pass") == method.name]
    return result, float(check["max_relative_error"])


def test_known_answers() -> None:
    z = centre(torch.tensor([-97.0]).double(), torch.tensor([-43.0]).double())
    assert z.tolist() == [-70.0]
    low, high = torch.tensor([-27.0, -1.0, -3.0]), torch.tensor([27.0, 2.0, 0.5])
    assert threshold_scale(low, high, 27.0).tolist() == [1.0, 1.0, 1.0]
    scale = threshold_scale(low, high, 1.5)
    assert bool((torch.maximum(-low, high) / scale <= 1.5).all())
    assert scale.tolist() == [18.0, pytest.approx(4 / 3), 2.0]


def test_thresholds_end_at_the_smallest_channel() -> None:
    found = thresholds(torch.tensor([8.0, 0.0, 2.0]), 3)
    assert found == [8.0, 6.0, 4.0, 2.0]
    assert thresholds(torch.zeros(4), 3) == []


def test_the_shift_is_what_the_stored_bias_lost() -> None:
    bias = torch.tensor([0.1, 5.0, 1e-3]).bfloat16()
    parameter = ScaledParameter("bias", torch.tensor([0, 1, -1]), "bias", True)
    scale, z = torch.tensor([2.0, 4.0]).double(), torch.tensor([0.33, 4.9]).double()
    stored, real = shifted_bias(bias, parameter, scale, z)
    assert stored.dtype == torch.bfloat16
    assert stored[2] == bias[2]
    assert torch.equal(stored[:2].double() * scale + real, bias[:2].double())
    torch.testing.assert_close(real, z, rtol=0.01, atol=0.01)
    with pytest.raises(WeightError, match="a shifted element leaves the range of"):
        shifted_bias(bias.half(), parameter, scale, torch.tensor([1e6, 0.0]).double())


def test_shift_and_scale_are_folded_and_proven() -> None:
    result, error = proven(Normed(), SuppressOutliers(steps=20))
    assert error <= 1e-9
    state = result.state
    assert state.tensors["norm.bias"].abs().max() < 5, "the channels were centred"
    for name in ("one.weight", "two.weight"):
        form = state.form(name)
        assert form.bias is not None
        assert form.bias.dtype == torch.float64
        assert not form.transform_in
    actions = {entry.action for entry in state.provenance["norm.bias"]}
    assert actions == {"SetTensor"}


def test_without_shift_only_scales() -> None:
    edits = block_of(Normed()).run(SuppressOutliers(steps=20, shift="none"))
    assert {type(edit) for edit in edits} == {SetTensor}


@pytest.mark.parametrize(
    ("trap", "reason"),
    [
        ("no bias", "not shifted: norm.weight: the norm has no bias that could be shifted"),
        ("returned", "norm.weight → it is read by the output of the model"),
        ("residual", "norm.weight → aten::add"),
        ("relu", "not shifted: aten::relu (relu) does not commute with a shift per channel"),
    ],
)
def test_traps_are_refused_with_the_reason(trap: str, reason: str) -> None:
    torch.manual_seed(3)
    edits = block_of(Normed(trap)).run(SuppressOutliers(steps=3, symmetric=True, activation_mode="dynamic"))
    assert not [edit for edit in edits if isinstance(edit, SetTransform)]
    found = refusals(edits)
    if "one.weight" in found:
        assert reason in found["one.weight"]
    else:  # scaled without a shift
        assert trap in ("no bias", "relu")


@pytest.mark.parametrize("trap", ["no bias", "returned", "residual", "relu"])
def test_explicit_shifts_handle_every_trap_and_are_proven(trap: str) -> None:
    result, error = proven(Normed(trap), SuppressOutliers(steps=10, shift="explicit", explicit=True))
    assert 0 < error <= 1e-9 or error == 0
    form = result.state.form("one.weight")
    assert form.bias is not None
    assert isinstance(form.transform_in[0], Shift)
    folded = "norm.weight" in result.state.tensors
    assert folded == (trap in ("no bias", "relu"))
    assert [type(part) for part in form.transform_in] == ([Shift] if folded else [Shift, Scale])


def test_it_helps_static_quantization() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16, WIDTH)
    program = capture_model(Normed().eval(), (x,))
    data = as_calibration([(x,), (x + 0.1,)], program)
    steps = [QuantizeWeights(), QuantizeActivations(mode="static")]
    plain = run_recipe(program, steps, data).report.relative_error
    better = run_recipe(program, [SuppressOutliers(steps=20), *steps], data).report.relative_error
    assert plain is not None
    assert better is not None
    assert better < plain / 3


@pytest.mark.parametrize("name", ["llama", "gpt2-odd", "mixtral"])
def test_the_manager_proves_the_function_unchanged(name: str) -> None:
    program, data = decoder(name)
    method = SuppressOutliers(steps=5, shift="explicit", explicit=True)
    result = run_recipe(program, [method], data)
    (check,) = [entry for entry in result.report.checks if entry.get("pass") == method.name]
    assert check["max_relative_error"] <= 1e-9


def test_constant_and_dead_channels() -> None:
    model = Normed()
    with torch.no_grad():
        model.norm.weight[:4] = 0.0  # constant: only the bias is left
        model.norm.bias[1] = 0.0  # and dead
    result, error = proven(model, SuppressOutliers(steps=10))
    assert error <= 1e-9
    assert result.state.tensors["norm.bias"][1] == 0
    assert result.state.tensors["norm.bias"][2].abs() < 1e-3


def test_bad_data_and_options() -> None:
    block = block_of(Normed())
    block.data = [(torch.full((1, 8, WIDTH), float("inf")),)]
    with pytest.raises(CalibrationError, match="NaN or inf"):
        block.run(SuppressOutliers())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shift": "yes"}, "shift='yes', expected 'fold', 'explicit' or 'none'"),
        ({"steps": 0}, "steps=0"),
        ({"activation_bits": 9}, "activations of 9 bits"),
    ]
    for options, message in cases:
        with pytest.raises(RecipeError, match=message):
            SuppressOutliers(**options)
    with pytest.raises(RecipeError, match="cannot run after 'smooth-activations'"):
        Recipe([SmoothActivations(), SuppressOutliers()])
    with pytest.raises(RecipeError, match="prepares for static 8-bit inputs"):
        Recipe([SuppressOutliers(), QuantizeWeights(), QuantizeActivations()])
