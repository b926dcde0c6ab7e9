from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from fxcompress.calibration.walk import Plan
from fxcompress.edits import CompressionState, Edit, Refuse, SetTensor, SetWeight
from fxcompress.errors import CalibrationError, FormatError, RecipeError
from fxcompress.forms import DynamicPerToken, QuantizedWeight
from fxcompress.manager import run_recipe
from fxcompress.ops import apply_quantizer
from fxcompress.ops.straight_through import straight_through
from fxcompress.pass_base import BlockContext, Pass
from fxcompress.passes import LayerDistill, QuantizeActivations, QuantizeWeights
from tests.engine.models import calibration, decoder

FAST: dict[str, Any] = {"bits": 4, "group_size": 8, "steps": 9, "learning_rate": 1e-2}
REST = QuantizeWeights(bits=4, group_size=8, only_remaining=True)


@functools.cache
def distil(**options: Any) -> Any:
    program = decoder()
    recipe = [LayerDistill(**FAST | options), REST]
    return run_recipe(program, recipe, calibration(program), verify="end")


def losses(state: CompressionState) -> list[tuple[float, float]]:
    reasons = [e.reason for found in state.provenance.values() for e in found if "block loss" in e.reason]
    found = {re.search(r"block loss (\S+) → (\S+)", reason).groups() for reason in reasons}  # type: ignore[union-attr]
    return [(float(before), float(after)) for before, after in sorted(found)]


def with_context(check: Any) -> None:
    """Call ``check`` with the context of every block."""

    @dataclass(frozen=True)
    class Check(Pass):
        name: ClassVar[str] = "check"
        needs_calibration: ClassVar[bool] = True

        def solve(self, block: BlockContext) -> Iterator[Edit]:
            check(block)
            yield from (Refuse(site.name, "only looked at") for site in block.sites)
            if block.index == 0:
                name = block.sites[0].name
                yield SetTensor(name, block.weight(name) * 1)

    run_recipe(decoder(), Check(), calibration(decoder()), verify="off")


# --- the block as a function -----------------------------------------------------------------------------


def test_the_function_of_an_unchanged_block_is_its_target() -> None:
    seen = []

    def check(block: BlockContext) -> None:
        function = block.function()
        assert function.batches == 3
        for batch in range(3):
            for y, target in zip(function(batch), function.target(batch), strict=True):
                torch.testing.assert_close(y, target)
                assert not y.requires_grad
        seen.append(function.parameters)

    with_context(check)
    assert len(seen) == len(Plan(decoder()).blocks)
    flat = [name for names in seen for name in names]
    assert len(flat) == len(set(flat))
    assert {"layers.1.norm.weight", "layers.1.up.weight", "layers.1.up.bias"} <= set(flat)


def test_gradients_are_those_of_the_graph_and_pass_through_quantizers() -> None:
    def check(block: BlockContext) -> None:
        name = next((site.name for site in block.sites if site.name.endswith("up.weight")), None)
        if name is None:
            return
        function = block.function()
        weight = block.weight(name).detach().clone().requires_grad_(True)
        with torch.enable_grad():
            sum(y.square().sum() for y in function(0, {name: weight})).backward()  # type: ignore[union-attr]
        exact = weight.grad
        assert exact is not None
        with torch.no_grad():
            step = torch.zeros_like(weight)
            step[1, 2] = 1e-3
            high, low = (
                sum(float(y.double().square().sum()) for y in function(0, {name: weight + sign * step}))
                for sign in (1, -1)
            )
        assert float(exact[1, 2]) == pytest.approx((high - low) / 2e-3, rel=0.02, abs=1e-3)
        block.state.forms[name] = type(block.state.form(name))(activation=DynamicPerToken(4))
        again = block.weight(name).detach().clone().requires_grad_(True)
        with torch.enable_grad():
            sum(y.square().sum() for y in function(0, {name: again})).backward()  # type: ignore[union-attr]
        assert again.grad is not None
        assert bool(again.grad.any())
        del block.state.forms[name]
        other = "layers.0.up.weight" if "layers.1" in name else "layers.1.up.weight"
        with pytest.raises(CalibrationError, match="a parameter that only this block uses"):
            function(0, {other: weight})
        with pytest.raises(CalibrationError, match=r"of shape \(3,\) given"):
            function(0, {name: torch.zeros(3)})

    with_context(check)


def test_straight_through_is_exact() -> None:
    x = torch.tensor([1e8, 0.3, -0.7], requires_grad=True)
    y = straight_through(x, x.round())
    assert torch.equal(y, torch.tensor([1e8, 0.0, -1.0]))
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3]


