"""Prune, quantize, compile, save, load in a new process, generate: one recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress
from fxcompress import CompressedModel
from tests.zoo import entry

GPTQ4 = [{"gptq": {"bits": 4, "group_size": 16}}, {"quantize-weights": {"only_remaining": True}}]
W8A8 = ["quantize-weights", "quantize-activations"]
CODE = """
import json, sys, torch, fxcompress
small = fxcompress.load(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
logits = small(input_ids=ids, use_cache=False).logits
settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
tokens = [small.generate(ids, **settings).tolist()]
if sys.argv[3] == "static":
    tokens.append(small.generate(ids, **settings, cache_implementation="static").tolist())
found = [kept is not None for session in small.generate._sessions.values() for kept in session._kept.values()]
print(json.dumps([tokens, float(logits.double().sum()), found]))
"""


def in_new_process(folder: Path, ids: torch.Tensor, caches: str) -> list[Any]:
    command = [sys.executable, "-c", CODE, str(folder), json.dumps(ids.tolist()), caches]
    threads = {
        "OMP_NUM_THREADS": str(torch.get_num_threads())
    }  # compiled steps are kept for a number of them
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def check(small: CompressedModel, ids: torch.Tensor, folder: Path, caches: str = "") -> None:
    """Compiled and reference agree, here and in a new process, which finds the steps compiled here.

    The decoding loop serves the cut cache.
    """
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
    }
    compiled = small(input_ids=ids, use_cache=False).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXCOMPRESS_KEEP_STEPS", "1")
        tokens = small.generate(ids, **settings)
        small.save(folder)
        again, total, found = in_new_process(folder, ids, caches)
    assert found == [True, True]  # the prompt and the step, compiled here
    assert small.generate._refusal is None  # our loop, with memory of the cut shapes
    assert all(one == tokens.tolist() for one in again)
    assert len(again) == (2 if caches == "static" else 1)
    assert abs(total - float(compiled.double().sum())) <= 1e-3 * float(compiled.double().abs().sum())
    small.set_backend("eager")
    expected = small(input_ids=ids, use_cache=False).logits
    assert float((compiled - expected).norm() / expected.norm()) < 0.02
    assert_same_choices(small, tokens, small.generate(ids, **settings))


def assert_same_choices(small: CompressedModel, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal tokens up to a choice between two that the reference finds as good, as far as logits agree."""
    for one, two in zip(found, expected, strict=True):
        differ = (one != two).nonzero()
        if len(differ) == 0:
            continue
        place = int(differ[0])
        logits = small(input_ids=two[None, :place], use_cache=False).logits[0, -1]
        gap = logits[two[place]] - logits[one[place]]
        assert 0 <= float(gap) < 0.02 * float(logits.norm()), f"token {place}: {float(gap)}"


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [GPTQ4, W8A8], ids=["w4-gptq", "w8a8"])
def test_tiny_decoder(quantized: list[Any], tmp_path: Path) -> None:
    """Layers of different widths and numbers of heads: caches of their own."""
    model = entry("llama").build()
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(1, 100, (2, 8), generator=generator)} for _ in range(4)]
    prune = [
        {"prune-channels": {"amount": 0.5, "granularity": ["heads"], "include": ["*.layers.0.*"]}},
        {"prune-channels": {"amount": 0.3, "include": ["*.layers.1.*"]}},
    ]
    small = fxcompress.compress(model, [*prune, *quantized, "fuse-siblings"], data, progress=False)
    assert small.artifact.structure is not None
    heads = [shape[0] for shape in small.artifact.structure.cache]
    assert len(set(heads)) > 1
    check(small, data[0]["input_ids"], tmp_path / "out", "static" if quantized is GPTQ4 else "")


@pytest.mark.slow
def test_experts(tmp_path: Path) -> None:
    """A quarter of the experts by the rows they are given, then W4; the configuration tells how many stay."""
    model = entry("qwen3-moe").build()
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(1, 100, (2, 8), generator=generator)} for _ in range(4)]
    prune = {"prune-channels": {"amount": 0.25, "granularity": ["experts"], "importance": "wanda"}}
    small = fxcompress.compress(model, [prune, *GPTQ4], data, progress=False)
    assert small.report.structure["changed"] == {"num_local_experts": [4, 3]}
    check(small, data[0]["input_ids"], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.real_model
def test_packaged_model(smollm_small: Any, smollm_tokenizer: Any, tmp_path: Path) -> None:
    """Three blocks of the packaged model: a third of the heads and a quarter of the channels, then W4."""
    texts = [
        "The capital of France is Paris, and that of Italy is Rome.",
        "Water boils at one hundred degrees.",
    ]
    prune = {"prune-channels": {"amount": 0.3, "granularity": ["channels", "heads"], "round_to": 2}}
    quantize = [{"gptq": {"bits": 4, "group_size": 64}}, {"quantize-weights": {"only_remaining": True}}]
    small = fxcompress.compress(
        smollm_small, [prune, *quantize], texts, tokenizer=smollm_tokenizer, progress=False
    )
    structure = small.report.structure
    assert structure["changed"] == {
        "intermediate_size": [1536, 1076],
        "num_attention_heads": [9, 6],
        "num_key_value_heads": [3, 2],
    }
    removed = 1 - structure["after"]["block_parameters"] / structure["before"]["block_parameters"]
    assert 0.25 < removed < 0.35
    check(small, smollm_tokenizer(texts[0], return_tensors="pt").input_ids, tmp_path / "out")
