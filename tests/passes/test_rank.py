from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fxcompress.errors import RecipeError
from fxcompress.passes._rank import (
    Choice,
    Spectrum,
    aligned,
    allocate,
    allocate_ranks,
    break_even,
    budget_rank,
    energy_rank,
    truncation_search,
)


def test_ranks_of_a_budget_are_the_published_ones() -> None:
    assert budget_rank(4096, 11008, 0.8) == 2388  # SVD-LLM's ⌊ρ·m·n/(m + n)⌋
    assert break_even(4096, 4096) == 2048
    assert break_even(4096, 11008) == 2986  # 2985.1: the first rank that does not shrink
    assert budget_rank(3, 3, 0.1) == 0


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 0.99))
def test_a_budgets_rank_fits_and_the_next_does_not(rows: int, columns: int, keep: float) -> None:
    rank = budget_rank(rows, columns, keep)
    assert rank * (rows + columns) <= keep * rows * columns + 1e-6 * (rows + columns)
    assert (rank + 1) * (rows + columns) > keep * rows * columns - 1e-6
    assert break_even(rows, columns) * (rows + columns) >= rows * columns
    assert (break_even(rows, columns) - 1) * (rows + columns) < rows * columns


def test_rank_of_an_energy() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])  # squares 9 4 1 0
    assert [energy_rank(values, e) for e in (0.5, 9 / 14, 0.65, 13 / 14, 0.93, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert energy_rank(torch.zeros(4), 0.9) == 1


def test_multiples() -> None:
    assert [aligned(r, 8, up=False) for r in (5, 8, 15, 16)] == [5, 8, 8, 16]
    assert [aligned(r, 8, up=True) for r in (5, 8, 15, 16)] == [8, 8, 16, 16]
    assert aligned(13, 1, up=False) == 13


def test_allocation_of_the_catalogues_example() -> None:
    grid = (0.0, 0.25, 0.5, 0.75)
    losses = {"a": (0, 0.3, 1, 4), "b": (0, 0.1, 0.2, 0.5)}
    choices = {
        name: [Choice(s, 1 - s, loss) for s, loss in zip(grid, row, strict=True)]
        for name, row in losses.items()
    }
    found = allocate(choices, 1.0)  # mean sparsity 0.5
    assert {name: choice.value for name, choice in found.items()} == {"a": 0.25, "b": 0.75}
    assert sum(choice.loss for choice in found.values()) == pytest.approx(0.8)  # 1.2 when uniform


def test_a_budget_below_the_cheapest_choices_is_an_error() -> None:
    with pytest.raises(RecipeError, match="cannot be met"):
        allocate({"a": [Choice(1, 2.0, 1.0)], "b": [Choice(1, 2.0, 1.0)]}, 3.0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 6), st.integers(0, 20)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 24),
)
def test_allocation_fits_and_leaves_nothing_to_gain(raw: list[list[tuple[int, int]]], budget: int) -> None:
    choices = {
        str(i): [Choice(j, float(cost), float(loss)) for j, (cost, loss) in enumerate(points)]
        for i, points in enumerate(raw)
    }
    least = sum(min(choice.cost for choice in points) for points in choices.values())
    if least > budget:
        with pytest.raises(RecipeError):
            allocate(choices, budget)
        return
    found = allocate(choices, budget)
    spent = sum(choice.cost for choice in found.values())
    assert spent <= budget
    for name, now in found.items():
        assert not any(c.loss < now.loss and spent - now.cost + c.cost <= budget for c in choices[name])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 20)
)
@example([[1, 2], [2, 2]], 2)  # a straight edge of which only a part fits
def test_allocation_is_best_for_convex_losses(gains: list[list[int]], extra: int) -> None:
    choices = {}
    for i, row in enumerate(gains):
        falling = sorted(row, reverse=True)
        losses = [float(sum(falling[j:])) for j in range(len(row) + 1)]
        choices[str(i)] = [Choice(j, 1.0 + j, loss) for j, loss in enumerate(losses)]
    budget = len(gains) + extra
    loss = sum(choice.loss for choice in allocate(choices, budget).values())
    every = itertools.product(*choices.values())
    assert loss == min(sum(c.loss for c in these) for these in every if sum(c.cost for c in these) <= budget)


def spectrum(rows: int, columns: int, decay: float) -> Spectrum:
    return Spectrum(rows, columns, decay ** torch.arange(min(rows, columns), dtype=torch.float64))


def test_weights_that_need_rank_get_it() -> None:
    spectra = {"flat": spectrum(64, 64, 0.99), "steep": spectrum(64, 64, 0.5)}
    ranks = allocate_ranks(spectra, 0.6, 4)
    assert ranks["steep"] is not None
    assert ranks["flat"] is None or ranks["flat"] > ranks["steep"]
    numbers = sum(64 * 64 if rank is None else rank * 128 for rank in ranks.values())
    assert numbers <= 0.6 * 2 * 64 * 64
    whole = allocate_ranks({"one": spectrum(64, 64, 0.99)}, 0.999, 1)
    assert whole == {"one": 31}  # the largest rank below break-even: dense would cost 1.0
    with pytest.raises(RecipeError, match="cannot be met"):
        allocate_ranks(spectra, 0.01, 8)


def test_truncation_search_takes_the_latest_cut_that_fits() -> None:
    trials = {"a": {0.5: 9.0, 0.9: 1.0}, "b": {0.5: 2.0, 0.9: 0.1}}
    sizes = {"a": 100, "b": 100}
    # By damage: a.5, b.5, a.9, b.9. Cut behind a.5: .9 and .5; behind b.5: .9 and .9; behind a.9: 1 and .9.
    expected = {0.5: (0.5, 0.5), 0.7: (0.9, 0.5), 0.8: (0.9, 0.5), 0.9: (0.9, 0.9), 0.95: (1.0, 0.9)}
    for keep, shares in expected.items():
        assert tuple(truncation_search(trials, sizes, keep).values()) == shares
    with pytest.raises(RecipeError, match=r"cannot be met.*0\.50"):
        truncation_search(trials, sizes, 0.4)


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.dictionaries(st.sampled_from([0.4, 0.6, 0.8]), st.floats(0, 10), min_size=1),
        min_size=1,
        max_size=5,
    ),
    st.floats(0.4, 0.99),
)
def test_truncation_search_meets_its_budget(trials: dict[str, dict[float, float]], keep: float) -> None:
    sizes = {name: 10 * len(name) for name in trials}
    total = sum(sizes.values())
    least = sum(sizes[name] * min(tried) for name, tried in trials.items())
    if least > keep * total:
        with pytest.raises(RecipeError):
            truncation_search(trials, sizes, keep)
        return
    shares = truncation_search(trials, sizes, keep)
    assert sum(sizes[name] * share for name, share in shares.items()) <= keep * total * (1 + 1e-6)
    assert all(share == 1 or share in trials[name] for name, share in shares.items())
    assert not math.isnan(sum(shares.values()))
