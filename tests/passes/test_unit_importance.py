"""Scores of units: known answers, and what they must not depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress.analysis.channel_group import ChannelGroup, GroupMember
from fxcompress.calibration import as_calibration
from fxcompress.calibration.statistics import ActivationStatistics
from fxcompress.capture.export import capture_model
from fxcompress.manager import run_recipe
from fxcompress.pass_base import ModelContext
from fxcompress.passes import PruneChannels
from fxcompress.passes._unit_importance import COMBINE, Taylor, _Sums
from tests.engine.models import calibration, decoder


@dataclass(frozen=True)
class Recording(PruneChannels):
    """Keeps the scores it computed."""

    name: ClassVar[str] = "recording"
    seen: ClassVar[dict[str, Tensor]] = {}

    def scores(self, model: ModelContext, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
        found = super().scores(model, groups)
        self.seen.clear()
        self.seen.update(found)
        return found


class TwoUnits(nn.Module):
    """Hands its inputs on to W = [[1, 2], [3, 0]]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2, bias=False)
        self.down = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(2))
            self.down.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


def scores_of(importance: str, **options: Any) -> list[float]:
    program = capture_model(TwoUnits().eval(), (torch.ones(3, 2),))
    x = torch.tensor([[1.0, 1.0], [3.0, 1.0], [5.0, 4.0]])
    data = as_calibration([(x,)], program, samples=100)
    run_recipe(
        program, Recording(0.5, importance=importance, compensate=False, **options), data, verify="off"
    )
    (found,) = Recording.seen.values()
    return found.tolist()


def test_magnitudes_sum_over_what_computes_and_what_reads() -> None:
    assert scores_of("l1") == [1 + 4, 1 + 2]
    assert scores_of("l2") == pytest.approx([(1 + 10) ** 0.5, (1 + 4) ** 0.5])


def test_fluctuation_is_the_population_variance_times_the_columns() -> None:
    assert scores_of("flap") == pytest.approx([8 / 3 * 10, 2 * 4], rel=1e-6)  # 26.67, 8


def test_wanda_weighs_columns_by_the_root_mean_square() -> None:
    assert scores_of("wanda") == pytest.approx([4 * (35 / 3) ** 0.5, 2 * 6**0.5], rel=1e-6)


