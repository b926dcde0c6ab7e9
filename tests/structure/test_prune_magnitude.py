"""prune-channels by magnitude: which units stay, what is protected, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress
from fxcompress.calibration import as_calibration
from fxcompress.capture import capture_model
from fxcompress.errors import RecipeError
from fxcompress.manager import RunResult, run_recipe
from fxcompress.passes.prune_channels import PruneChannels, best
from fxcompress.recipe import Recipe
from tests.passes.models import Attention


class Pair(nn.Module):
    """Two layers whose units have known magnitudes."""

    def __init__(self, rows: Tensor, bias: Tensor, columns: Tensor) -> None:
        super().__init__()
        units = rows.numel()
        self.up, self.down = nn.Linear(3, units), nn.Linear(units, 2, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(rows[:, None].expand(units, 3))
            self.up.bias.copy_(bias)
            self.down.weight.copy_(columns.expand(2, units))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def run(model: nn.Module, example: Tensor, *passes: Any, **options: Any) -> RunResult:
    program = capture_model(model.eval(), (example,))
    return run_recipe(program, list(passes), examples=as_calibration([(example,)], program), **options)


def pair() -> Pair:
    """l1 over the group: 3·|row| + |bias| + 2·|column| = 5, 4, 9, 8; l2: √13, √6, √43, √64."""
    rows, bias = torch.tensor([1.0, 1.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    return Pair(rows, bias, torch.tensor([1.0, 0.0, 1.0, 4.0]))


def kept(result: RunResult) -> tuple[int, ...]:
    (units,) = result.rounds[0].change.kept.values()
    return units


@pytest.mark.parametrize(
    ("importance", "amount", "expected"),
    [
        ("l1", 0.5, (2, 3)),
        ("l1", 0.75, (2,)),
        ("l2", 0.75, (3,)),
        ("l1", 0.25, (0, 2, 3)),
        ("l2", 0.5, (2, 3)),
    ],
)
def test_known_magnitudes(importance: str, amount: float, expected: tuple[int, ...]) -> None:
    result = run(pair(), torch.randn(5, 3), PruneChannels(amount=amount, importance=importance))
    assert kept(result) == expected
    assert torch.equal(result.program.weights["down.weight"], pair().down.weight[:, list(expected)])


def test_dead_and_equal_channels() -> None:
    rows = torch.tensor([0.0, 1.0, 1.0, 1.0])
    model = Pair(rows, torch.zeros(4), rows.clone())
    assert kept(run(model, torch.randn(5, 3), PruneChannels())) == (1, 2, 3)
    assert kept(run(model, torch.randn(5, 3), PruneChannels(amount=0.5))) == (1, 2)  # the first of equals


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_the_best_stay(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    chosen = best(torch.tensor(scores, dtype=torch.float64), count).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    rest = [score for index, score in enumerate(scores) if index not in chosen]
    assert not rest or min(scores[index] for index in chosen) >= max(rest)


def test_rounding_keeps_more() -> None:
    result = run(Attention(), torch.randn(2, 5, 20), PruneChannels(amount=0.4, round_to=8))
    assert result.program.weights["down.weight"].shape == (20, 24)  # 17 of 28 wanted
    second = run(Attention(), torch.randn(2, 5, 20), PruneChannels(amount=0.9, round_to=20))
    assert second.program.weights["gate.weight"].shape == (20, 20)


def test_protected_groups_are_left_alone_with_a_reason() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = pair(), pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    result = run(Two(), torch.randn(5, 3), PruneChannels(exclude=("second.down.weight",)))
    assert list(result.rounds[0].change.kept) == ["first.up.weight:0"]
    reasons = {row.name: row.reason for row in result.report.rows}
    assert result.program.weights["second.up.weight"].shape == (4, 3)
    assert (
        "no pass of the recipe compresses weights" in reasons["first.up.weight"] or reasons["first.up.weight"]
    )
    assert "second.down.weight is excluded by 'second.down.weight'" in reasons["second.up.weight"]
    result = run(Two(), torch.randn(5, 3), PruneChannels(include=("second.*",)))
    assert list(result.rounds[0].change.kept) == ["second.up.weight:0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 0}, "amount=0, expected a share above 0 and below 1"),
        ({"amount": 1.0}, "amount=1.0, expected"),
        ({"amount": -0.2}, "amount=-0.2, expected"),
        ({"amount": float("nan")}, "amount=nan, expected"),
        ({"amount": True}, "amount=True, expected"),
        ({"importance": "size"}, "importance='size', expected 'l1'"),
        ({"granularity": ()}, r"granularity=\(\), expected"),
        ({"granularity": ("rows",)}, r"granularity=\('rows',\), expected"),
        ({"round_to": 0}, "round_to=0, expected a positive integer"),
        ({"round_to": 2.0}, r"round_to=2\.0, expected a positive integer"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PruneChannels(**options)


def test_nothing_to_cut_is_an_error() -> None:
    example = torch.randn(5, 3)
    with pytest.raises(RecipeError, match=r"can be cut\..*round_to=8 exceeds its 4 channels"):
        run(pair(), example, PruneChannels(round_to=8))
    with pytest.raises(RecipeError, match=r"can be cut\..*excluded by '\*'"):
        run(pair(), example, PruneChannels(exclude=("*",)))
    with pytest.raises(RecipeError, match=r"can be cut\..*granularity leaves channels alone"):
        run(pair(), example, PruneChannels(granularity=("heads",)))
    with pytest.raises(RecipeError, match="pattern 'middle' matches no parameter"):
        run(pair(), example, PruneChannels(include=("middle",)))


def test_the_order_is_checked_by_name() -> None:
    with pytest.raises(RecipeError, match="'prune-channels' cannot run after 'quantize-weights'"):
        Recipe.load(["quantize-weights", "prune-channels"])
    with pytest.raises(RecipeError, match="'prune-channels' cannot run after 'gptq'"):
        Recipe.load(["gptq", "prune-channels"])
    Recipe.load(["prune-channels", "quantize-weights"])


def test_the_report_tells_sizes_and_costs() -> None:
    small = fxcompress.compress(
        pair().eval(), PruneChannels(amount=0.5), example_inputs=(torch.randn(5, 3),), progress=False
    )
    structure = small.report.structure
    assert structure["before"]["parameters"] == 24
    assert structure["after"]["parameters"] == 12
    assert structure["before"]["flops"] == 5 * 2 * 20
    assert structure["after"]["flops"] == 5 * 2 * 10
    row = next(row for row in small.report.rows if row.name == "up.weight")
    assert (row.shape, row.cut, row.bytes_after) == ((4, 3), (2, 3), 24)
    assert small.report.totals["ratio"] == 2.0


def test_a_cut_model_is_cut_again_only_if_asked() -> None:
    """The same pass on its own result cuts a share of what is left; nothing else changes."""
    first = run(pair(), torch.randn(5, 3), PruneChannels(amount=0.5))
    again = run(pair(), torch.randn(5, 3), PruneChannels(amount=0.5))
    assert kept(first) == kept(again)
    twice = run(
        pair(), torch.randn(5, 3), PruneChannels(amount=0.5), PruneChannels(amount=0.5, importance="l2")
    )
    assert twice.program.weights["up.weight"].shape == (1, 3)
    assert torch.equal(twice.program.weights["up.weight"], pair().up.weight[3:])
