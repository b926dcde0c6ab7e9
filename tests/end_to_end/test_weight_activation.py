"""Presets of the weight-and-activation family on the real models: eager, compiled, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxcompress

pytestmark = pytest.mark.real_model

TEXTS = [
    "The capital of France is Paris, a city on the river Seine.",
    "Water boils at one hundred degrees, and ice melts at zero.",
]
# Preset → largest relative error of the logits of the three-block model.
LANGUAGE = {
    "fp8": 0.05,
    "fp8-static": 0.06,
    "w8a8-outlier-split": 0.03,
    "w8a8-outlier-columns": 0.03,
    "w4a8-reorder": 0.2,
    "w8a8-zeroquant": 0.05,
    "w4a8-zeroquant": 0.2,
    "qdq-int8": 0.2,
}
ENCODER = {
    "fp8": 0.995,
    "fp8-static": 0.99,
    "w8a8-outlier-split": 0.995,
    "w8a8-outlier-columns": 0.995,
    "w4a8-reorder": 0.97,
    "w8a8-zeroquant": 0.99,
    "w4a8-zeroquant": 0.95,
    "qdq-int8": 0.97,
}


def difference(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("preset", LANGUAGE)
def test_language_model(preset: str, smollm_small: Any, smollm_tokenizer: Any, tmp_path: Path) -> None:
    ids = smollm_tokenizer(TEXTS[0], return_tensors="pt").input_ids
    expected = smollm_small(ids).logits
    small = fxcompress.compress(smollm_small, preset, TEXTS, tokenizer=smollm_tokenizer, progress=False)
    small.set_backend("eager")
    eager = small(ids).logits
    assert difference(eager, expected) < LANGUAGE[preset]
    assert small.report.totals["ratio"] > 3.3
    tokens = small.generate(input_ids=ids[:, :4], max_new_tokens=3, do_sample=False)
    small.save(tmp_path / "small")
    loaded = fxcompress.load(tmp_path / "small", backend="eager")
    assert torch.equal(loaded(ids).logits, eager)
    assert torch.equal(loaded.generate(input_ids=ids[:, :4], max_new_tokens=3, do_sample=False), tokens)
    loaded.set_backend("inductor")
    assert difference(loaded(ids).logits, eager) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("preset", ENCODER)
def test_encoder(preset: str, minilm: Any, tmp_path: Path) -> None:
    model, tokenizer = minilm
    inputs = dict(tokenizer(TEXTS, return_tensors="pt", padding=True))

    def embed(network: Any) -> Tensor:
        hidden = network(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    small = fxcompress.compress(model, preset, [inputs], example_inputs=inputs, progress=False)
    small.set_backend("eager")
    eager = embed(small)
    assert float((eager * embed(model)).sum(-1).min()) >= ENCODER[preset]
    small.save(tmp_path / "small")
    assert torch.equal(embed(fxcompress.load(tmp_path / "small", backend="eager")), eager)
    small.set_backend("inductor")
    assert difference(embed(small), eager) < 0.02
