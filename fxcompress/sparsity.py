"""The account of zeros: what masks promised, counted in the values that the model will compute with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxcompress.edits import CompressionState, without_branches
from fxcompress.errors import VerificationError
from fxcompress.forms import SiteForm
from fxcompress.forms.mask import groups_over

__all__ = ["check_masks", "zeros_check"]


def check_masks(state: CompressionState) -> dict[str, int]:
    """Exact zeros of every pruned parameter.

    Raises:
        VerificationError: a pruned entry is not zero any more, or more than n of m inputs are left.
    """
    found = {}
    for name, mask in state.masks.items():
        form = state.form(name)
        if form.terms:
            value = SiteForm(terms=without_branches(form.terms)).dense(state.weights[name].dtype)
        else:
            value = state.weight(name)
        filled = mask.broken_by(value)
        over = groups_over(mask.layout.to_matrix(value), mask.n, mask.m) if mask.m else 0
        if filled or over:
            what = f"{filled} of {mask.pruned} pruned entries are not zero" if filled else f"{over} groups"
            raise VerificationError(f"{name}: its mask ({mask.describe()}) is broken: {what}.")
        found[name] = value.numel() - int(value.count_nonzero())
    return found


def zeros_check(state: CompressionState, zeros: Mapping[str, int]) -> dict[str, Any]:
    """The report's entry on pruned parameters."""
    total = sum(state.masks[name].keep.numel() for name in zeros)
    return {
        "check": "zeros of pruned weights",
        "weights": len(zeros),
        "zeros": sum(zeros.values()),
        "of": total,
        "passed": True,
    }
