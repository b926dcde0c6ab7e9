"""Decode and prefill speed of compressed models beside eager and compiled torch, taking turns in one run.

With every figure goes its distance to the machine: bytes of weights streamed per second in decoding, as a
share of what two threads were measured to read, and operations per second in prefill, as a share of oneDNN's
8-bit matrix product.

Run: python -m tests.benchmarks.speed [--rounds 5] [--recipes w8a16 …] [--no-compiled]
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import fxcompress
from fxcompress.bench import BenchResult, BenchSettings, Variant, bench
from tests.benchmarks.common import environment, packaged_model, write

RECIPES = ("w8a16", "w4a16", "w4a8", "w8a8", "w8a8-mixed", "w8a8-outliers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--no-compiled", action="store_true", help="leave out torch's own compiler")
    options = parser.parse_args()
    model, _ = packaged_model()
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    variants = [Variant("fp32 eager", model), Variant("bf16 eager", narrow)]
    if not options.no_compiled:
        frozen = torch.compile(copy.deepcopy(narrow), options={"freezing": True})
        variants.append(Variant("bf16 Inductor, freezing", frozen))
    seconds = {}
    for recipe in options.recipes:
        started = time.perf_counter()
        variants.append(Variant(recipe, fxcompress.compress(model, recipe, verify="off")))
        seconds[recipe] = round(time.perf_counter() - started)
        sys.stderr.write(f"{recipe}: compressed in {seconds[recipe]} s\n")
    limits = {"read GB/s": reading_rate(), "int8 GOP/s": product_rate()}
    result = bench(variants, settings=BenchSettings(rounds=options.rounds), progress=True)
    content = {
        "environment": environment(["-m", "tests.benchmarks.speed", *sys.argv[1:]]),
        **result.to_dict(),
    }
    gaps = distances(result, limits, model)
    kernels = {
        variant.name: dict(Counter(variant.model.explain().values()))
        for variant in variants
        if hasattr(variant.model, "explain")
    }
    for item in result.variants:
        sys.stderr.write(
            f"{item.name}: decode {item.decode} ({item.decode_ratio}),"
            f" prefill {item.prefill} ({item.prefill_ratio}); {gaps[item.name]}\n"
        )
    write(
        "speed",
        {**content, "compress_seconds": seconds, "limits": limits, "distances": gaps, "kernels": kernels},
    )


def best(work: Callable[[], object], tries: int = 10) -> float:
    """Seconds of the best try."""
    found = []
    for _ in range(tries):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def reading_rate() -> float:
    """GB/s at which all threads read memory that no cache holds."""
    data = torch.ones(1 << 28)  # 1 GiB
    return data.nbytes / best(data.sum) / 1e9


def product_rate() -> float:
    """10⁹ operations per second of oneDNN's 8-bit product at 512 × 2048 × 8192."""
    x = torch.randint(-127, 127, (512, 2048), dtype=torch.int8)
    w = torch.randint(-127, 127, (8192, 2048), dtype=torch.int8).t()
    return 2 * 512 * 2048 * 8192 / best(lambda: torch._int_mm(x, w)) / 1e9


def distances(result: BenchResult, limits: dict[str, float], model: Any) -> dict[str, dict[str, float]]:
    """Per variant: what decoding reads and prefill multiplies per second, absolute and in percent."""
    table = model.get_input_embeddings().weight.numel()
    products = sum(p.numel() for p in model.parameters() if p.dim() == 2) - table
    found = {}
    for item in result.variants:
        reads = item.weight_bytes * (item.decode or 0.0) / 1e9
        operations = 2 * products * item.prefill / 1e9
        found[item.name] = {
            "read GB/s": round(reads, 2),
            "read %": round(100 * reads / limits["read GB/s"], 1),
            "GOP/s": round(operations, 1),
            "GOP/s %": round(100 * operations / limits["int8 GOP/s"], 1),
        }
    return found


if __name__ == "__main__":
    main()