# --- the pass --------------------------------------------------------------------------------------------


def test_structure_and_the_loss_decreases_in_every_block() -> None:
    result = distil()
    state = result.state
    for name in ("layers.0.up.weight", "layers.2.down.weight"):
        form = state.form(name)
        assert isinstance(form.terms[0], QuantizedWeight)
        assert form.terms[0].bits == 4
        assert isinstance(form.activation, DynamicPerToken)
    assert "layers.1.norm.weight" in state.tensors
    found = losses(state)
    assert len(found) == 3
    assert all(after < before for before, after in found)


def test_it_beats_rounding_alone() -> None:
    program = decoder()
    plain = run_recipe(
        program,
        [QuantizeWeights(bits=4, group_size=8), QuantizeActivations()],
        calibration(program),
        verify="end",
    )
    assert plain.report.relative_error is not None
    assert distil().report.relative_error < plain.report.relative_error


def test_no_step_is_rounding_to_nearest() -> None:
    state = distil(steps=0).state
    program = decoder()
    plain = run_recipe(program, [QuantizeWeights(bits=4, group_size=8)], verify="off").state
    for name in ("layers.0.up.weight", "layers.2.down.weight"):
        one, two = state.form(name).terms[0].tensors(), plain.form(name).terms[0].tensors()
        assert all(torch.equal(one[key], two[key]) for key in two)
    assert all(before == after for before, after in losses(state))
    assert not state.tensors


def test_a_hopeless_learning_rate_is_never_worse_than_the_start() -> None:
    assert all(after <= before for before, after in losses(distil(learning_rate=1e3).state))


def test_only_the_block_at_hand_is_touched_and_runs_repeat() -> None:
    touched: dict[int, set[str]] = {}

    @dataclass(frozen=True)
    class Watched(LayerDistill):
        name: ClassVar[str] = "watched"

        def solve(self, block: BlockContext) -> Iterator[Edit]:
            before = {name: tensor.clone() for name, tensor in block.program.weights.items()}
            for edit in super().solve(block):
                if not isinstance(edit, Refuse):
                    touched.setdefault(block.index, set()).add(edit.name)
                yield edit
            assert all(torch.equal(block.program.weights[name], tensor) for name, tensor in before.items())

    program = decoder()
    runs = [
        run_recipe(program, [Watched(**FAST), REST], calibration(program), verify="off").state
        for _ in range(2)
    ]
    for names in touched.values():
        assert len({re.sub(r"layers\.(\d).*", r"\1", name) for name in names}) == 1
    assert len(touched) == 3
    for name, form in runs[0].forms.items():
        other = runs[1].form(name).tensors()
        assert all(torch.equal(tensor, other[key]) for key, tensor in form.tensors().items())
    assert all(torch.equal(value, runs[1].tensors[name]) for name, value in runs[0].tensors.items())


def test_tokens_are_quantized_apart() -> None:
    x = torch.randn(4, 8)
    planted = x.clone()
    planted[2] *= 1000
    value, other = apply_quantizer(x, DynamicPerToken()), apply_quantizer(planted, DynamicPerToken())
    assert torch.equal(value[[0, 1, 3]], other[[0, 1, 3]])


def test_reasons_and_a_second_run() -> None:
    program = decoder()
    recipe = [LayerDistill(**FAST, exclude=("layers.0.up.*",)), LayerDistill(**FAST), REST]
    state = run_recipe(program, recipe, calibration(program), verify="off").state
    reasons = {
        name: [e.reason for e in found if e.action == "Refuse"] for name, found in state.provenance.items()
    }
    assert "excluded by 'layers.0.up.*'" in reasons["layers.0.up.weight"]
    assert "it is compressed already" in reasons["layers.1.up.weight"]
    assert any("not part of a distilled block" in reason for reason in reasons["embed.weight"])
    weights = [e for e in state.provenance["layers.1.up.weight"] if e.action == SetWeight.__name__]
    assert len(weights) == 1


def test_floats_and_activations_can_be_left_alone() -> None:
    state = distil(train_floats=False, activation_bits=None).state
    assert not state.tensors
    assert all(form.activation is None for form in state.forms.values())


def test_without_data_it_is_refused() -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        run_recipe(decoder(), [LayerDistill()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"activation_bits": 16}, "activation_bits=16"),
        ({"train_floats": 1}, "train_floats=1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LayerDistill(**options)
    with pytest.raises(FormatError, match="bits=1"):
        LayerDistill(bits=1)
