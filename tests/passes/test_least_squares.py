"""Making up for cut units: exact where the inputs allow it, never worse than the plain cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress.calibration import as_calibration
from fxcompress.calibration.walk import Plan, Walk
from fxcompress.capture.export import capture_model
from fxcompress.edits import Edit, KeepUnits, SetTensor, SetTransform
from fxcompress.errors import CalibrationError
from fxcompress.manager import RunResult, run_recipe
from fxcompress.pass_base import BlockContext
from fxcompress.passes import PruneChannels
from fxcompress.passes._least_squares import _error, predict


class Hidden(nn.Module):
    """Two layers; ``bias`` of the second; with ``tapped`` both are convolutions."""

    def __init__(self, bias: bool, tapped: bool = False, width: int = 6, hidden: int = 12) -> None:
        super().__init__()
        self.up: nn.Module = nn.Conv1d(width, hidden, 1) if tapped else nn.Linear(width, hidden)
        self.down: nn.Module = (
            nn.Conv1d(hidden, width, 3, bias=bias) if tapped else nn.Linear(hidden, width, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


def build(bias: bool, tapped: bool = False) -> Hidden:
    torch.manual_seed(0)
    return Hidden(bias, tapped).eval().requires_grad_(False)


def cut(model: Hidden, **options: Any) -> tuple[RunResult, Tensor, Tensor]:
    """The result, and outputs before and after on new inputs."""
    shape = (4, 6, 20) if isinstance(model.up, nn.Conv1d) else (64, 6)
    program = capture_model(model, (torch.randn(*shape),))
    data = as_calibration(
        [(torch.randn(*shape, generator=torch.Generator().manual_seed(i)),) for i in range(4)], program
    )
    result = run_recipe(program, PruneChannels(**options), data)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(99))
    small = run_small(result, x)
    return result, model(x), small


def run_small(result: RunResult, x: Tensor) -> Tensor:
    plan = Plan(result.program)
    walk = Walk(plan, [(x,)])
    for _ in plan.blocks:
        walk.advance(result.state)
    out: Tensor = walk.outputs()[0][0]
    return out


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_constant_channels_are_replaced_by_a_bias_exactly(bias: bool, tapped: bool) -> None:
    model = build(bias, tapped)
    with torch.no_grad():
        model.up.weight[3:7] = 0  # type: ignore[index, operator]
        model.up.bias[3:7] = torch.tensor([0.5, 1.0, 2.0, 3.0])  # type: ignore[index, operator]
    result, whole, small = cut(model, amount=1 / 3, importance="flap")
    (committed,) = result.rounds
    assert committed.change.kept["up.weight:0"] == (0, 1, 2, 7, 8, 9, 10, 11)
    torch.testing.assert_close(small, whole, rtol=1e-5, atol=1e-5)
    assert (result.state.form("down.weight").bias is None) == bias
    _, whole, plain = cut(model, amount=1 / 3, importance="flap", compensate=False)
    assert float((plain - whole).norm() / whole.norm()) > 0.1


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_channels_that_others_determine_are_recovered_exactly(bias: bool, tapped: bool) -> None:
    model = build(bias, tapped)
    with torch.no_grad():
        for copy, source in ((0, 8), (5, 9), (6, 10)):
            model.up.weight[copy] = 0.25 * model.up.weight[source]  # type: ignore[index, operator]
            model.up.bias[copy] = 0.25 * model.up.bias[source]  # type: ignore[index, operator]
        model.down.weight[:, [0, 5, 6]] *= 0.1  # type: ignore[index, operator]
    options = {"amount": 0.25, "importance": "wanda", "damping": 1e-9}
    result, whole, small = cut(model, recover=True, **options)
    assert set(range(12)) - set(result.rounds[0].change.kept["up.weight:0"]) == {0, 5, 6}
    assert float((small - whole).norm() / whole.norm()) < 1e-3
    _, whole, plain = cut(model, **options)
    assert float((plain - whole).norm() / whole.norm()) > 5e-3


def test_the_report_says_what_the_refit_gained() -> None:
    result, _, _ = cut(build(True), amount=0.5, importance="l1", recover=True)
    reasons = [entry.reason for entries in result.state.provenance.values() for entry in entries]
    (told,) = [reason for reason in reasons if reason.startswith("refit")]
    before, after = (float(part) for part in told.removeprefix("refit: output error ").split(" → "))
    assert after < before


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(2, 9),
    outputs=st.integers(1, 5),
    rows=st.integers(1, 30),
    rank=st.integers(1, 9),
    dead=st.booleans(),
    damping=st.sampled_from([1e-6, 1e-2, 1.0]),
    seed=st.integers(0, 999),
)
def test_never_worse_than_the_plain_cut(
    channels: int, outputs: int, rows: int, rank: int, dead: bool, damping: float, seed: int
) -> None:
    """The damped fit's own objective at A = 0 is the error of the plain cut."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(rank, channels, generator=generator, dtype=torch.float64)
    if dead:
        x[:, 0] = 0
    weight = torch.randn(channels, outputs, generator=generator, dtype=torch.float64)
    gone = torch.zeros(channels, dtype=torch.bool)
    gone[torch.randperm(channels, generator=generator)[: max(1, channels // 3)]] = True
    moments = (x.T @ x / rows).float().double()
    plain = weight.clone()
    plain[gone] = 0
    fitted = plain.clone()
    fitted[~gone] += predict(moments, gone, damping, "w") @ weight[gone]
    assert torch.isfinite(fitted).all()
    assert _error(weight - fitted, weight, moments) <= _error(weight - plain, weight, moments) + 1e-6
    direct = float((x @ (weight - fitted)).norm() / (x @ weight).norm().clamp_min(1e-30))
    assert _error(weight - fitted, weight, moments) == pytest.approx(direct, abs=2e-3)


def test_little_damping_is_the_least_squares_solution() -> None:
    x = torch.randn(200, 8, dtype=torch.float64)
    weight = torch.randn(8, 3, dtype=torch.float64)
    gone = torch.tensor([False, True, False, False, True, True, False, False])
    new = weight[~gone] + predict(x.T @ x, gone, 1e-12, "w") @ weight[gone]
    torch.testing.assert_close(new, torch.linalg.lstsq(x[:, ~gone], x @ weight).solution)


def test_moments_that_are_none_are_refused() -> None:
    moments = -torch.eye(3, dtype=torch.float64)
    moments[0, 0] = 3.0
    with pytest.raises(CalibrationError, match="not positive definite"):
        predict(moments * 1e3, torch.tensor([False, False, True]), 1e-12, "w")


@dataclass(frozen=True)
class Watched(PruneChannels):
    """Notes the kinds of its edits."""

    name: ClassVar[str] = "watched"
    kinds: ClassVar[list[str]] = []

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        for edit in super().solve(block):
            self.kinds.append(type(edit).__name__)
            yield edit


def test_edits_follow_the_cut() -> None:
    """The input is measured before the cut; the new columns are yielded behind it."""
    model = build(False)
    program = capture_model(model, (torch.randn(8, 6),))
    data = as_calibration([(torch.randn(64, 6),)], program)
    run_recipe(program, Watched(0.5, importance="flap", recover=True), data)
    assert Watched.kinds == [kind.__name__ for kind in (KeepUnits, SetTensor, SetTransform)]
