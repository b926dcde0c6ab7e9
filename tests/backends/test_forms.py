"""Every kind of form, compiled by the inductor backend, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
