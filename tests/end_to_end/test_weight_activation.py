"""The weight-and-activation family on the real models: eager, compiled, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxcompress
from fxcompress.presets import PRESETS

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

TEXTS = [
    "The capital of France is Paris, a city on the river Seine.",
    "Water boils at one hundred degrees, and ice melts at zero.",
]
# Recipe → largest relative error of the three-block model's logits, least similarity of sentence embeddings.
BOUNDS = {
    "fp8": (0.03, 0.995),  # 3 bits of mantissa: each of six layers adds some 3 %
    "fp8-static": (0.03, 0.99),
    "w8a8-outlier-split": (0.03, 0.995),
    "w8a8-outlier-columns": (0.03, 0.995),
    "w4a8-reorder": (0.2, 0.97),
    "w4a8-zeroquant": (0.2, 0.95),
    "qdq-int8": (0.2, 0.93),  # nearly all of it from one scale for a whole residual sum
}
COMPILED = ("w8a8-outlier-split",)  # the others compile on small models, in tests/backends/test_forms.py
ENCODER = ("fp8-static", "w8a8-outlier-columns", "w4a8-reorder", "w4a8-zeroquant", "qdq-int8")


def recipe(name: str) -> Any:
    """The preset without its long searches: what is tested is that everything fits together."""
    quick: dict[str, dict[str, Any]] = {
        "layer-distill": {"steps": 8},
        "reorder-channels": {"clusters": 8},
        "gptq": {"search": False},
    }
    passes = []
    for item in PRESETS[name]["passes"]:
        key, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        passes.append({key: {**options, **quick.get(key, {})}})
    return passes


def difference(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("name", BOUNDS)
def test_language_model(name: str, smollm_small: Any, smollm_tokenizer: Any, tmp_path: Path) -> None:
    ids = smollm_tokenizer(TEXTS[0], return_tensors="pt").input_ids
    expected = smollm_small(ids).logits
    small = fxcompress.compress(
        smollm_small, recipe(name), TEXTS, tokenizer=smollm_tokenizer, progress=False, verify="off"
    )
    small.set_backend("eager")
    eager = small(ids, use_cache=True)
    assert difference(eager.logits, expected) < BOUNDS[name][0]
    assert small.report.totals["ratio"] > 3.3
    if name != "w8a8-outlier-split":  # what is an outlier there depends on all tokens of a call
        first = small(ids[:, :-1], use_cache=True)
        step = small(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
        assert difference(step.logits[:, -1], eager.logits[:, -1]) < 1e-4
    small.save(tmp_path / "small")
    loaded = fxcompress.load(tmp_path / "small", backend="eager")
    assert torch.equal(loaded(ids, use_cache=True).logits, eager.logits)
    if name in COMPILED:
        loaded.set_backend("inductor")
        assert difference(loaded(ids, use_cache=True).logits, eager.logits) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODER)
def test_encoder(name: str, minilm: Any, tmp_path: Path) -> None:
    model, tokenizer = minilm
    inputs = dict(tokenizer(TEXTS, return_tensors="pt", padding=True))

    def embed(network: Any) -> Tensor:
        hidden = network(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    small = fxcompress.compress(
        model, recipe(name), [inputs], example_inputs=inputs, progress=False, verify="off"
    )
    small.set_backend("eager")
    eager = embed(small)
    assert float((eager * embed(model)).sum(-1).min()) >= BOUNDS[name][1]
    small.save(tmp_path / "small")
    assert torch.equal(embed(fxcompress.load(tmp_path / "small", backend="eager")), eager)
