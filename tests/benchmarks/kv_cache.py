"""Quantized key/value caches: perplexity with the cache in use, bytes, and decoding speed.

Run: python -m tests.benchmarks.kv_cache [--contexts 512 2048 8192] [--texts documentation news] [--chunk 64]
     python -m tests.benchmarks.kv_cache --speed [--contexts 4096 8192]

Perplexity is teacher-forced through the cache: the text is read in chunks, each of which sees the earlier
ones as the cache keeps them and itself as it is. Bytes are those of the allocated cache, all overheads
counted, over a float16 cache of the same capacity. Speed compares decoding steps of one compressed model
with and without a quantized cache, interleaved, on caches filled with random content. Results are added to
``results/kv_cache.json`` as they come.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import fxcompress
from examples.texts import documentation_text, news_text
from fxcompress.backends.packed_cache import PackedCache
from fxcompress.calibration import as_calibration
from fxcompress.capture import capture_model
from fxcompress.generation_cache import CacheMaker
from fxcompress.manager import run_recipe
from tests.benchmarks.common import RESULTS, calibration_windows, environment, packaged_model, write

_KIVI = {"key_axis": "channel"}
RECIPES: dict[str, dict[str, Any] | None] = {
    "exact": None,
    "int8 per token": {"quantize-kv-cache": {"bits": 8}},
    "fp8-e4m3 per token": {"quantize-kv-cache": {"format": "fp8-e4m3"}},
    **{f"int{bits} per token": {"quantize-kv-cache": {"bits": bits}} for bits in (4, 3, 2)},
    **{f"int{bits} rotated": {"quantize-kv-cache": {"bits": bits, "rotate": True}} for bits in (8, 4, 3, 2)},
    **{
        f"KIVI {bits}": {"quantize-kv-cache": {"bits": bits, **_KIVI, "group_size": size, "residual": size}}
        for bits, size in ((8, 64), (4, 64), (3, 32), (2, 32))
    },
    **{
        f"KIVI {bits}, keys per token": {
            "quantize-kv-cache": {"bits": bits, "group_size": 32, "residual": 32}
        }
        for bits in (4, 2)
    },
    **{f"WKVQuant {bits}": {"wkvquant": {"bits": bits}} for bits in (8, 4, 3, 2)},
    **{f"KVQuant {bits}": {"kvquant": {"bits": bits, "q_norm": bits == 2}} for bits in (8, 4, 3, 2)},
    "KVQuant 3, after rotation": {"kvquant": {"bits": 3, "pre_rotary": False}},
    "KVQuant 3, no outliers": {"kvquant": {"bits": 3, "outliers": 0.0}},
}
"""Name → pass; None is the cache as it is."""
TIMED = (
    *("exact", "int8 per token", "fp8-e4m3 per token", "int4 rotated", "KIVI 4", "KIVI 2"),
    *("WKVQuant 4", "KVQuant 3", "KVQuant 2"),
)
"""Those whose speed is measured."""


@torch.no_grad()
def perplexity(model: Any, cache: Any, ids: Tensor, chunk: int) -> float:
    """Of one text ``[T]``, read in chunks."""
    losses = []
    for first in range(0, len(ids), chunk):
        part = ids[first : first + chunk]
        logits = model(input_ids=part[None], past_key_values=cache, use_cache=True).logits[0]
        targets = ids[first + 1 : first + chunk + 1]
        losses.append(torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum"))
    return math.exp(float(torch.stack(losses).sum()) / (len(ids) - 1))


def forms_of(model: Any, program: Any, item: dict[str, Any], data: Any) -> dict[int, Any]:
    """The cache's forms by layer after one pass."""
    state = run_recipe(program, [item], data, verify="off").state
    return CacheMaker(model, state.forms).layers


def share(forms: dict[int, Any], model: Any, capacity: int) -> float:
    """Bytes over those of a float16 cache."""
    cache = PackedCache(model.config, forms, capacity)
    cache.allocate(1, torch.float32, torch.device("cpu"))
    half = sum(2 * capacity * form.heads * (form.key_width + form.value_width) for form in forms.values())
    return cache.nbytes / half


