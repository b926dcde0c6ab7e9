"""Every kind of form, compiled by the inductor backend, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from tests.passes.models import Attention

X = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0))
RECIPES: dict[str, Any] = {
    "fp8": "fp8",
    "fp8 blocks, static": [
        {"quantize-weights": {"format": "fp8-e5m2", "group_size": 8}},
        {"quantize-activations": {"format": "fp8-e5m2", "mode": "static"}},
    ],
    "outliers at run time": [{"split-outlier-features": {"threshold": 2.0}}],
    "outlier columns": [{"split-outlier-features": {"columns": 3}}],
    "clusters": [
        {"reorder-channels": {"clusters": 4}},
        "quantize-weights",
        {"quantize-activations": {"mode": "cluster"}},
        "fuse-siblings",
    ],
    "groups of activations": [{"insert-quant-dequant": {"activations": "group", "group_size": 8}}],
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", RECIPES)
def test_compiled_like_the_reference(name: str) -> None:
    small = fxcompress.compress(
        Attention().eval(), RECIPES[name], [(X,)], example_inputs=(X,), progress=False, verify="off"
    )
    compiled = small(X)
    explained = small.explain()
    small.set_backend("eager")
    torch.testing.assert_close(compiled, small(X), rtol=0.02, atol=0.02)
    assert set(explained) == {f"{n}.weight" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    floating = [text for text in explained.values() if "dequantize_float_weight" in text]
    assert len(floating) == (7 if name.startswith("fp8") else 0)


class LowRank(nn.Module):
    """A product beside a pair of narrow ones, every factor a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.down, self.up = nn.Linear(64, 48), nn.Linear(64, 4, bias=False), nn.Linear(4, 48)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x) + self.up(self.down(x))
        return y


@pytest.mark.parametrize("quantized", [("main",), ("main", "down", "up")])
def test_a_low_rank_pair_beside_a_product(quantized: tuple[str, ...]) -> None:
    x = torch.randn(3, 64)
    include = tuple(f"{name}.weight" for name in quantized)
    recipe = [
        {"quantize-weights": {"bits": 4, "group_size": 4, "include": include, "head_bits": 4}},
    ]
    small = fxcompress.compress(LowRank().eval(), recipe, example_inputs=(x,), progress=False, verify="off")
    compiled = small(x)
    explained = small.explain()
    assert set(explained) == set(include)
    assert all(text.startswith("generated") for text in explained.values())
    small.set_backend("eager")
    torch.testing.assert_close(compiled, small(x), rtol=1e-4, atol=1e-4)
