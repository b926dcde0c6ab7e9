"""Divide a mean sparsity among layers: the more sensitive a layer, the fewer zeros."""

from __future__ import annotations

from collections.abc import Mapping

from fxcompress.edits import SetSensitivity
from fxcompress.errors import RecipeError

_ROUNDS = 200  # of bisection; each halves an interval of length 2


def allocate(
    pass_name: str, noted: Mapping[str, SetSensitivity], sizes: Mapping[str, int], mean: float
) -> dict[str, float]:
    """Sparsity of every layer, so that the share of zeros among all entries is ``mean``.

    Args:
        pass_name: Who asks, for messages.
        noted: Sensitivity by parameter name; all of one measure.
        sizes: Number of entries by name.
        mean: 0 < s < 1.

    Raises:
        RecipeError: the mean lies outside the layers' bounds, or sensitivities of two measures are mixed.

    Example:
        >>> note = lambda name, value: SetSensitivity(name, "samsp", value, 0.2)
        >>> noted = {name: note(name, value) for name, value in zip("abcde", (5, 4, 3, 2, 1))}
        >>> [round(s, 3) for s in allocate("wanda", noted, dict.fromkeys("abcde", 10), 0.5).values()]
        [0.3, 0.4, 0.5, 0.6, 0.7]
    """
    first = next(iter(noted.values()))
    if any(
        (n.measure, n.spread, n.bounds) != (first.measure, first.spread, first.bounds) for n in noted.values()
    ):
        raise RecipeError(f"{pass_name}: sensitivities of several measures.", fix="allocate once per recipe.")
    wish = _RULES[first.measure]({name: note.value for name, note in noted.items()}, first.spread, mean)
    low, high = first.bounds
    if not low <= mean <= high:
        raise RecipeError(
            f"{pass_name}: a mean sparsity of {mean:g} cannot be met with layers between {low:g} and"
            f" {high:g}.",
            fix="widen the bounds of allocate-sparsity, or change the sparsity.",
        )
    total = sum(sizes[name] for name in noted)

    def shares(shift: float) -> dict[str, float]:
        return {name: min(high, max(low, mean + offset + shift)) for name, offset in wish.items()}

    def gap(shift: float) -> float:
        return sum(share * sizes[name] for name, share in shares(shift).items()) / total - mean

    below, above = -2.0, 2.0
    if abs(gap(0.0)) < 1e-12:
        return shares(0.0)
    for _ in range(_ROUNDS):
        middle = (below + above) / 2
        below, above = (middle, above) if gap(middle) < 0 else (below, middle)
    return shares(above)


def ranked(values: Mapping[str, float], spread: float, mean: float) -> dict[str, float]:
    """Offsets ``−α … α`` in equal steps, from the most to the least sensitive; of equals the first is first.

    SAMSP: Shao et al., 2023 (arXiv:2310.09499).
    """
    order = sorted(values, key=lambda name: -values[name])
    step = 2 * spread / (len(order) - 1) if len(order) > 1 else 0.0
    places = {name: place for place, name in enumerate(order)}
    return {name: (places[name] * step - spread if len(order) > 1 else 0.0) for name in values}


def proportional(values: Mapping[str, float], spread: float, mean: float) -> dict[str, float]:
    """Offsets within ``2λ`` of each other, linear in the values, with mean zero.

    OWL: Yin et al., 2023 (arXiv:2310.05175).
    """
    least, most = min(values.values()), max(values.values())
    width = most - least
    keep = {name: (value - least) / width * 2 * spread if width else 0.0 for name, value in values.items()}
    middle = sum(keep.values()) / len(keep)
    return {name: middle - kept for name, kept in keep.items()}


def given(values: Mapping[str, float], spread: float, mean: float) -> dict[str, float]:
    """Offsets to shares that are decided already."""
    return {name: value - mean for name, value in values.items()}


_RULES = {"samsp": ranked, "owl": proportional, "share": given}
