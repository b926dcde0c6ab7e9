"""A small random decoder, compressed, compiled, saved and generating on generated kernels, and the reference.

Run as a program: ``FXCOMPRESS_CHECK_DEVICE=cuda python -m tests.backends.triton_decoders [RECIPE ...]``
prints one JSON object: recipe → errors. Without a device, ``TRITON_INTERPRET=1 FXCOMPRESS_TARGET=triton``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxcompress
from fxcompress.backends import dynamo
from tests.backends.triton_common import DEVICE
from tests.backends.triton_models import as_it_is, started_kernels

CACHED = "w4a16, kv4-kivi"
RECIPES: dict[str, Any] = {
    name: name for name in ("w4a16", "w8a16", "w8a8", "w4a8", "fp8", "nf4", "sparse-2of4", "w4a16-gptq")
}
RECIPES[CACHED] = {
    "passes": [
        {"quantize-weights": {"bits": 4, "group_size": 64}},
        {"quantize-kv-cache": {"bits": 4, "key_axis": "channel", "group_size": 32, "residual": 32}},
        "fuse-siblings",
    ]
}
SMALL = DEVICE.type == "cpu"  # the interpreter is slow
TOKENS = 2 if SMALL else 24
VOCABULARY = 64 if SMALL else 320


def decoder() -> Any:
    """Two layers, four query heads to two key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64 if SMALL else 256,
        intermediate_size=64 if SMALL else 512,
        num_hidden_layers=1 if SMALL else 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).half().eval().to(DEVICE)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def generated(model: Any, ids: Tensor) -> list[int]:
    """Greedy tokens."""
    found: list[int] = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
    return found


def check(recipe: str, ids: Tensor) -> dict[str, Any]:
    """Relative differences of logits, and how many greedy tokens agree from the first."""
    started = time.perf_counter()
    model = decoder()
    data = [torch.randint(2, VOCABULARY, (1, 64), device=DEVICE) for _ in range(2)]
    made = RECIPES[recipe]
    made = fxcompress.Recipe.load(made) if isinstance(made, dict) else made
    small = fxcompress.compress(model, made, calibration=data, progress=False)
    prompt = {"input_ids": ids}
    logits, tokens = small(**prompt).logits, generated(small, ids)
    row: dict[str, Any] = {"kernels": sorted(set(small.explain().values()))}
    with tempfile.TemporaryDirectory() as folder:
        small.save(Path(folder) / "out")
        again = fxcompress.load(Path(folder) / "out", device=DEVICE)
        row["loaded"] = difference(again(**prompt).logits, logits)
        row["same tokens loaded"] = _agree(generated(again, ids), tokens)
    small.set_backend("eager")
    row["error"] = difference(logits, small(**prompt).logits)
    row["same tokens"] = _agree(tokens, generated(small, ids))
    row["compression"] = difference(logits, model(**prompt).logits)
    row["seconds"] = time.perf_counter() - started
    return row


def _agree(one: list[int], two: list[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), len(one))


def compiled(ids: Tensor) -> dict[str, Any]:
    """``torch.compile(model, backend="fxcompress")`` beside the model."""
    model = decoder()
    expected = model(input_ids=ids).logits
    fast = torch.compile(model, backend="fxcompress", options={"recipe": "w4a16"})
    return {"compression": difference(fast(input_ids=ids).logits, expected)}


@torch.no_grad()
def main() -> None:
    """Run all recipes, or those named."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if DEVICE.type == "cpu":
        dynamo.compile_with_inductor = as_it_is
    started = started_kernels()
    torch.manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (1, 5 if SMALL else 40), device=DEVICE)
    rows: dict[str, Any] = {}
    for recipe in sys.argv[1:] or [*RECIPES, "torch.compile"]:
        started.clear()
        rows[recipe] = compiled(ids) if recipe == "torch.compile" else check(recipe, ids)
        rows[recipe]["started"] = sorted(set(started))
    print(json.dumps(rows))  # noqa: T201


if __name__ == "__main__":
    main()
