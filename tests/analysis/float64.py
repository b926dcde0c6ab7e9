"""Run a captured program in float64 throughout, so that equality can be asked to 1e-9, not to 1e-6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.capture.precision import double_program, widen
from fxcompress.capture.program import Program

__all__ = ["double_inputs", "double_program", "outputs", "relative_difference"]


def double_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Call keywords with floating tensors widened."""
    widened: dict[str, Any] = pytree.tree_map_only(Tensor, widen, dict(inputs))
    return widened


@torch.no_grad()
def outputs(
    program: Program, inputs: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """Floating tensors a double program returns."""
    result = pytree.tree_leaves(program.run((), double_inputs(inputs), weights))
    with_values = [leaf for leaf in result if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert with_values
    assert all(leaf.dtype == torch.float64 for leaf in with_values), "the graph narrows somewhere"
    return with_values


def relative_difference(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """Largest ``max|a - b| / max|b|`` over pairs of tensors; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        finite = torch.isfinite(b)
        assert torch.equal(finite, torch.isfinite(a))
        if finite.any():
            difference = (a[finite] - b[finite]).abs().max() / b[finite].abs().max().clamp_min(1e-300)
            worst = max(worst, float(difference))
    return worst
