from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.calibration.walk import Plan
from fxcompress.calibration.whole_model import ProgramModel, SurveyModel
from fxcompress.edits import CompressionState, Edit, SetTensor
from fxcompress.errors import CalibrationError
from fxcompress.manager import run_recipe
from fxcompress.pass_base import BlockContext, Pass, SurveyContext
from tests.engine.models import build, calibration, decoder


def function() -> ProgramModel:
    program = decoder()
    batches = calibration(program).flat()
    return SurveyModel(Plan(program), CompressionState(program.weights), batches, "test", 0).function()


def expected(batch: int, tensors: dict[str, Tensor]) -> tuple[Tensor, float]:
    model = build()
    model.load_state_dict({**model.state_dict(), **tensors})
    ids = calibration(decoder()).flat()[batch][0]
    scores = model(ids)
    return scores, float(F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_any_order_of_questions_gives_what_the_module_gives() -> None:
    model = function()
    assert model.batches == 3
    last, first = "layers.2.down.weight", "layers.0.up.weight"
    new = {name: torch.randn_like(decoder().weights[name]) for name in (first, last)}
    for batch, names in (
        (0, ()),
        (0, (last,)),
        (1, (last,)),
        (0, (first,)),
        (0, (last, first)),
        (0, (last,)),
    ):
        tensors = {name: new[name] for name in names}
        scores, loss = expected(batch, tensors)
        torch.testing.assert_close(model(batch, tensors), scores)
        assert float(model.loss(batch, tensors)) == pytest.approx(loss, rel=1e-5)


def test_divergence_is_that_of_the_distributions() -> None:
    model, name = function(), "layers.1.up.weight"
    assert float(model.divergence(0, {name: decoder().weights[name]})) == 0
    changed = {name: decoder().weights[name] * 0.5}
    p = expected(0, {})[0].double().log_softmax(-1)
    q = expected(0, changed)[0].double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert float(model.divergence(0, changed)) == pytest.approx(kl, rel=1e-4)


def test_a_tensor_for_nothing_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"nothing\.weight is no parameter that the model uses"):
        function()(0, {"nothing.weight": torch.zeros(2, 2)})
    program = decoder()
    with pytest.raises(CalibrationError, match="no calibration data"):
        SurveyModel(Plan(program), CompressionState(program.weights), None, "test", 0).function()


@dataclass(frozen=True)
class HalveTheLargest(Pass):
    """Looks at all weights before the first block and halves the largest."""

    name: ClassVar[str] = "halve-the-largest"
    surveys: ClassVar[list[float]] = []

    def survey(self, model: SurveyContext) -> str:
        norms = {
            site.name: float(block.weight(site.name).norm())
            for block in model.blocks()
            for site in block.sites
        }
        self.surveys.append(sum(norms.values()))
        return max(norms, key=lambda name: norms[name])

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        for site in block.sites:
            if site.name == block.survey:
                yield SetTensor(site.name, block.weight(site.name) * 0.5)


def test_a_survey_is_asked_for_once_and_sees_the_model_before_the_pass(tmp_path: Any) -> None:
    HalveTheLargest.surveys.clear()
    first = run_recipe(decoder(), [HalveTheLargest()], checkpoint=tmp_path).state
    assert len(HalveTheLargest.surveys) == 1
    run_recipe(decoder(), [HalveTheLargest()], checkpoint=tmp_path)
    assert len(HalveTheLargest.surveys) == 1  # every step is stored
    newest = max(tmp_path.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()
    again = run_recipe(decoder(), [HalveTheLargest()], checkpoint=tmp_path).state
    assert HalveTheLargest.surveys[0] == HalveTheLargest.surveys[1]  # not what the stored steps made of it
    assert set(first.tensors) == set(again.tensors)