def quality(options: argparse.Namespace, content: dict[str, Any]) -> None:
    """Perplexities and bytes of every recipe."""
    model, tokenizer = packaged_model()
    texts = {"documentation": documentation_text("held-out"), "news": news_text()}
    ids = {name: tokenizer(texts[name], return_tensors="pt").input_ids[0] for name in options.texts}
    program = capture_model(model, (), {"input_ids": torch.arange(64).view(2, 32), "use_cache": False})
    rows = calibration_windows(tokenizer, options.samples)
    batches = [{"input_ids": row[None], "use_cache": False} for row in rows]
    data = as_calibration(batches, program, samples=len(batches))
    results = content.setdefault("quality", {})
    for name, item in RECIPES.items():
        if options.only and name not in options.only:
            continue
        forms = None if item is None else forms_of(model, program, item, data)
        row = results.setdefault(name, {})
        if forms is not None:
            row["share of float16 at 8192"] = round(share(forms, model, 8192), 4)
        for context in options.contexts:
            for text, tokens in ids.items():
                if len(tokens) < context:
                    continue
                cache: Any = DynamicCache(config=model.config)
                if forms is not None:
                    cache = PackedCache(model.config, forms, context)
                found = perplexity(model, cache, tokens[:context], options.chunk)
                row[f"{text} {context}"] = found
                base = results.get("exact", {}).get(f"{text} {context}")
                if base:
                    row[f"{text} {context} change %"] = 100 * (found / base - 1)
        write("kv_cache", content)
        sys.stderr.write(f"{name}: {row}\n")


def filled(small: Any, context: int) -> Any:
    """A decoding session whose cache holds ``context`` random tokens; compiled and ready to step."""
    session = small.generate.session(1, context + 128)
    session.prefill(torch.randint(100, 10000, (1, 16)))
    session.step()
    for layer in session._cache.layers:
        if hasattr(layer, "memory"):
            shape = (1, layer.form.heads, context - int(layer.length), layer.form.key_width)
            keys, values = (torch.randn(shape).to(layer.record.dtype) for _ in range(2))
            layer.record.append(layer.memory, int(layer.length), keys, values)
            layer.length.fill_(context)
        else:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
    session._used = context
    return session


def speed(options: argparse.Namespace, content: dict[str, Any]) -> None:
    """Milliseconds per decoding step."""
    model, tokenizer = packaged_model()
    data = [
        {"input_ids": row[None], "use_cache": False}
        for row in calibration_windows(tokenizer, options.samples)
    ]
    results = content.setdefault("speed", {})
    for name in options.dtypes:
        dtype = getattr(torch, name)
        weights = {"quantize-weights": {"bits": 8}}
        models = {
            kind: fxcompress.compress(
                *(model.to(dtype), [weights, *([] if item is None else [item])], data),
                verify="off",
                progress=False,
            )
            for kind, item in RECIPES.items()
            if kind in (options.only or TIMED)
        }
        for context in options.contexts:
            sessions = {kind: filled(small, context) for kind, small in models.items()}
            times: dict[str, list[float]] = {kind: [] for kind in sessions}
            for _ in range(options.rounds):
                for kind, session in sessions.items():
                    started = time.perf_counter()
                    for _ in range(5):
                        session.step()
                    times[kind].append((time.perf_counter() - started) / 5)
            found = {kind: round(1e3 * statistics.median(seconds), 2) for kind, seconds in times.items()}
            results[f"{name} {context} ms per token"] = found
            write("kv_cache", content)
            sys.stderr.write(f"{name} {context}: {found}\n")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--contexts", type=int, nargs="*")
    parser.add_argument("--texts", nargs="*", default=["documentation", "news"])
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    options.contexts = options.contexts or ([4096, 8192] if options.speed else [512, 2048, 8192])
    path = RESULTS / "kv_cache.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    protocol = f"chunks of {options.chunk} tokens, {options.samples} calibration windows of 512 tokens"
    if not options.speed and content.get("protocol") != protocol:
        content = {"protocol": protocol, "speed": content.get("speed", {})}
    content["environment"] = environment(["-m", "tests.benchmarks.kv_cache", *sys.argv[1:]])
    (speed if options.speed else quality)(options, content)


if __name__ == "__main__":
    main()
