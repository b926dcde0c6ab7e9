"""Queries and keys are found by where their products meet, whatever they are called."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis.score_sites import score_sites
from fxcompress.analysis.sites import find_sites
from fxcompress.capture.export import capture_model
from tests.zoo import entry


class Attention(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.style = nn.LayerNorm(8), style

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.norm(self.a(x)), self.b(x), self.c(x)
        if self.style == "sdpa":
            return self.d(F.scaled_dot_product_attention(a, b, c))
        scores = torch.einsum("bqd,bkd->bqk", a, b) if self.style == "einsum" else a @ b.mT
        scores = torch.tanh(scores / 3) + torch.ones(5, 5).triu(1) * -1e4
        return self.d(scores.softmax(-1) @ c)


@pytest.mark.parametrize("style", ["sdpa", "matmul", "einsum"])
def test_every_spelling_of_attention(style: str) -> None:
    program = capture_model(Attention(style).eval(), (torch.randn(2, 5, 8),))
    assert score_sites(program, find_sites(program)) == {"a.weight", "b.weight"}


def test_a_router_is_no_score() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.route, self.one, self.two = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            share = self.route(x).softmax(-1)
            return share[..., :1] * self.one(x) + share[..., 1:] * self.two(x)

    program = capture_model(Router().eval(), (torch.randn(2, 5, 8),))
    assert not score_sites(program, find_sites(program))


def test_rotations_grouped_heads_and_head_norms_lie_between() -> None:
    animal = entry("llama")
    program = capture_model(animal.build(), kwargs=animal.inputs())
    found = score_sites(program, find_sites(program))
    assert {name.rsplit(".", 2)[1] for name in found} == {"q_proj", "k_proj"}
