"""Perplexity of every recipe on two kinds of held-out text, for the packaged model and its off-grid copy.

Run: python -m tests.benchmarks.quality [--windows 8] [--samples 16] [--only NAME ...]

Models are evaluated as their forms define them (the engine's reference interpreter, float32 activations),
so figures do not depend on kernels. Results are added to ``results/quality.json`` as they come.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcompress.calibration import as_calibration
from fxcompress.calibration.generated import generated_tokens
from fxcompress.calibration.walk import Plan, Walk
from fxcompress.capture import capture_model
from fxcompress.edits import CompressionState
from fxcompress.manager import run_recipe
from tests.benchmarks.common import (
    RESULTS,
    calibration_windows,
    environment,
    held_out,
    off_grid,
    packaged_model,
    write,
)


def rtn(bits: int, group: int, *, search: bool = False) -> list[Any]:
    return [{"quantize-weights": {"bits": bits, "group_size": group, "search": search}}]


def gptq(group: int, **options: Any) -> list[Any]:
    rest = {"quantize-weights": {"bits": 4, "group_size": group, "only_remaining": True}}
    return [{"gptq": {"bits": 4, "group_size": group, **options}}, rest]


# name: (recipe, calibration: None | "documentation" | "self")
CASES: dict[str, tuple[Any, str | None]] = {
    "w8a16": ("w8a16", None),
    "w4 g64, round to nearest": (rtn(4, 64), None),
    "w4 g64, gptq on documentation": (gptq(64), "documentation"),
    "w8a8": ("w8a8", None),
    "w8a8-smooth on documentation": ("w8a8-smooth", "documentation"),
    "w4 g128, round to nearest": (rtn(4, 128), None),
    "w4 g128, gptq on documentation": (gptq(128), "documentation"),
    "w4 g64, gptq on the model's own text": (gptq(64), "self"),
    "w4 g64, round to nearest, range search": (rtn(4, 64, search=True), None),
    "w4 g64, gptq without shrinkage on documentation": (gptq(64, shrinkage=0.0), "documentation"),
}


@torch.no_grad()
def perplexity(plan: Plan, state: CompressionState, windows: Tensor) -> float:
    walk = Walk(plan, [(row.unsqueeze(0), False) for row in windows])
    for _ in plan.blocks:
        walk.advance(state)
    losses = [
        torch.nn.functional.cross_entropy(outputs[0][0, :-1].float(), row[1:])
        for outputs, row in zip(walk.outputs(), windows, strict=True)
    ]
    return math.exp(float(torch.stack(losses).mean()))


def measure(
    model: Any, tokenizer: Any, options: argparse.Namespace, known: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and results of every case; ``known`` are the rows measured before, for the float32 baseline."""
    example = {"input_ids": torch.arange(64).view(2, 32), "use_cache": False}
    program = capture_model(model, (), example)
    plan = Plan(program)
    texts = held_out(tokenizer, options.windows)
    data: dict[str, Any] = {}
    if "fp32" in known:
        base = known["fp32"]["perplexity"]
    else:
        original = CompressionState(program.weights)
        base = {kind: perplexity(plan, original, rows) for kind, rows in texts.items()}
        yield "fp32", {"perplexity": base}
    for name, (recipe, source) in CASES.items():
        if options.only and name not in options.only:
            continue
        started = time.perf_counter()
        if source is not None and source not in data:
            rows = (
                calibration_windows(tokenizer, options.samples)
                if source == "documentation"
                else torch.cat(generated_tokens(model, samples=2 * options.samples))
            )
            batches = [{"input_ids": row.unsqueeze(0), "use_cache": False} for row in rows]
            data[source] = as_calibration(batches, program, samples=len(batches))
        result = run_recipe(program, recipe, data.get(source or ""), verify="off")
        seconds = time.perf_counter() - started
        found = {kind: perplexity(plan, result.state, rows) for kind, rows in texts.items()}
        change = {kind: 100 * (found[kind] / base[kind] - 1) for kind in found}
        yield (
            name,
            {
                "perplexity": found,
                "change %": change,
                "seconds": round(seconds),
                "totals": result.report.totals,
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument(
        "--model", choices=["packaged", "off-grid"], nargs="*", default=["packaged", "off-grid"]
    )
    options = parser.parse_args()
    model, tokenizer = packaged_model()
    path = RESULTS / "quality.json"
    protocol = f"{options.windows} windows of 512 tokens per text, {options.samples} calibration samples"
    content = json.loads(path.read_text()) if path.exists() else {}
    if content.get("protocol") != protocol:  # figures of another protocol are not comparable
        content = {"protocol": protocol}
    content["environment"] = environment(["-m", "tests.benchmarks.quality"])
    unknown = sorted(set(options.only) - set(CASES))
    if unknown:
        raise SystemExit(f"unknown case(s) {unknown}; known are {list(CASES)}")
    for kind in options.model:
        rows = content.setdefault(kind, {})
        chosen = model if kind == "packaged" else off_grid(model)
        for name, row in measure(chosen, tokenizer, options, rows):
            rows[name] = row
            write("quality", content)
            sys.stderr.write(f"{kind}: {name}: {row}\n")


if __name__ == "__main__":
    main()
