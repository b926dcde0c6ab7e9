"""The whole model's loss: its gradients against autograd, models without a block, what enters and leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.calibration import CalibrationData, as_calibration
from fxcompress.calibration.model_loss import ModelLoss
from fxcompress.calibration.plan import Plan
from fxcompress.calibration.walk import Walk
from fxcompress.capture.export import capture_model
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState
from fxcompress.errors import CalibrationError
from tests.engine.models import LAYERS, VOCABULARY, WIDTH, build, calibration, capture, decoder, tokens
from tests.zoo import entry


def loss_of(program: Program, data: CalibrationData, samples: int | None = None) -> ModelLoss:
    plan = Plan(program)

    def start(double: bool) -> Walk:
        return Walk(plan, data.flat(), double=double)

    return ModelLoss(plan, CompressionState(program.weights), start, samples, 0)


def by_autograd(model: nn.Module, losses: Sequence[Callable[[nn.Module], Tensor]]) -> list[dict[str, Tensor]]:
    model = model.requires_grad_(True)
    found = []
    for loss in losses:
        model.zero_grad()
        loss(model).backward()  # type: ignore[no-untyped-call]
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return found


def next_token(batch: Tensor) -> Callable[[nn.Module], Tensor]:
    def loss(model: nn.Module) -> Tensor:
        out = model(batch)
        return F.cross_entropy(out[:, :-1].reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))

    return loss


def collect(loss: ModelLoss, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """Gradients by batch."""
    found: list[dict[str, Tensor]] = []
    for name, gradient in loss.gradients(names):
        if not found or name in found[-1]:
            assert not found or set(found[-1]) == set(names)
            found.append({})
        found[-1][name] = gradient
    return found


def test_gradients_are_those_of_autograd_batch_by_batch() -> None:
    program, data = decoder(), calibration(decoder())
    loss = loss_of(program, data)
    assert loss.predicts_tokens
    names = sorted(program.parameters)
    found = collect(loss, names)
    batches = [tokens(2, 5 + i, seed=i) for i in range(3)]
    wanted = by_autograd(build(), [next_token(batch[row : row + 1]) for batch in batches for row in (0, 1)])
    if len(found) == 3:  # batches of two rows stay whole
        wanted = by_autograd(build(), [next_token(batch) for batch in batches])
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert set(mine) == set(theirs)
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


class Tied(nn.Module):
    """One table looked up at the start and multiplied with at the end, beside a write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.up = nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = torch.zeros_like(x)
        h.add_(self.down(F.silu(self.up(x))))
        return (x + h) @ self.table.weight.T


def test_a_weight_used_twice_and_writes_in_place() -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    ids = tokens(2, 7)
    program = capture_model(model, (ids,))
    data = as_calibration([(ids,)], program)
    (mine,) = collect(loss_of(program, data), sorted(program.parameters))
    (theirs,) = by_autograd(model, [next_token(ids)])
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


def test_half_precision_is_differentiated_in_float64() -> None:
    torch.manual_seed(0)
    model = Tied().eval().to(torch.bfloat16)
    ids = tokens(2, 6)
    program = capture_model(model, (ids,))
    name = "down.weight"
    ((found,),) = [
        tuple(batch.values())
        for batch in collect(loss_of(program, as_calibration([(ids,)], program)), [name])
    ]
    assert found.dtype == torch.float64
    (wanted,) = by_autograd(model.to(torch.float64), [next_token(ids)])
    torch.testing.assert_close(found, wanted[name], rtol=1e-6, atol=1e-9)


def test_nan_in_a_gradient_is_named() -> None:
    program = capture()
    data = calibration(program, 1)
    program.weights["layers.2.down.weight"].fill_(float("inf"))  # type: ignore[index]
    with pytest.raises(CalibrationError, match="NaN or inf"):
        collect(loss_of(program, data), ["layers.0.up.weight"])


@pytest.mark.parametrize(
    ("name", "causal"), [("llama-tied-odd", True), ("gpt2-odd", True), ("bert", False), ("vit", False)]
)
def test_what_predicts_the_next_token_is_found_by_running(name: str, causal: bool) -> None:
    animal = entry(name)
    inputs = {**animal.inputs(2, 8), **animal.options}
    program = capture_model(animal.build(), kwargs=inputs)
    loss = loss_of(program, as_calibration([inputs], program))
    assert loss.predicts_tokens == causal
    matrices = [n for n in sorted(program.parameters) if program.weights[n].dim() == 2]
    sizes = {n: float(g.norm()) for n, g in loss.gradients(matrices)}
    assert set(sizes) == set(matrices)
    assert sum(size > 0 for size in sizes.values()) >= 0.8 * len(sizes)
    assert (loss.value() > 0) == causal


def test_without_each_steps_over_one_block() -> None:
    program, data = decoder(), calibration(decoder())
    loss = loss_of(program, data)
    found = loss.without_each([f"layers.{i}.up.weight" for i in range(LAYERS)])
    for removed in range(LAYERS):
        model = build()
        del model.layers[removed]
        losses = [float(next_token(row)(model)) for row in (batch.inputs[0] for batch in data.batches)]
        assert found[removed] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    whole = [float(next_token(batch.inputs[0])(build())) for batch in data.batches]
    assert loss.value() == pytest.approx(sum(whole) / len(whole), rel=1e-5)


def test_streams_are_what_enters_and_leaves() -> None:
    program, data = decoder(), calibration(decoder(), 1)
    streams = [ends for ends in loss_of(program, data).streams() if ends is not None]
    assert len(streams) == LAYERS
    model = build()
    rows = torch.cat([batch.inputs[0] for batch in data.batches])
    before = model.embed(rows)
    for ends, layer in zip(streams, model.layers, strict=True):
        torch.testing.assert_close(ends[0], before.reshape(-1, WIDTH))
        before = layer(before)
        torch.testing.assert_close(ends[1], before.reshape(-1, WIDTH))


def test_samples_are_spread_and_no_more_than_there_are() -> None:
    program, data = decoder(), calibration(decoder())
    many: Any = loss_of(program, data, 100).value()
    assert many == loss_of(program, data).value()
    assert math.isfinite(loss_of(program, data, 1).value())
