"""Every balancing pass leaves every architecture's function unchanged: the manager's proof, to 1e-9.

A few architectures take every pass, all others the two that reach furthest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxcompress.calibration import as_calibration
from fxcompress.capture.export import capture_model
from fxcompress.errors import CoverageError
from fxcompress.manager import run_recipe
from fxcompress.passes import Awq, BalanceAttention, SmoothActivations, SuppressOutliers
from tests.zoo import DECODERS, ENCODER_DECODERS, ENCODERS, ZooEntry, entry

QUICK = ("llama-tied-odd", "gemma2", "gpt2-odd", "opt-odd", "mixtral", "bert", "t5")
PASSES = (
    SmoothActivations(explicit=True),
    SmoothActivations(alpha="search", steps=3, tokens=32),
    Awq(bits=3, group_size=0, steps=4, tokens=32, explicit=True),
    SuppressOutliers(steps=3, tokens=32, shift="explicit", explicit=True),
    SuppressOutliers(steps=3, tokens=32),
    BalanceAttention(),
)

# Between them they take every group and every kind of edit.
WIDEST = (PASSES[0], PASSES[3], PASSES[5])


def check(model: Any, inputs: dict[str, Any], passes: tuple[Any, ...]) -> list[float]:
    """Prove the passes on one model; returns the differences. A pass may find nothing to scale."""
    program = capture_model(model, kwargs=inputs)
    with torch.no_grad():
        for name, weight in program.weights.items():
            if name in program.parameters and weight.dim() == 1 and weight.numel() > 4:
                weight[1] += 4.0  # a channel worth moving; an exponential of two such is still finite
    data = as_calibration([inputs], program)
    found = []
    for method in passes:
        try:
            report = run_recipe(program, [method], data).report
        except CoverageError:
            continue
        (proof,) = [entry for entry in report.checks if entry.get("pass") == method.name]
        assert proof["passed"]
        found.append(float(proof["max_relative_error"]))
    return found


def zoo(animal: ZooEntry, passes: tuple[Any, ...] = PASSES) -> list[float]:
    return check(animal.build(), dict(animal.inputs()), passes)


@pytest.mark.parametrize("name", QUICK)
def test_a_few_architectures(name: str) -> None:
    found = zoo(entry(name))
    assert len(found) >= 2
    assert max(found) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    "animal",
    [e for e in DECODERS + ENCODERS + ENCODER_DECODERS if e.name not in QUICK and "slow" not in e.tags],
    ids=lambda animal: str(animal.name),
)
def test_all_architectures(animal: ZooEntry) -> None:
    assert max(zoo(animal, WIDEST), default=0.0) <= 1e-9


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm_small", "minilm"])
def test_real_models(model: str, request: pytest.FixtureRequest) -> None:
    held = request.getfixturevalue(model)
    ids = torch.randint(0, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, Any] = {"input_ids": ids}
    if model == "minilm":
        held, inputs["attention_mask"] = held[0], torch.ones_like(ids)
    else:
        inputs["use_cache"] = False
    program = capture_model(held, kwargs=inputs)
    data = as_calibration([inputs], program)
    for method in PASSES:
        try:
            report = run_recipe(program, [method], data).report
        except CoverageError:
            continue
        (proof,) = [entry for entry in report.checks if entry.get("pass") == method.name]
        assert float(proof["max_relative_error"]) <= 1e-9
