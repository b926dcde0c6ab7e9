"""Where a shift may move into biases, and every trap that forbids it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis.shift_paths import shift_bias
from fxcompress.analysis.sites import find_sites
from fxcompress.analysis.smoothing import find_smoothing_groups
from fxcompress.capture.export import capture_model
from tests.analysis.smoothing_models import Norm

WIDTH = 6


class Reads(nn.Module):
    """A norm and one reader, with something between."""

    def __init__(self, between: str = "") -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(WIDTH, bias="no bias" not in between)
        if between == "rms":
            self.norm = Norm(WIDTH)
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.read = nn.Linear(WIDTH, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.between == "views":
            h = h.flatten(0, 1).unsqueeze(0).transpose(0, 1).to(torch.float32)
        elif self.between == "relu":
            h = torch.relu(h)
        elif self.between == "padding":
            h = F.pad(h, (0, 0, 1, 0))
        elif self.between == "gate":
            h = h * torch.sigmoid(x)
        elif self.between == "written out":
            h = F.layer_norm(x, (WIDTH,)) * self.norm.weight + self.shift
        elif self.between == "twice":
            return self.read(h) + self.read(h * 2)
        return self.read(h)


def ask(between: str) -> tuple[str | None, str]:
    program = capture_model(Reads(between).eval(), (torch.randn(2, 3, WIDTH),))
    sites = find_sites(program)
    (group,) = find_smoothing_groups(program, sites).groups
    bias, why = shift_bias(program, sites, group)
    return (None if bias is None else bias.name), why


@pytest.mark.parametrize("between", ["", "views"])
def test_moves_let_a_shift_through(between: str) -> None:
    assert ask(between) == ("norm.bias", "")


def test_a_norm_written_out_keeps_its_bias_in_an_addition() -> None:
    assert ask("written out") == ("shift", "")


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("relu", r"aten::relu .* does not commute with a shift per channel"),
        ("padding", r"aten::pad .* does not commute with a shift"),
        ("gate", r"aten::mul .* does not commute with a shift"),
        ("no bias", "the norm has no bias that could be shifted"),
        ("rms", "the norm has no bias that could be shifted"),
        ("twice", "used at several places, which would share the new bias"),
    ],
)
def test_traps(between: str, reason: str) -> None:
    bias, why = ask(between)
    assert bias is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(why)


def test_matrices_and_experts_are_no_places_for_a_shift() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)))

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.many = nn.LayerNorm(WIDTH), nn.Parameter(torch.randn(3, WIDTH, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(self.norm(x), self.many)

    for model, x, reason in (
        (Pair(), torch.randn(2, 4), "only the bias of a norm is shifted"),
        (Experts(), torch.randn(3, 5, WIDTH), "cannot be given a bias per matrix"),
    ):
        program = capture_model(model.eval(), (x,))
        sites = find_sites(program)
        (group,) = find_smoothing_groups(program, sites).groups
        bias, why = shift_bias(program, sites, group)
        assert bias is None
        assert reason in why
