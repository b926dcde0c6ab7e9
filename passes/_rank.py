"""Ranks: from a share of the parameters, from energy, and by allocation over all weights of a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import RecipeError


def budget_rank(rows: int, columns: int, keep: float) -> int:
    """Largest rank whose factors hold at most ``keep`` of the matrix' numbers: ``⌊keep·N·K / (N + K)⌋``.

    Example:
        >>> budget_rank(4096, 11008, 0.8)
        2388
    """
    return math.floor(keep * rows * columns / (rows + columns) + 1e-9)


def break_even(rows: int, columns: int) -> int:
    """Least rank at which two factors neither take less room nor fewer multiplications than the matrix."""
    return math.ceil(rows * columns / (rows + columns))


def energy_rank(values: Tensor, energy: float) -> int:
    """Least k with ``Σ_{i≤k} σ² ≥ energy · Σ σ²``.

    Args:
        values: Singular values, descending.
        energy: In (0, 1]. 1 keeps every singular value above the resolution of float32, in which weights are
            stored at best.
    """
    squares = values.double().square()
    total = float(squares.sum())
    if total == 0:
        return 1
    if energy == 1:
        floor = float(values[0]) * torch.finfo(torch.float32).eps * len(values)
        return max(1, int((values > floor).sum()))
    reached = squares.cumsum(0) >= energy * total * (1 - 1e-12)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(values)


def aligned(rank: int, multiple: int, *, up: bool) -> int:
    """``rank`` rounded to a multiple, down unless ``up``; below one multiple it stays as it is."""
    if multiple <= 1 or (rank < multiple and not up):
        return rank
    return -(-rank // multiple) * multiple if up else rank // multiple * multiple


@dataclass(frozen=True)
class Choice:
    """One way to treat a weight.

    Args:
        value: What is chosen: a rank, a sparsity, a width.
        cost: What it takes of the budget.
        loss: What it does to the outputs; losses of different weights are added.
    """

    value: float
    cost: float
    loss: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """One choice per weight with least total loss whose costs fit the budget.

    Every weight starts at its cheapest choice; steps along the lower convex hull of its (cost, loss)
    points are then taken in the order of loss saved per cost, as long as they fit. Where the hulls reach
    the budget that is the best allocation (the Lagrangian solution). What is left is spent on choices
    inside the hulls.

    Raises:
        RecipeError: the cheapest choices together cost more than the budget.

    Example:
        >>> grid = [Choice(s, 1 - s, l) for s, l in ((0, 0.0), (0.25, 0.3), (0.5, 1.0), (0.75, 4.0))]
        >>> allocate({"a": grid}, 0.6)["a"].value
        0.5
    """
    hulls = {name: _lower_hull(points) for name, points in choices.items()}
    spent = sum(hull[0].cost for hull in hulls.values())
    if spent > budget * (1 + 1e-9):
        raise RecipeError(
            f"the budget of {budget:g} cannot be met: the cheapest choices cost {spent:g} together.",
            fix="raise keep, or offer cheaper choices (for ranks: a smaller multiple).",
        )
    steps = [
        ((a.loss - b.loss) / (b.cost - a.cost), name, index)
        for name, hull in hulls.items()
        for index, (a, b) in enumerate(itertools.pairwise(hull))
    ]
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    at = dict.fromkeys(hulls, 0)
    for _, name, index in steps:
        hull = hulls[name]
        more = hull[index + 1].cost - hull[index].cost
        if at[name] == index and spent + more <= budget * (1 + 1e-9):
            at[name] += 1
            spent += more
    found = {name: hull[at[name]] for name, hull in hulls.items()}
    _fill(choices, found, budget * (1 + 1e-9) - spent)
    return found


def _fill(choices: Mapping[str, Sequence[Choice]], found: dict[str, Choice], left: float) -> None:
    """Spend what is left on choices inside the hulls, always the one that saves most loss per cost."""
    while True:
        best: tuple[float, str, Choice] | None = None
        for name, points in choices.items():
            now = found[name]
            for point in points:
                more, saved = point.cost - now.cost, now.loss - point.loss
                if saved > 0 and 0 < more <= left and (best is None or saved / more > best[0]):
                    best = saved / more, name, point
        if best is None:
            return
        left -= best[2].cost - found[best[1]].cost
        found[best[1]] = best[2]


def _lower_hull(points: Sequence[Choice]) -> list[Choice]:
    """Choices on the lower convex hull by rising cost and falling loss, those within its edges included.

    Small steps can still be taken where the whole edge does not fit the budget.
    """
    hull: list[Choice] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if hull and point.loss >= hull[-1].loss:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (a.loss - b.loss) * (point.cost - b.cost) >= (b.loss - point.loss) * (b.cost - a.cost):
                break
            hull.pop()
        hull.append(point)
    return hull


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of one weight, in the metric of the method.

    Args:
        rows, columns: N and K.
        values: Descending.
    """

    rows: int
    columns: int
    values: Tensor


