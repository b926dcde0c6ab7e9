"""Every pass behind a pruning pass keeps its zeros, or is refused by name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fxcompress.calibration import CalibrationData, as_calibration
from fxcompress.capture import capture_model
from fxcompress.capture.program import Program
from fxcompress.errors import RecipeError
from fxcompress.forms import QuantizedWeight
from fxcompress.manager import run_recipe
from fxcompress.registry import BUILTIN_PASSES
from tests.passes.models import Language

PRUNING = ("prune-magnitude", "wanda", "sparsegpt", "e-sparse")
OPTIONS: dict[str, dict[str, Any]] = {
    "awq": {"bits": 4, "group_size": 4},
    "clip-weights": {"bits": 4, "group_size": 4},
    "gptq": {"bits": 4, "group_size": 4},
    "quantize-weights": {"bits": 4, "group_size": 4},
    "layer-distill": {"bits": 4, "group_size": 4, "steps": 2},
    "suppress-outliers": {"bits": 4, "group_size": 4, "symmetric": False},
}
AHEAD = {  # what must be in front of a pass
    "fuse-siblings": [{"quantize-weights": {"bits": 4, "group_size": 4}}],
}
BEHIND = {  # what must follow one
    name: [{"quantize-weights": {"bits": 4, "group_size": 4}}]
    for name in ("awq", "clip-weights", "suppress-outliers", "smooth-activations", "balance-attention")
}


@functools.cache
def model() -> tuple[Program, CalibrationData]:
    torch.manual_seed(0)
    net = Language(tied=True).eval()
    ids = torch.randint(0, 50, (3, 7))
    program = capture_model(net, (ids,))
    return program, as_calibration([(torch.randint(0, 50, (2, 9)),) for _ in range(3)], program)


def test_every_pass_is_covered() -> None:
    rest = set(BUILTIN_PASSES) - set(PRUNING) - REFUSED
    assert rest >= {"gptq", "quantize-weights", "awq", "layer-distill", "pack-sparse", "dsnot"}


REFUSED = {
    *("allocate-sparsity", "permute-channels", "reorder-channels"),
    *("svd", "fwsvd", "asvd", "svd-llm", "lplr", "laser", "low-rank-residual"),  # fill the zeros
    *("prune-channels", "remove-blocks"),  # the masks would be those of another model
}
LATER = sorted(set(BUILTIN_PASSES) - REFUSED)


@pytest.mark.parametrize("pattern", ["", "2:4"])
@pytest.mark.parametrize("name", LATER)
def test_zeros_stay(name: str, pattern: str) -> None:
    program, data = model()
    first: dict[str, Any] = {"wanda": {"pattern": pattern}} if pattern else {"wanda": {"sparsity": 0.4}}
    later: dict[str, Any] = OPTIONS.get(name, {})
    if name in PRUNING:
        later = {"pattern": pattern, "include": ["*"]}
    recipe = [first, *AHEAD.get(name, []), {name: later}, *BEHIND.get(name, [])]
    before = run_recipe(program, [first], data, verify="off").state
    after = run_recipe(program, recipe, data, verify="off").state
    assert len(after.masks) == 7
    for weight, mask in before.masks.items():
        value = after.effective(weight)
        if name == "dsnot":  # swaps; the number of zeros stays
            assert int((value == 0).sum()) >= mask.pruned
            continue
        assert mask.broken_by(value) == 0, weight
        for term in after.forms[weight].terms if weight in after.forms else ():
            if isinstance(term, QuantizedWeight):  # exactly zero in every precision
                assert mask.broken_by(term.dense(torch.float64)) == 0


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_keep_them_is_refused_by_name(name: str) -> None:
    program, data = model()
    behind = {"pattern": "2:4"} if name == "permute-channels" else {"sparsity": 0.6}
    given: Any = {name: {"amount": 0.3}} if name == "prune-channels" else name
    with pytest.raises(RecipeError, match=rf"{name}.*sparse-weights.*wanda|wanda.*sparse-weights.*{name}"):
        run_recipe(program, ["wanda", given, {"sparsegpt": behind}], data)


def test_solvers_move_errors_to_what_stays() -> None:
    """With the mask GPTQ loses less than rounding the pruned weight to nearest."""
    program, data = model()
    pruned = {"wanda": {"sparsity": 0.5}}
    found = run_recipe(
        program, [pruned, {"gptq": {"bits": 3, "group_size": 4, "shrinkage": 0.0}}], data
    ).report
    plain = run_recipe(program, [pruned, {"quantize-weights": {"bits": 3, "group_size": 4}}], data).report

    def total(report: Any) -> float:
        return sum(row.error for row in report.rows if row.zeros is not None)

    assert total(found) <= total(plain)
