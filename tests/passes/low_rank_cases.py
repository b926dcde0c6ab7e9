"""What the tests of low-rank passes share: a program, its data, and short cuts through a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcompress.calibration import CalibrationData
from fxcompress.calibration.walk import Plan, Walk
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState
from fxcompress.forms import LowRank
from fxcompress.manager import RunResult, run_recipe
from tests.engine.models import calibration, decoder

MATRICES = tuple(f"layers.{i}.{name}.weight" for i in range(3) for name in ("up", "down"))


def run(
    recipe: Any, program: Program | None = None, data: CalibrationData | None = None, **options: Any
) -> RunResult:
    program = program or decoder()
    data = data if data is not None else calibration(program)
    return run_recipe(program, recipe, data, **{"verify": "off", **options})


def low_rank(state: CompressionState, name: str) -> LowRank:
    (term,) = state.forms[name].terms
    assert isinstance(term, LowRank)
    return term


def same_state(one: CompressionState, two: CompressionState) -> bool:
    return one.forms.keys() == two.forms.keys() and all(
        form.same_as(two.forms[name]) for name, form in one.forms.items()
    )


def refusal(state: CompressionState, name: str, pass_name: str) -> str:
    (entry,) = [e for e in state.provenance[name] if e.pass_name == pass_name and e.action == "Refuse"]
    return entry.reason


def inputs_of(program: Program, name: str, data: CalibrationData) -> Tensor:
    """Rows ``[T, K]`` of the product with ``name`` in the original model."""
    plan = Plan(program)
    (site,) = plan.uses(name)
    assert site.input is not None
    walk, state = Walk(plan, data.flat()), CompressionState(program.weights)
    while walk.position < plan.block_of[site.node]:
        walk.advance(state)
    rows = [values[site.input] for values in walk.collect(walk.runner(state), [site.input])]
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])
