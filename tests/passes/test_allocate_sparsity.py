"""Allocation: known vectors, exact budgets within bounds, blocks that differ, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.calibration import as_calibration
from fxcompress.edits import SetSensitivity
from fxcompress.errors import RecipeError
from fxcompress.manager import run_recipe
from fxcompress.passes._allocation import allocate
from fxcompress.passes.allocate_sparsity import AllocateSparsity, outlier_share
from tests.engine.models import capture, tokens


def noted(
    measure: str, values: list[float], spread: float, bounds: Any = (0.0, 0.99)
) -> dict[str, SetSensitivity]:
    return {str(i): SetSensitivity(str(i), measure, v, spread, bounds) for i, v in enumerate(values)}


def shares(measure: str, values: list[float], spread: float, mean: float) -> list[float]:
    return list(allocate("p", noted(measure, values, spread), dict.fromkeys("0123456789", 8), mean).values())


def test_known_vectors() -> None:
    assert shares("samsp", [5, 4, 3, 2, 1], 0.2, 0.5) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert shares("owl", [1, 2, 3, 6], 0.08, 0.7) == pytest.approx([0.764, 0.732, 0.7, 0.604])
    assert shares("owl", [2, 2, 2], 0.08, 0.7) == pytest.approx([0.7] * 3)
    assert shares("samsp", [7.0], 0.2, 0.5) == [0.5]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["samsp", "owl"]),
    st.lists(st.floats(0, 10), min_size=1, max_size=9),
    st.lists(st.integers(1, 1000), min_size=9, max_size=9),
    st.floats(0.05, 0.9),
    st.floats(0.01, 0.5),
)
def test_the_mean_over_entries_is_met_within_bounds(
    measure: str, values: list[float], sizes: list[int], mean: float, spread: float
) -> None:
    notes = noted(measure, values, spread, (0.05, 0.9))
    weights = {name: sizes[int(name)] for name in notes}
    found = allocate("p", notes, weights, mean)
    assert all(0.05 - 1e-9 <= share <= 0.9 + 1e-9 for share in found.values())
    total = sum(weights.values())
    assert sum(found[n] * weights[n] for n in found) / total == pytest.approx(mean, abs=1e-9)
    order = sorted(found, key=lambda n: -notes[n].value)
    assert all(found[a] <= found[b] + 1e-9 for a, b in itertools.pairwise(order))


def test_shares_of_outliers() -> None:
    assert outlier_share([torch.tensor([1.0, 1, 1]), torch.tensor([1.0, 1, 1, 1, 9])], 3.0) == 12.5


@pytest.mark.parametrize("method", ["owl", "samsp"])
@pytest.mark.parametrize("pruning", ["prune-magnitude", "wanda", "sparsegpt"])
def test_used_by_every_pruning_pass(method: str, pruning: str) -> None:
    program = capture()
    data = as_calibration([{"input_ids": tokens(seed=s)} for s in range(3)], program)
    recipe = [{"allocate-sparsity": {"method": method}}, {pruning: {"sparsity": 0.6}}]
    state = run_recipe(program, recipe, data, verify="off").state
    found = {name: mask.pruned / mask.keep.numel() for name, mask in state.masks.items()}
    assert len(set(found.values())) > 1
    # Rows lose whole numbers of weights, so that Wanda's total may fall short by less than one a row.
    rows = sum(mask.matrix.shape[1] for mask in state.masks.values()) if pruning == "wanda" else 6
    total = sum(mask.keep.numel() for mask in state.masks.values())
    assert 0.6 * total - rows <= sum(mask.pruned for mask in state.masks.values()) <= 0.6 * total + 1e-6
    by_value = sorted(state.sensitivities.values(), key=lambda note: note.value)
    assert found[by_value[0].name] > found[by_value[-1].name]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([{"allocate-sparsity": {}}, "gptq"], "no pruning pass follows"),
        ([{"allocate-sparsity": {}}, {"wanda": {"pattern": "2:4"}}], "nothing can be divided"),
        (
            [{"allocate-sparsity": {"highest": 0.6}}, {"wanda": {"sparsity": 0.7}}],
            "mean sparsity of 0.7, which cannot be met",
        ),
        ([{"allocate-sparsity": {}}, {"prune-magnitude": {"scope": "global"}}], "divides the zeros itself"),
    ],
)
def test_budgets_and_recipes_that_cannot_be_met(recipe: Any, message: str) -> None:
    program = capture()
    data = as_calibration([{"input_ids": tokens()}], program)
    with pytest.raises(RecipeError, match=message):
        run_recipe(program, recipe, data)
    with pytest.raises(RecipeError, match=r"cannot be met with layers between 0 and 0\.5"):
        allocate("p", noted("owl", [1, 2], 0.1, (0.0, 0.5)), {"0": 1, "1": 1}, 0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "expected 'owl' or 'samsp'"),
        ({"spread": 0.0}, "between 0 and 1"),
        ({"outlier": -1}, "expected a number"),
        ({"lowest": 0.9, "highest": 0.5}, "lowest < highest"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AllocateSparsity(**options)
