"""Perplexity of many recipes on two kinds of held-out text, for the packaged model and copies of it.

Run: python -m tests.benchmarks.quality [--suite quality] [--windows 8] [--samples 16] [--only NAME ...]

Models are evaluated as their forms define them (the engine's reference interpreter, float32 activations),
so figures do not depend on kernels. Results are added to ``results/SUITE.json`` as they come; rows measured
already are kept unless they are named.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
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
    with_outlier,
    write,
)
from tests.benchmarks.suites import SUITES

MODELS: dict[str, Callable[[Any], Any]] = {
    "packaged": lambda model: model,
    "off-grid": off_grid,
    "outlier": with_outlier,
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
    for name, (recipe, source) in SUITES[options.suite].items():
        if name not in options.only if options.only else name in known:
            continue
        started = time.perf_counter()
        if source is not None and source not in data:
            rows = calibration_rows(model, tokenizer, source, options.samples)
            batches = [{"input_ids": row.unsqueeze(0), "use_cache": False} for row in rows]
            data[source] = as_calibration(batches, program, samples=len(batches))
        result = run_recipe(program, recipe, data.get(source or ""), verify="off")
        seconds = time.perf_counter() - started
        small = Plan(result.program)
        found = {kind: perplexity(small, result.state, rows) for kind, rows in texts.items()}
        change = {kind: 100 * (found[kind] / base[kind] - 1) for kind in found}
        row = {
            "perplexity": found,
            "change %": change,
            "seconds": round(seconds),
            "totals": result.report.totals,
        }
        if result.report.structure:
            row["structure"] = {when: result.report.structure[when] for when in ("before", "after")}
        yield name, row


def calibration_rows(model: Any, tokenizer: Any, source: str, samples: int) -> list[Tensor]:
    """Windows of the documentation, twice as many of the model's own text (half as long), or both."""
    rows: list[Tensor] = []
    if source in ("documentation", "both"):
        rows += calibration_windows(tokenizer, samples)
    if source in ("self", "both"):
        rows += torch.cat(generated_tokens(model, samples=2 * samples))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=list(SUITES), default="quality")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--model", choices=list(MODELS), nargs="*", default=["packaged", "off-grid"])
    options = parser.parse_args()
    model, tokenizer = packaged_model()
    path = RESULTS / f"{options.suite}.json"
    protocol = f"{options.windows} windows of 512 tokens per text, {options.samples} calibration samples"
    content = json.loads(path.read_text()) if path.exists() else {}
    if content.get("protocol") != protocol:  # figures of another protocol are not comparable
        content = {"protocol": protocol}
    content["environment"] = environment(["-m", "tests.benchmarks.quality", "--suite", options.suite])
    unknown = sorted(set(options.only) - set(SUITES[options.suite]))
    if unknown:
        raise SystemExit(f"unknown case(s) {unknown}; known are {list(SUITES[options.suite])}")
    for kind in options.model:
        rows = content.setdefault(kind, {})
        for name, row in measure(MODELS[kind](model), tokenizer, options, rows):
            rows[name] = row
            write(options.suite, content)
            sys.stderr.write(f"{kind}: {name}: {row}\n")


if __name__ == "__main__":
    main()