class ThreeExperts(nn.Module):
    """Tokens go to the expert of the largest coordinate; the third is never chosen. One matrix each."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(2, 3, bias=False)
        self.matrices = nn.Parameter(torch.ones(3, 2, 2) * torch.tensor([1.0, 2.0, 9.0])[:, None, None])
        self.last = nn.Linear(2, 1)
        with torch.no_grad():
            self.gate.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).topk(1).indices.reshape(-1)
        experts, places = chosen.sort()
        ends = torch.histc(experts.float(), 3, 0, 2).cumsum(0, dtype=torch.int32)
        made = torch.ops.transformers.grouped_mm_fallback(x[places], self.matrices, ends)
        y: Tensor = self.last(made[places.argsort()])
        return y


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        ("l1", [1 + 4, 1 + 8, 2 + 36]),
        ("wanda", [2 * (20 / 3) ** 0.5 + 2 * (2 / 3) ** 0.5, 4 * (1 / 3) ** 0.5 + 4 * 3**0.5, 0]),
        ("flap", [2 * 1 * 2 / 3, 0, 0]),  # the first expert has two of three rows, which differ in x_0
    ],
)
def test_experts_are_judged_by_the_rows_they_are_given(importance: str, expected: list[float]) -> None:
    import transformers.integrations.moe  # noqa: F401  (registers the grouped product)

    x = torch.tensor([[4.0, 1.0], [1.0, 3.0], [2.0, 1.0]])
    program = capture_model(ThreeExperts().eval(), (torch.randn(3, 2),))
    options = {"importance": importance, "granularity": "experts"}
    run_recipe(program, Recording(0.3, **options), as_calibration([(x,)], program), verify="off")  # type: ignore[arg-type]
    (found,) = Recording.seen.values()
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def member() -> GroupMember:
    return GroupMember("w", 0, torch.arange(2).unsqueeze(1), "produces")


def taylor(order: str, gradients: Sequence[Tensor], weight: Tensor, *, vector: bool = False) -> list[float]:
    place = member()
    sums = _Sums(weight, [place], Taylor(order, vector))
    for gradient in gradients:
        sums.add(gradient)
    return [float(score) for score in sums.score(place)]


def test_taylor_scores_of_a_squared_error() -> None:
    """L = ½ (w·x − t)² with w = (1, 2), x = (1, 1), t = 0 has the gradient (3, 3)."""
    weight, gradient = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [3.0]])
    assert taylor("first", [gradient], weight) == [3, 6]
    assert taylor("second", [gradient], weight) == [9, 36]
    assert taylor("mixed", [gradient], weight) == [1.5, 12]
    assert taylor("first", [gradient], weight, vector=True) == [3, 6]


def test_batches_average_before_the_magnitude_and_squares_do_not_cancel() -> None:
    weight = torch.tensor([[1.0, -1.0], [2.0, 1.0]])
    one, two = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[-1.0, 3.0], [1.0, 0.0]])
    assert taylor("first", [one, two], weight) == [2, 2]  # ḡ = (0, 2), (1, 0)
    assert taylor("first", [one, two], weight, vector=True) == [2, 2]
    assert taylor("second", [one, two], weight) == [(1 + 1 + 1 + 9) / 2, 4]
    assert taylor("first", [one], weight, vector=True) == [0, 2]  # 1 − 1 cancel in the vector


def test_members_combine() -> None:
    scores = torch.tensor([[1.0, 4.0], [2.0, 2.0]], dtype=torch.float64)
    combined = {name: combine(scores).tolist() for name, combine in COMBINE.items()}
    assert combined == {"sum": [3, 6], "mean": [1.5, 3], "max": [2, 4], "prod": [2, 8]}


def test_taylor_of_the_model_is_weight_times_gradient() -> None:
    """Against autograd through the whole model."""
    from tests.engine.models import build
    from tests.engine.test_model_loss import by_autograd, next_token

    data = calibration(decoder())
    recipe = Recording(0.5, importance="taylor", samples=None)
    run_recipe(decoder(), recipe, data, verify="off")
    grads = by_autograd(build(), [next_token(batch.inputs[0]) for batch in data.batches])
    model = dict(build().named_parameters())
    for layer in range(3):
        wanted = torch.zeros(32)
        for part, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
            name = f"layers.{layer}.{part}"
            change = model[name] * torch.stack([g[name] for g in grads]).mean(0)
            wanted += change.abs().movedim(dim, 0).reshape(32, -1).sum(1)
        found = Recording.seen[f"layers.{layer}.up.weight:0"]
        torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-6)


def test_combining_by_product_lets_a_weak_member_decide() -> None:
    data = calibration(decoder())
    seen = {}
    for combine in ("sum", "prod", "max", "mean"):
        recipe = Recording(0.5, importance="taylor-second", combine=combine)  # type: ignore[arg-type]
        run_recipe(decoder(), recipe, data, verify="off")
        seen[combine] = Recording.seen["layers.0.up.weight:0"]
    torch.testing.assert_close(seen["mean"] * 3, seen["sum"])
    assert bool((seen["max"] <= seen["sum"] + 1e-12).all())
    assert not torch.equal(seen["prod"].argsort(), seen["sum"].argsort())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    width=st.integers(1, 5),
    shift=st.sampled_from([0.0, 3.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_the_variance_over_batches_is_that_of_all_rows(
    rows: list[int], width: int, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, width, generator=generator) + shift for n in rows]
    statistics = ActivationStatistics("x")
    for batch in batches:
        statistics.update(batch)
    wanted = torch.cat(batches).double().var(0, unbiased=False)
    torch.testing.assert_close(statistics.variance.double(), wanted, rtol=1e-5, atol=1e-12 * (1 + shift**2))
    assert bool((statistics.variance >= 0).all())
