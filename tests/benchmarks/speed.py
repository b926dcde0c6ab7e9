"""Decode and prefill speed of compressed models beside float32 and bfloat16, taking turns in one run.

Run: python -m tests.benchmarks.speed [--rounds 3]
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch

import fxcompress
from fxcompress.bench import BenchSettings, Variant, bench
from tests.benchmarks.common import environment, packaged_model, write

RECIPES = ("w8a16", "w4a16", "w8a8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    options = parser.parse_args()
    model, _ = packaged_model()
    variants = [Variant("fp32 eager", model), Variant("bf16 eager", copy.deepcopy(model).to(torch.bfloat16))]
    seconds = {}
    for recipe in options.recipes:
        started = time.perf_counter()
        variants.append(Variant(recipe, fxcompress.compress(model, recipe, verify="off")))
        seconds[recipe] = round(time.perf_counter() - started)
        sys.stderr.write(f"{recipe}: compressed in {seconds[recipe]} s\n")
    result = bench(variants, settings=BenchSettings(rounds=options.rounds), progress=True)
    for item in result.variants:
        sys.stderr.write(
            f"{item.name}: decode {item.decode} ({item.decode_ratio}),"
            f" prefill {item.prefill} ({item.prefill_ratio})\n"
        )
    content = {
        "environment": environment(["-m", "tests.benchmarks.speed", *sys.argv[1:]]),
        **result.to_dict(),
    }
    write("speed", {**content, "compress_seconds": seconds})


if __name__ == "__main__":
    main()
