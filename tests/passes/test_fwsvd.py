from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.calibration import as_calibration
from fxcompress.capture.export import capture_model
from fxcompress.errors import CalibrationError, RecipeError
from fxcompress.passes import Fwsvd, Svd
from fxcompress.passes._low_rank_solver import decompose
from tests.engine.models import build, calibration, decoder
from tests.passes.low_rank_cases import MATRICES, run, same_state
from tests.passes.models import Attention


def gradients(name: str) -> Tensor:
    """Σ over batches of the squared next-token gradient, summed over outputs: [K]."""
    total: Any = 0
    for batch in calibration(decoder()).flat():
        model = build()
        weight = model.get_parameter(name).requires_grad_(True)
        ids = batch[0]
        scores = model(ids)
        F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert weight.grad is not None
        total = total + weight.grad.double().square().sum(0)
    result: Tensor = total
    return result


def test_numerics_are_those_of_the_paper_with_autograds_gradients() -> None:
    state = run([{"fwsvd": {"rank": 5}}]).state
    for name in (MATRICES[0], MATRICES[3]):
        importance = gradients(name).sqrt()
        u, v = decompose(decoder().weights[name], importance).factors(5)
        torch.testing.assert_close(state.effective(name).double(), u @ v, rtol=1e-3, atol=1e-4)


def test_constant_gradients_are_plain_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(self: Fwsvd, model: Any) -> dict[str, Tensor]:
        return {name: torch.full((decoder().weights[name].shape[1],), 0.7) for name in MATRICES}

    monkeypatch.setattr(Fwsvd, "look", constant)
    mine, plain = run([Fwsvd(rank=5)]).state, run([Svd(rank=5)]).state
    for name in MATRICES:
        torch.testing.assert_close(mine.effective(name), plain.effective(name), rtol=1e-4, atol=1e-5)


def test_labels_from_the_model_serve_models_without_scores() -> None:
    model = Attention().eval()
    x = torch.randn(2, 9, 20)
    program = capture_model(model, (x,))
    data = as_calibration([(x,)], program)
    with pytest.raises(CalibrationError, match=r"no scores for the token after.*labels='model'"):
        run(["fwsvd"], program, data)
    recipe = [{"fwsvd": {"labels": "model", "keep": 0.6, "multiple": 1}}]
    found = run(recipe, program, data)
    assert any(item["edits"].get("SetWeight") for item in found.report.passes)
    assert same_state(found.state, run(recipe, program, data).state)  # the draws are seeded


def test_global_ranks_from_the_weighted_spectra() -> None:
    found = run([{"fwsvd": {"keep": 0.5, "budget": "global", "multiple": 1}}])
    assert found.report.passes[0]["edits"]["SetWeight"] >= 3


def test_bad_options_are_named() -> None:
    with pytest.raises(RecipeError, match="labels='both'"):
        Fwsvd(labels="both")  # type: ignore[arg-type]
