"""The pass ``distill`` in recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress
from fxcompress.errors import FxCompressError, RecipeError
from fxcompress.forms import CodebookWeight, DoubleQuantizedCodebook, LowRank
from fxcompress.manager import RunResult, run_recipe
from fxcompress.passes import Distill
from fxcompress.presets import PRESETS
from fxcompress.progress import ProgressEvent
from tests.engine.models import capture, decoder, tokens
from tests.training.cases import run_applied

ROWS = [tokens(1, 10, seed=i) for i in range(20)]
FAST = {"steps": 12, "batch_size": 4, "learning_rate": 3e-3}
IDS = tokens(3, 7, seed=77)


def run(*passes: Any, **options: Any) -> RunResult:
    return run_recipe(decoder(), list(passes), ROWS, **{"verify": "each", **options})


def gap(result: RunResult) -> float:
    wanted = torch.log_softmax(decoder().run_flat([IDS])[0], -1)
    found = torch.log_softmax(run_applied(result.program, result.state, IDS), -1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


W3 = {"quantize-weights": {"bits": 3, "group_size": 8}}
SPARSE = {"prune-magnitude": {"pattern": "2:4"}}


@pytest.mark.parametrize(
    ("before", "options", "share"),
    [
        ([W3], {"train": ["weights"]}, 0.8),
        ([W3], {"train": ["weights"], "scale_steps": "range"}, 0.8),
        ([W3], {"train": ["scales"]}, 0.9),
        ([W3], {"train": ["lora"], "rank": 4}, 0.8),
        ([SPARSE], {"train": ["weights", "floats"]}, 0.7),
        (
            [W3, {"quantize-activations": {"bits": 4, "mode": "static"}}],
            {"train": ["weights", "activations"]},
            0.95,
        ),
        ([{"prune-channels": {"amount": 0.3, "recover": True}}], {"train": ["lora", "floats"]}, 0.95),
    ],
)
def test_the_model_comes_nearer_to_the_original(
    before: list[Any], options: dict[str, Any], share: float
) -> None:
    plain, healed = run(*before), run(*before, {"distill": {**FAST, **options}})
    assert gap(healed) < share * gap(plain)


def test_masks_and_formats_stay_and_the_rest_of_the_recipe_goes_on() -> None:
    result = run(SPARSE, {"distill": FAST}, {"quantize-weights": {"bits": 8}}, "pack-sparse")
    for name, mask in result.state.masks.items():
        assert mask.broken_by(result.state.effective(name)) == 0
    assert [entry["name"] for entry in result.report.passes][1] == "distill"
    reasons = [
        e.reason for entries in result.state.provenance.values() for e in entries if e.pass_name == "distill"
    ]
    assert all("12 steps, held-out loss" in reason for reason in reasons)


def test_scales_alone_leave_codes_alone() -> None:
    before, after = run(W3).state, run(W3, {"distill": {**FAST, "train": ["scales"]}}).state
    for name, form in before.forms.items():
        old, new = form.terms[0], after.forms[name].terms[0]
        assert torch.equal(old.codes, new.codes)  # type: ignore[attr-defined]
        assert not torch.equal(old.scale, new.scale)  # type: ignore[attr-defined]


def test_loftq_on_a_codebook_beats_the_rounded_weight_and_is_then_trained() -> None:
    codebook = {"quantize-codebook": {"group_size": 8, "heads": True}}
    residual = {"low-rank-residual": {"rank": 2, "metric": "weights", "iterations": 3}}
    plain, start = run(codebook).state, run(codebook, residual).state
    name = "layers.1.up.weight"
    target = decoder().weights[name]
    errors = [float((state.effective(name) - target).norm()) for state in (plain, start)]
    assert errors[1] < errors[0]
    assert isinstance(start.forms[name].terms[0], CodebookWeight)
    trained = run(codebook, residual, {"distill": {**FAST, "train": ["lora"]}}).state
    terms = trained.forms[name].terms
    assert len(terms) == 2  # the factors that were there are trained, none is added
    assert isinstance(terms[1], LowRank)
    assert torch.equal(terms[0].dense(torch.float32), start.forms[name].terms[0].dense(torch.float32))


def test_double_quantization_of_frozen_scales_survives() -> None:
    codebook = {"quantize-codebook": {"group_size": 8, "heads": True, "double_quant": True}}
    state = run(codebook, {"distill": {**FAST, "train": ["lora"], "rank": 2}}).state
    assert isinstance(state.forms["layers.0.up.weight"].terms[0], DoubleQuantizedCodebook)


def test_a_killed_recipe_goes_on_inside_the_training(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(event: ProgressEvent) -> None:
        if event.stage == "distill" and event.done == 9:
            raise KilledError

    recipe = [W3, {"distill": {**FAST, "objective": {"gkd": {"new_tokens": 2}}}}]
    program = capture()
    whole = run_recipe(program, recipe, ROWS, verify="off").state
    with pytest.raises(KilledError):
        run_recipe(program, recipe, ROWS, verify="off", checkpoint=tmp_path, progress=kill)
    assert list(tmp_path.glob("work-*/step-*"))
    seen: list[ProgressEvent] = []
    again = run_recipe(program, recipe, ROWS, verify="off", checkpoint=tmp_path, progress=seen.append).state
    assert sum(event.stage == "distill" for event in seen) < 6
    for name, form in whole.forms.items():
        assert form.same_as(again.forms[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": []}, "expected any of"),
        ({"train": ["wieghts"]}, "train='wieghts'"),
        ({"objective": "kdd"}, "unknown objective 'kdd'"),
        ({"objective": {"kd": {"hard_ratio": 2}}}, "hard_ratio=2"),
        ({"held_out": 0.0}, "held_out=0.0"),
        ({"rank": 0}, "rank=0"),
        ({"steps": 0}, "steps=0"),
        ({"schedule": "step"}, "schedule"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fxcompress.Recipe.load([{"distill": options}])


def test_bad_runs() -> None:
    with pytest.raises(FxCompressError, match="cannot be held out"):
        run_recipe(decoder(), [W3, Distill(steps=1)], ROWS[:1], verify="off")
    with pytest.raises(FxCompressError, match="needs calibration data"):
        run_recipe(decoder(), [W3, Distill(steps=1)], None)
    with pytest.raises(FxCompressError, match="matches no parameter"):
        run_recipe(decoder(), [W3, Distill(steps=1, include=("nothing*",))], ROWS, verify="off")
    with pytest.raises(FxCompressError, match="nothing to train"):
        run_recipe(decoder(), [W3, Distill(steps=1, exclude=("*",))], ROWS, verify="off")


def test_recipes_that_train_can_be_written_and_read() -> None:
    for name, preset in PRESETS.items():
        if any(isinstance(item, dict) and "distill" in item for item in preset["passes"]):
            recipe = fxcompress.Recipe.load(name)
            assert fxcompress.Recipe.from_yaml(recipe.to_yaml()).to_dict() == recipe.to_dict()
            assert recipe.needs_calibration
