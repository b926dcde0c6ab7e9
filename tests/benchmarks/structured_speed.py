"""How much faster a model with less structure is: measured ratios beside those of parameters and operations.

Cuts are uniform (every layer alike), since speed depends on sizes and not on which units stay. Every cut
model is written as a plain checkpoint and loaded by transformers, so that what is timed has nothing of this
project in it; with ``--recipe`` the same models are timed compressed and compiled too. Variants take turns.

A decoded token reads every weight once, so its time should follow the parameters a step reads (tables that
are only looked up do not count); a long prompt should follow the operations. ``agrees`` is the ratio of the
measured speed-up to the expected one.

Run: python -m tests.benchmarks.structured_speed [--rounds 5] [--recipe w8a16]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import fxcompress
from fxcompress.bench import BenchSettings, Variant, bench
from fxcompress.capture import capture_model
from fxcompress.structure.cost import cost_of
from tests.benchmarks.common import calibration_windows, environment, packaged_model, write


@dataclass(frozen=True)
class Sizes:
    """What a model reads per decoded token, and does in a prompt of 512 tokens."""

    parameters: int
    operations: int

    def expected(self, whole: Sizes) -> dict[str, float]:
        """Speed-ups if time followed these numbers."""
        return {
            "decode": whole.parameters / self.parameters,
            "prefill": whole.operations / self.operations,
        }


def sizes(model: Any) -> Sizes:
    """Count a causal language model by its graph."""
    inputs = {"input_ids": torch.arange(1024).view(2, 512) % 1000, "use_cache": False}
    cost = cost_of(capture_model(model, (), inputs))
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    return Sizes(cost.parameters - (0 if tied else table.numel()), cost.flops)


def cut_models(model: Any, data: Any, folder: Path, amounts: list[float]) -> dict[str, Any]:
    """Plain models by name."""
    found = {"whole": model}
    for amount in amounts:
        budget = {"amount": amount, "target": "block-parameters", "round_to": 16}
        heads = {"granularity": ["channels", "heads"]}
        recipes: dict[str, Any] = {
            f"{amount:.0%} by channels": {"prune-channels": budget},
            f"{amount:.0%} by channels and heads": {"prune-channels": {**budget, **heads}},
            f"{amount:.0%} by blocks": {
                "remove-blocks": {"amount": amount, "criterion": "angular", "samples": 2}
            },
        }
        for name, recipe in recipes.items():
            path = folder / name.replace(" ", "-").replace("%", "")
            fxcompress.compress(model, [recipe], data, verify="off", progress=False).save_pretrained(path)
            found[name] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            sys.stderr.write(f"{name}: made\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amounts", type=float, nargs="*", default=[0.1, 0.2, 0.3])
    parser.add_argument("--steps", type=int, default=63, help="decoded tokens")
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    parser.add_argument("--recipe", help="also time the models compressed by this recipe and compiled")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = BenchSettings(rounds=options.rounds, steps=options.steps)
    model, tokenizer = packaged_model()
    data = [{"input_ids": row.unsqueeze(0), "use_cache": False} for row in calibration_windows(tokenizer, 2)]
    content: dict[str, Any] = {
        "environment": environment(["-m", "tests.benchmarks.structured_speed", *sys.argv[1:]])
    }
    with tempfile.TemporaryDirectory() as folder:
        models = cut_models(model, data, Path(folder), options.amounts)
    counted = {name: sizes(one) for name, one in models.items()}
    content["eager"] = measured(models, counted, settings)
    if options.recipe:
        small = {
            name: fxcompress.compress(one, options.recipe, data, verify="off", progress=False)
            for name, one in models.items()
        }
        content[options.recipe] = measured(small, counted, settings)
    write("structured-speed", content)


def measured(models: dict[str, Any], counted: dict[str, Sizes], settings: BenchSettings) -> dict[str, Any]:
    """Speeds and ratios by name."""
    variants = [Variant(name, model) for name, model in models.items()]
    result = bench(variants, settings=settings, progress=True)
    rows = {}
    for item in result.variants:
        expected = counted[item.name].expected(counted["whole"])
        found = {"decode": item.decode_ratio, "prefill": item.prefill_ratio}
        rows[item.name] = {
            "tokens per second": {"decode": item.decode, "prefill": item.prefill},
            "speed-up": found,
            "expected": expected,
            "agrees": {kind: (ratio or 0.0) / expected[kind] for kind, ratio in found.items()},
        }
        sys.stderr.write(f"{item.name}: {rows[item.name]}\n")
    return rows


if __name__ == "__main__":
    main()
