"""Removing blocks: which ones go, and what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.capture.export import capture_model
from fxcompress.errors import CalibrationError, RecipeError
from fxcompress.manager import RunResult, run_recipe
from fxcompress.passes import RemoveBlocks
from fxcompress.passes.remove_blocks import angle
from fxcompress.recipe import Recipe
from tests.engine.models import Decoder, build, calibration, decoder, tokens
from tests.zoo import entry

CRITERIA = ("perplexity", "taylor", "angular")


def removed(result: RunResult) -> list[list[str]]:
    assert result.report.structure is not None
    return [one["removed"] for one in result.report.structure["rounds"]]


def run(program: Any = None, **options: Any) -> RunResult:
    program = decoder() if program is None else program
    return run_recipe(program, RemoveBlocks(**options), calibration(program))


def fluent(model: Decoder) -> Tensor:
    """Text that the model finds likely, because it wrote it: ``[4, 12]``."""
    model.head.weight.mul_(4)
    ids = tokens(4, 1)
    while ids.shape[1] < 12:
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_block_that_adds_nothing_goes_and_nothing_changes(criterion: str) -> None:
    model = build()
    model.layers[1].down.weight.zero_()
    text = fluent(model)
    program = capture_model(model, kwargs={"input_ids": tokens()})
    recipe = RemoveBlocks(count=1, criterion=criterion)  # type: ignore[arg-type]
    result = run_recipe(program, recipe, [{"input_ids": text}])
    assert removed(result) == [["layers.1"]]
    assert torch.equal(result.program.run(kwargs={"input_ids": tokens()}), model(tokens()))
    assert sorted(n for n in result.program.weights if "layers" in n and "up.weight" in n) == [
        "layers.0.up.weight",
        "layers.1.up.weight",
    ]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_protected_ends_stay(criterion: str) -> None:
    result = run(count=1, criterion=criterion, protect_first=1, protect_last=1)
    assert removed(result) == [["layers.1"]]


def test_one_block_has_its_parameters() -> None:
    result = run(count=1)
    before, after = result.report.structure["before"], result.report.structure["after"]  # type: ignore[index]
    assert before["block_parameters"] - after["block_parameters"] == 2 * 16 * 32 + 32 + 2 * 16


def test_the_share_is_of_the_blocks() -> None:
    assert len(removed(run(amount=0.5))[0]) == 2  # of three
    assert len(removed(run(amount=0.05))[0]) == 1


def test_steps_score_what_is_left() -> None:
    at_once, in_turn = run(count=2), run(count=2, steps=2)
    assert [len(names) for names in removed(in_turn)] == [1, 1]
    assert removed(in_turn)[0][0] in removed(at_once)[0]
    single = run(count=1)
    again = run(single.program, count=1)
    names = [set(run_.program.weights) for run_ in (in_turn, again)]
    assert names[0] == names[1]
    for name in names[0]:
        assert torch.equal(in_turn.program.weights[name], again.program.weights[name])


def test_a_run_of_blocks_is_judged_by_its_ends() -> None:
    model = build()
    for layer in (1, 2):  # together they turn little, block 0 turns most
        model.layers[layer].down.weight.mul_(0.01)
    model.layers[0].down.weight.mul_(3)
    program = capture_model(model, kwargs={"input_ids": tokens()})
    result = run(program, count=2, criterion="angular", contiguous=True)
    assert removed(result) == [["layers.1", "layers.2"]]


def test_angles() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    y = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert angle(x, y) == pytest.approx((0 + 0.5 + 1) / 3)
    assert angle(x, 5 * x) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "criterion"), [("llama-tied-odd", "perplexity"), ("gpt2-odd", "taylor"), ("bert", "perplexity")]
)
def test_every_kind_of_model(name: str, criterion: str) -> None:
    animal = entry(name)
    inputs = {**animal.inputs(2, 8), **animal.options}
    program = capture_model(animal.build(), kwargs=inputs)
    result = run_recipe(program, RemoveBlocks(count=1, criterion=criterion), [inputs])  # type: ignore[arg-type]
    assert len(removed(result)[0]) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"amount": 0},
        {"amount": 1},
        {"amount": True},
        {"count": 0},
        {"count": 1.5},
        {"criterion": "random"},
        {"contiguous": True},
        {"protect_first": -1},
        {"steps": 0},
        {"samples": 0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="remove-blocks"):
        RemoveBlocks(**options)


def test_what_cannot_be_removed_is_said() -> None:
    with pytest.raises(RecipeError, match="one must stay"):
        run(count=3)
    with pytest.raises(RecipeError, match=r"2 blocks cannot go.*of which 1"):
        run(count=2, protect_first=2)
    with pytest.raises(CalibrationError, match="remove-blocks"):
        run_recipe(decoder(), RemoveBlocks())


def test_after_quantization_it_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"quantize-weights.*remove-blocks|remove-blocks.*quantize-weights"):
        Recipe.load(["quantize-weights", "remove-blocks"])
