"""Pruned by data, repaired, quantized, saved, loaded: biases and refits arrive; a real model gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress
from fxcompress.calibration.walk import Plan, Walk
from fxcompress.errors import ArtifactError
from fxcompress.manager import run_recipe
from fxcompress.passes import PruneChannels
from tests.zoo import entry, scores

GPTQ = [{"gptq": {"bits": 4, "group_size": 8}}, {"quantize-weights": {"only_remaining": True}}]
FLAP = {"prune-channels": {"amount": 0.3, "importance": "flap", "recover": True, "max_amount": 0.8}}


def data(count: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 60, (2, 12), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("quantized", [[], GPTQ], ids=["dense", "w4-gptq"])
@torch.no_grad()
def test_compensating_biases_survive(quantized: list[Any], tmp_path: Path) -> None:
    model = entry("llama").build()
    small = fxcompress.compress(model, [FLAP, *quantized], data(), progress=False)
    biased = [name for name, form in small.artifact.forms.items() if form.bias is not None]
    assert len(biased) == 2
    small.set_backend("eager")
    inputs = data(1)[0]
    before = scores(small(**inputs))
    small.save(tmp_path / "out")
    again = fxcompress.load(tmp_path / "out", backend="eager")
    assert torch.equal(scores(again(**inputs)), before)
    settings = {
        "attention_mask": torch.ones_like(inputs["input_ids"]),
        "max_new_tokens": 4,
        "do_sample": False,
    }
    tokens = again.generate(inputs["input_ids"], **settings)
    plain = again.generate(inputs["input_ids"], **settings, use_cache=False)
    assert torch.equal(tokens, plain)
    with pytest.raises(ArtifactError, match="dense weights only"):
        again.save_pretrained(tmp_path / "plain")


@torch.no_grad()
def test_cut_alike_and_refitted_is_a_plain_checkpoint(tmp_path: Path) -> None:
    model = entry("llama").build()
    recipe = [
        {"remove-blocks": {"count": 1, "criterion": "angular"}},
        {"prune-channels": {"amount": 0.3, "importance": "taylor", "recover": True, "round_to": 8}},
    ]
    small = fxcompress.compress(model, recipe, data(), progress=False)
    small.save_pretrained(tmp_path / "plain")
    plain = type(model).from_pretrained(tmp_path / "plain").eval()
    assert plain.config.num_hidden_layers == model.config.num_hidden_layers - 1
    small.set_backend("eager")
    inputs = data(1)[0]
    torch.testing.assert_close(scores(plain(**inputs)), scores(small(**inputs)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.real_model
def test_on_a_real_model_data_beat_magnitude_and_the_refit_helps(
    smollm_small: Any, smollm_tokenizer: Any
) -> None:
    """Its first layers: error of the outputs on text that the calibration has not seen."""
    from fxcompress.calibration import as_calibration
    from fxcompress.capture import capture_model
    from tests.texts import documentation_text

    def batches(kind: str, count: int) -> list[dict[str, Any]]:
        ids = smollm_tokenizer(documentation_text(kind), return_tensors="pt").input_ids[0]
        return [{"input_ids": ids[128 * i : 128 * (i + 1)][None], "use_cache": False} for i in range(count)]

    example = {"input_ids": torch.arange(64).view(2, 32), "use_cache": False}
    program = capture_model(smollm_small, (), example)
    calibration = as_calibration(batches("calibration", 16), program)
    held_out = as_calibration(batches("held-out", 2), program)
    wanted = [program.run_flat(batch.inputs)[0] for batch in held_out.batches]

    def error(**options: Any) -> float:
        recipe = PruneChannels(0.2, target="block-parameters", **options)
        result = run_recipe(program, recipe, calibration, verify="off")
        walk = Walk(Plan(result.program), held_out.flat())
        for _ in walk.plan.blocks:
            walk.advance(result.state)
        found = [outputs[0] for outputs in walk.outputs()]
        worst = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
        return sum(worst) / len(worst)

    plain = error(importance="wanda")
    assert plain < error(importance="l1")
    assert error(importance="wanda", recover=True) < plain
