from __future__ import annotations

from typing import Any

import pytest
import torch

from fxcompress.calibration import as_calibration
from fxcompress.edits import CompressionState
from fxcompress.errors import CalibrationError, RecipeError
from fxcompress.passes import SvdLlm
from fxcompress.passes._low_rank_solver import cholesky_root, decompose, output_loss
from tests.engine.models import calibration, capture, decoder, tokens
from tests.passes.low_rank_cases import MATRICES, inputs_of, low_rank, run, same_state
from tests.passes.models import Convolutions
from tests.passes.one_block import block_of, compressed, refusals


def loss(state: CompressionState, name: str) -> float:
    x = inputs_of(decoder(), name, calibration(decoder())).double()
    difference = decoder().weights[name].double() - state.effective(name).double()
    return float((x @ difference.T).square().sum() / len(x))


def test_the_first_layer_loses_the_discarded_squares() -> None:
    name = MATRICES[0]
    state = run([{"svd-llm": {"rank": 5}}]).state
    x = inputs_of(decoder(), name, calibration(decoder())).double()
    w = decoder().weights[name].double()
    found = decompose(w, cholesky_root(x.T @ x / len(x)))
    expected = found.loss(5)
    assert loss(state, name) == pytest.approx(expected, rel=1e-4)  # factors are float32
    entry = next(e for e in state.provenance[name] if e.action == "SetWeight")
    assert entry.error == pytest.approx((expected / found.energy) ** 0.5, rel=1e-3)
    u, v = found.factors(5)
    assert output_loss(w - u @ v, x.T @ x / len(x)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("other", ["svd", "asvd", "fwsvd"])
def test_never_worse_than_other_metrics_on_its_data(other: str) -> None:
    name = MATRICES[0]  # the first weight: its inputs are those of the original model
    mine = run([{"svd-llm": {"rank": 5}}]).state
    theirs = run([{other: {"rank": 5}}]).state
    assert loss(mine, name) <= loss(theirs, name) * (1 + 1e-4)


def test_earlier_layers_change_what_later_ones_fit() -> None:
    staged = run([{"svd-llm": {"rank": 5}}]).state
    at_once = run([{"svd-llm": {"rank": 5, "sequential": "block"}}]).state
    refitted = run([{"svd-llm": {"rank": 5, "sequential": "block", "refit": True}}]).state
    first = MATRICES[0]
    assert low_rank(staged, first).same_as(low_rank(at_once, first))
    last = MATRICES[1]
    assert not low_rank(staged, last).same_as(low_rank(at_once, last))
    assert torch.equal(
        low_rank(refitted, last).v.tensors()["values"], low_rank(at_once, last).v.tensors()["values"]
    )
    assert not torch.equal(
        low_rank(refitted, last).u.tensors()["values"], low_rank(at_once, last).u.tensors()["values"]
    )


def test_shrinkage_of_one_weighs_inputs_by_their_own_size() -> None:
    name = MATRICES[0]
    state = run([{"svd-llm": {"rank": 5, "shrinkage": 1.0}}]).state
    x = inputs_of(decoder(), name, calibration(decoder())).double()
    u, v = decompose(decoder().weights[name], x.square().mean(0).sqrt()).factors(5)
    torch.testing.assert_close(state.effective(name).double(), u @ v, rtol=1e-3, atol=1e-4)


def test_a_second_run_and_a_resumed_one_are_the_same(tmp_path: Any) -> None:
    recipe = [{"svd-llm": {"keep": 0.6, "budget": "global", "multiple": 2}}]
    first = run(recipe, checkpoint=tmp_path).state
    assert same_state(first, run(recipe).state)
    stored = sorted(tmp_path.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    stored[-1].unlink()  # the last block is solved again: with the survey of the whole, unchanged model
    assert same_state(first, run(recipe, checkpoint=tmp_path).state)


def test_convolutions_see_their_windows() -> None:
    image = torch.randn(2, 3, 13, 12) * torch.tensor([0.1, 1.0, 5.0]).reshape(1, 3, 1, 1)
    block = block_of(Convolutions(), (image,))
    edits = block.run(SvdLlm(keep=0.7, multiple=1))
    assert compressed(edits)
    assert any("grouped" in reason for reason in refusals(edits).values())


def test_a_channel_that_is_never_active_and_repeated_tokens() -> None:
    program = capture()
    program.weights["embed.weight"][:, 3] = 0
    same = as_calibration([{"input_ids": torch.full((2, 6), 7)}], program)
    state = run([{"svd-llm": {"rank": 5}}], program, same).state
    assert all(bool(torch.isfinite(state.effective(name)).all()) for name in MATRICES)


def test_data_that_overflow_are_an_error() -> None:
    program = capture()
    program.weights["layers.1.norm.weight"].mul_(1e38)
    with pytest.raises(CalibrationError, match="NaN or inf"):
        run([{"svd-llm": {"rank": 5}}], program, as_calibration([{"input_ids": tokens()}], program))


def test_data_are_needed() -> None:
    from fxcompress.manager import run_recipe

    with pytest.raises(CalibrationError, match="'svd-llm' needs calibration data"):
        run_recipe(decoder(), ["svd-llm"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"refit": True}, "nothing to fit"),
        ({"sequential": "layer"}, "sequential='layer'"),
        ({"shrinkage": 1.5}, "shrinkage=1.5"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        SvdLlm(**options)
