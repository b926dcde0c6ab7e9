"""Plain checkpoints: transformers loads a pruned model without fxcompress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress
from fxcompress.errors import ArtifactError
from tests.engine.models import build, tokens
from tests.engine.structural import DropBlocks, KeepFirst
from tests.zoo import entry, scores


def compress(name: str, *passes: Any) -> fxcompress.CompressedModel:
    animal = entry(name)
    return fxcompress.compress(
        animal.build(), list(passes), example_inputs=animal.inputs(), progress=False, verify="off"
    )


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("qwen3", (KeepFirst(), DropBlocks((0,)))),
        ("llama-tied-odd", (KeepFirst(kinds=("channels",)),)),
        ("t5", (KeepFirst(),)),
        ("olmoe", (KeepFirst(keep=0.75, kinds=("experts",)),)),
    ],
    ids=["qwen3", "llama", "t5", "olmoe"],
)
@torch.no_grad()
def test_transformers_loads_it(name: str, passes: tuple[Any, ...], tmp_path: Path) -> None:
    animal = entry(name)
    small = compress(name, *passes)
    small.save_pretrained(tmp_path / "plain")
    assert {file.suffix for file in (tmp_path / "plain").iterdir()} <= {".json", ".safetensors"}
    model = type(animal.build()).from_pretrained(tmp_path / "plain").eval()
    small.set_backend("eager")
    inputs = animal.inputs()
    torch.testing.assert_close(scores(model(**inputs)), scores(small(**inputs)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ArtifactError, match="already exists"):
        small.save_pretrained(tmp_path / "plain")


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    quantized = compress("qwen3", KeepFirst(), "quantize-weights")
    with pytest.raises(ArtifactError, match=r"weight: is int8.*dense weights only.*use save\(\)"):
        quantized.save_pretrained(tmp_path / "a")
    uneven = compress("qwen3", KeepFirst(kinds=("channels",), fewer=2))
    with pytest.raises(ArtifactError, match=r"no configuration of .* describes the cut model.*use save\(\)"):
        uneven.save_pretrained(tmp_path / "a")
    own = fxcompress.compress(
        build(), [KeepFirst(kinds=("channels",))], example_inputs={"input_ids": tokens()}, progress=False
    )
    with pytest.raises(ArtifactError, match="no model class of transformers"):
        own.save_pretrained(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
