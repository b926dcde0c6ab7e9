from __future__ import annotations

from typing import Any

import pytest
import torch

from fxcompress.calibration import as_calibration
from fxcompress.calibration.walk import Plan
from fxcompress.calibration.whole_model import SurveyModel
from fxcompress.capture.export import capture_model
from fxcompress.edits import CompressionState
from fxcompress.errors import CalibrationError, CoverageError, RecipeError
from fxcompress.manager import run_recipe
from fxcompress.passes import Laser
from tests.engine.models import calibration, capture, decoder
from tests.passes.low_rank_cases import MATRICES, low_rank, refusal, run
from tests.passes.models import Attention


def off(share: float, **options: Any) -> Laser:
    return Laser(search="off", shares=(share,), **options)


def test_values_beyond_the_cut_are_zero_and_the_weight_stays_dense() -> None:
    result = run_recipe(decoder(), [off(0.3)])
    for name in MATRICES:
        assert name not in result.state.forms
        values = torch.linalg.svdvals(result.state.tensors[name].double())
        assert float(values[4:].max()) < 1e-6 * float(values[0])  # ⌊0.3 · 16⌋ = 4
        before = torch.linalg.svdvals(decoder().weights[name].double())
        torch.testing.assert_close(values[:4], before[:4], rtol=1e-5, atol=1e-6)
    assert result.report.totals["ratio"] == 1.0


def test_the_full_rank_is_the_identity() -> None:
    with pytest.raises(CoverageError, match="'laser' made no edit"):
        run_recipe(decoder(), [off(1.0)])


def test_a_weight_of_that_rank_is_unchanged() -> None:
    program = capture()
    for name in MATRICES:
        w = program.weights[name]
        w.copy_(torch.randn(w.shape[0], 3) @ torch.randn(3, w.shape[1]))
    state = run_recipe(program, [off(0.25)]).state
    for name in MATRICES:
        torch.testing.assert_close(state.weight(name), program.weights[name], rtol=1e-4, atol=1e-4)


def test_factored_where_that_takes_less_room() -> None:
    result = run_recipe(decoder(), [off(0.3, factored=True)])
    assert all(low_rank(result.state, name).rank == 4 for name in MATRICES)
    dense = run_recipe(decoder(), [off(0.9, factored=True)]).state
    assert not dense.forms  # rank 14 is above break-even
    assert set(dense.tensors) == set(MATRICES)


def losses(program: Any, state: CompressionState) -> float:
    model = SurveyModel(Plan(program), state, calibration(program).flat(), "test", 0).function()
    return sum(float(model.loss(batch)) for batch in range(model.batches)) / model.batches


@pytest.mark.parametrize("search", ["greedy", "single"])
def test_the_search_lowers_the_loss(search: str) -> None:
    recipe = [{"laser": {"search": search, "shares": [0.5, 0.25, 0.1]}}]
    state = run(recipe).state
    chosen = [name for name in MATRICES if name in state.tensors]
    assert chosen
    assert len(chosen) == 1 or search == "greedy"
    before = losses(decoder(), CompressionState(decoder().weights))
    after = losses(decoder(), state)
    assert after <= before
    reason = next(e.reason for e in state.provenance[chosen[0]] if e.action == "SetTensor")
    if search == "single":
        assert reason.endswith(f"loss {before:.4f} → {after:.4f}")
    for name in set(MATRICES) - set(chosen):
        assert refusal(state, name, "laser") == "no lower rank of it lowers the loss"
    again = run(recipe).state
    assert all(torch.equal(state.tensors[name], again.tensors[name]) for name in chosen)


def test_it_goes_before_quantizers_and_composes_with_them() -> None:
    state = run([off(0.3), "quantize-weights"]).state
    assert all(len(state.forms[name].terms) == 1 for name in MATRICES)
    with pytest.raises(RecipeError, match="'laser' cannot run after 'quantize-weights'"):
        run(["quantize-weights", off(0.3)])


def test_a_search_needs_labels() -> None:
    x = torch.randn(2, 9, 20)
    program = capture_model(Attention().eval(), (x,))
    with pytest.raises(CalibrationError, match="no scores for the token after"):
        run(["laser"], program, as_calibration([(x,)], program))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shares": (0.5, 1.5)}, "shares=1.5"),
        ({"shares": ()}, "0 shares"),
        ({"search": "off"}, "4 shares with search='off'"),
        ({"search": "all"}, "search='all'"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Laser(**options)