def allocate_ranks(spectra: Mapping[str, Spectrum], keep: float, multiple: int) -> dict[str, int | None]:
    """Ranks that keep ``keep`` of all numbers together and lose least; None leaves a weight whole.

    A weight's loss is its discarded energy over its whole energy, so that weights whose outputs are small
    count as much as others.

    Raises:
        RecipeError: not even rank 1 (or one multiple) everywhere fits.
    """
    choices: dict[str, list[Choice]] = {}
    for name, spectrum in spectra.items():
        numbers = spectrum.rows * spectrum.columns
        squares = spectrum.values.double().square()
        total = float(squares.sum()) or 1.0
        tail = (squares.sum() - squares.cumsum(0)).clamp_min(0) / total
        limit = break_even(spectrum.rows, spectrum.columns)
        first = min(multiple, max(1, limit - 1))
        ranks = range(first, min(limit, len(squares) + 1), multiple)
        each = spectrum.rows + spectrum.columns
        choices[name] = [Choice(rank, rank * each, float(tail[rank - 1])) for rank in ranks]
        choices[name].append(Choice(math.inf, numbers, 0.0))
    total_numbers = sum(spectrum.rows * spectrum.columns for spectrum in spectra.values())
    found = allocate(choices, keep * total_numbers)
    return {name: None if math.isinf(choice.value) else int(choice.value) for name, choice in found.items()}


def truncation_search(
    trials: Mapping[str, Mapping[float, float]], sizes: Mapping[str, int], keep: float
) -> dict[str, float]:
    """ASVD's sensitivity-based search: a share per weight so that at most ``keep`` of all numbers remain.

    All (weight, share) pairs are sorted by falling damage; behind a cut, every weight takes the smallest
    share that is left to it (1 when none is). The cut is found by bisection: the latest one that still
    fits.

    Args:
        trials: Weight → share of its numbers kept → damage when that weight alone is truncated.
        sizes: Weight → numbers.
        keep: Share of all numbers together.

    Returns:
        Share per weight, 1 where it stays whole.

    Raises:
        RecipeError: not even the smallest shares fit.
    """
    order = sorted(
        ((damage, name, share) for name, tried in trials.items() for share, damage in tried.items()),
        key=lambda entry: (-entry[0], entry[1], entry[2]),
    )
    total = sum(sizes.values())

    def shares(cut: int) -> dict[str, float]:
        found = dict.fromkeys(trials, 1.0)
        for _, name, share in order[cut:]:
            found[name] = min(found[name], share)
        return found

    def used(cut: int) -> float:
        return sum(sizes[name] * share for name, share in shares(cut).items())

    if used(0) > keep * total * (1 + 1e-9):
        raise RecipeError(
            f"keep={keep:g} cannot be met: the smallest shares keep {used(0) / total:.2f} of all numbers.",
            fix="try smaller shares, or raise keep.",
        )
    low, high = 0, len(order)  # used() rises with the cut; low always fits
    while low < high:
        middle = (low + high + 1) // 2
        if used(middle) <= keep * total * (1 + 1e-9):
            low = middle
        else:
            high = middle - 1
    return shares(low)
