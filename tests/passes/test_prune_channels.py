"""Pruning channels, heads and experts: budgets, protection, rounds, every kind of model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.capture.export import capture_model
from fxcompress.edits import Refuse
from fxcompress.errors import CalibrationError, RecipeError
from fxcompress.manager import RunResult, run_recipe
from fxcompress.passes import PruneChannels
from fxcompress.passes._pruning_budget import TARGETS
from fxcompress.passes.prune_channels import best, standardized
from fxcompress.recipe import Recipe
from tests.engine.models import build, calibration, decoder, tokens
from tests.zoo import entry


def run(*, program: Any = None, **options: Any) -> RunResult:
    program = decoder() if program is None else program
    return run_recipe(program, PruneChannels(**options), calibration(program))


def kept(result: RunResult) -> list[int]:
    return [len(units) for units in result.rounds[-1].change.kept.values()]


def left(result: RunResult, of: str) -> float:
    assert result.report.structure is not None
    of = {"memory": "bytes", "block-parameters": "block_parameters"}.get(of, of)
    after, before = (result.report.structure[when][of] for when in ("after", "before"))
    return float(after / before)


# --- budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in ("units", "latency")])
@pytest.mark.parametrize("scope", ["group", "global"])
def test_at_least_the_amount_goes_and_hardly_more(target: str, scope: str) -> None:
    result = run(amount=0.2, target=target, scope=scope, importance="l2")
    assert 0.8 - 0.06 < left(result, target) <= 0.8  # a unit of each of three groups is 3 % of this model
    if scope == "global":
        assert left(result, target) > 0.8 - 0.02


def test_units_are_cut_group_by_group_or_all_together() -> None:
    assert kept(run(amount=0.5)) == [16, 16, 16]
    together = run(amount=0.5, scope="global", importance="l2")
    assert sum(kept(together)) == 48
    assert len(set(kept(together))) > 1


def uneven() -> Any:
    """All hidden units of the first layer look worthless beside those of the others."""
    model = build()
    for tensor in (model.layers[0].up.weight, model.layers[0].up.bias, model.layers[0].down.weight):
        tensor.mul_(0.01)
    return capture_model(model, kwargs={"input_ids": tokens()})


def test_standardized_scores_make_groups_alike() -> None:
    program = uneven()
    plain = run(program=program, amount=0.3, scope="global")
    fair = run(program=program, amount=0.3, scope="global", standardize=True)
    assert len(plain.rounds[0].change.kept["layers.0.up.weight:0"]) < 4
    assert len(fair.rounds[0].change.kept["layers.0.up.weight:0"]) > 10


def test_latency_of_decoding_follows_parameters() -> None:
    result = run(amount=0.2, target="latency", scope="global", importance="l2")
    assert 0.6 < left(result, "parameters") < 0.85


def test_kept_units_are_rounded_up() -> None:
    result = run(amount=0.3, round_to=8)
    assert kept(result) == [24, 24, 24]


def test_no_group_loses_more_than_the_most() -> None:
    program = uneven()
    free = run(program=program, amount=0.3, scope="global")
    bound = run(program=program, amount=0.3, scope="global", max_amount=0.35)
    assert min(kept(free)) < min(kept(bound))
    assert min(kept(bound)) >= round(32 * 0.65)
    assert sum(kept(bound)) == 2 * 32 + sum(kept(free))  # which leaves the other two whole


def test_what_cannot_be_reached_says_what_can() -> None:
    with pytest.raises(RecipeError, match=r"at most 0\.\d+ can go"):
        run(amount=0.9, target="parameters")
    with pytest.raises(RecipeError, match=r"amount=0\.5 of block-parameters cannot be taken"):
        run(amount=0.5, target="block-parameters", protect_first=2)


@settings(max_examples=100, deadline=None)
@given(
    units=st.integers(1, 500),
    amount=st.floats(0.01, 0.99),
    round_to=st.integers(1, 64),
    most=st.floats(0.01, 1.0),
)
def test_a_group_keeps_a_unit_and_a_multiple(units: int, amount: float, round_to: int, most: float) -> None:
    budget = PruneChannels(amount, round_to=round_to, max_amount=most).budget()
    count = budget.kept(units, amount)
    assert 1 <= count <= units
    assert count == units or count % round_to == 0
    assert count >= min(units, round(units * (1 - most)))
    assert count - max(1, round(units * (1 - min(amount, most)))) < round_to


def test_the_best_units_are_kept_and_of_equal_ones_the_first() -> None:
    assert best(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2).tolist() == [1, 2]
    assert standardized(torch.tensor([1.0, 3.0])).tolist() == [-1, 1]
    assert standardized(torch.tensor([2.0, 2.0])).tolist() == [0, 0]


# --- rounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["units", "parameters", "latency"])
def test_steps_reach_the_same_amount(target: str) -> None:
    once = run(amount=0.3, target=target, importance="wanda")
    thrice = run(amount=0.3, target=target, importance="wanda", steps=3)
    assert len(thrice.rounds) == 3
    assert left(thrice, "parameters") == pytest.approx(left(once, "parameters"), abs=0.03)
    sizes = [sum(len(units) for units in done.change.kept.values()) for done in thrice.rounds]
    assert sizes[0] > sizes[1] > sizes[2]


def test_compensation_adds_up_over_rounds() -> None:
    result = run(amount=0.4, importance="flap", steps=2)
    assert result.state.form("layers.0.down.weight").bias is not None
    assert result.report.relative_error is not None
    plain = run(amount=0.4, importance="flap", steps=2, compensate=False)
    assert result.report.relative_error < plain.report.relative_error  # type: ignore[operator]


# --- what is left alone ----------------------------------------------------------------------------------


def refusals(result: RunResult) -> str:
    actions = [e for entries in result.state.provenance.values() for e in entries]
    return " | ".join(entry.reason for entry in actions if entry.action == Refuse.__name__)


def test_protected_blocks_and_excluded_names_stay() -> None:
    result = run(amount=0.5, protect_first=1, protect_last=1)
    assert list(result.rounds[0].change.kept) == ["layers.1.up.weight:0"]
    assert "its block is protected" in refusals(result)
    result = run(amount=0.5, exclude=("layers.1.*",))
    assert list(result.rounds[0].change.kept) == ["layers.0.up.weight:0", "layers.2.up.weight:0"]
    assert "excluded by" in refusals(result)


def test_nothing_to_cut_says_why() -> None:
    with pytest.raises(RecipeError, match="its block is protected"):
        run(protect_first=3)
    with pytest.raises(RecipeError, match=r"none of .* granularity leaves channels alone"):
        run(granularity=("heads",))
    with pytest.raises(RecipeError, match="round_to=64 exceeds its 32 channels"):
        run(round_to=64)
    with pytest.raises(RecipeError, match="matches no parameter"):
        run(include=("no.such.*",))


@pytest.mark.parametrize(
    "options",
    [
        {"amount": 0.0},
        {"amount": 1.0},
        {"amount": -0.5},
        {"amount": "half"},
        {"target": "speed"},
        {"importance": "random"},
        {"scope": "layer"},
        {"combine": "median"},
        {"granularity": ()},
        {"granularity": ("layers",)},
        {"round_to": 0},
        {"round_to": 2.0},
        {"max_amount": 0.0},
        {"max_amount": 1.5},
        {"protect_first": -1},
        {"compensate": "yes"},
        {"recover": None},
        {"damping": 0.0},
        {"samples": 0},
        {"steps": 0},
        {"tokens": 0},
        {"balance": 0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="prune-channels"):
        PruneChannels(**options)


@pytest.mark.parametrize(
    ("options", "needs"),
    [({}, False), ({"importance": "flap"}, True), ({"recover": True}, True), ({"compensate": True}, True)],
)
def test_data_are_asked_for_when_needed(options: dict[str, Any], needs: bool) -> None:
    assert PruneChannels(**options).needs_calibration == needs
    if needs:
        with pytest.raises(CalibrationError, match="prune-channels"):
            run_recipe(decoder(), PruneChannels(**options))


def test_quantized_weights_are_not_pruned() -> None:
    with pytest.raises(RecipeError, match=r"quantize-weights"):
        Recipe.load(["quantize-weights", "prune-channels"])


# --- every kind of model ---------------------------------------------------------------------------------

HEADS = ("channels", "heads")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama-tied-odd", {"importance": "flap", "recover": True, "granularity": HEADS}),
    ("gpt2-odd", {"importance": "taylor", "granularity": HEADS, "recover": True}),
    ("bert", {"importance": "taylor-mixed", "granularity": HEADS}),
    ("mixtral", {"importance": "wanda", "target": "parameters", "amount": 0.1}),
    ("vit", {"importance": "wanda", "target": "flops", "amount": 0.1, "granularity": HEADS}),
    ("resnet", {"importance": "flap", "recover": True, "target": "flops", "max_amount": 0.5}),
    ("unet", {"importance": "taylor-second", "recover": True}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_every_kind_of_model(name: str, options: dict[str, Any]) -> None:
    animal = entry(name)
    inputs = {**animal.inputs(2, 8), **animal.options}
    program = capture_model(animal.build(), kwargs=inputs)
    result = run_recipe(program, PruneChannels(**{"amount": 0.3, **options}), [inputs])
    (check,) = [c for c in result.report.checks if c["check"].startswith("cut equals")]
    assert check["passed"]
    assert left(result, "parameters") < 1
    target = options.get("target", "units")
    if target != "units":
        assert left(result, target) <= 1 - options.get("amount", 0.3)


def test_equal_runs_decide_equally() -> None:
    options = {"amount": 0.3, "importance": "taylor-mixed", "recover": True, "scope": "global"}
    one, two = run(**options), run(**options)
    assert one.rounds[0].change == two.rounds[0].change
    for name, tensor in one.program.weights.items():
        assert torch.equal(tensor, two.program.weights[name])
