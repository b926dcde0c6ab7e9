"""How far training heals the packaged model: 3-bit, 2:4 and cut students, plain fine-tuning against teachers.

Run: python -m tests.benchmarks.distillation [--students 3-bit …] [--objectives ce kd …] [--steps 60]

Every student is trained on documentation, for equally many steps on equal data from equal seeds, and judged
by its perplexity on documentation it has not seen, and on news, a kind of text it is not trained on. Rows
are added to ``results/distillation.json`` as they come; rows measured already are kept unless ``--again`` is
given.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor

from fxcompress.calibration import as_calibration
from fxcompress.calibration.plan import Plan
from fxcompress.capture import capture_model
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState
from fxcompress.manager import RunResult, run_recipe
from fxcompress.progress import ProgressEvent
from fxcompress.training.catalogue import objective_from
from fxcompress.training.data import as_training
from fxcompress.training.graph import TrainingGraph
from fxcompress.training.loop import train
from fxcompress.training.options import TrainingOptions
from fxcompress.training.trainable import What
from tests.benchmarks.common import (
    RESULTS,
    calibration_windows,
    environment,
    held_out,
    packaged_model,
    write,
)

EXAMPLE = {"input_ids": torch.arange(64).view(2, 32), "use_cache": False}
STUDENTS: dict[str, dict[str, Any]] = {
    "3-bit": {
        "recipe": [{"quantize-weights": {"bits": 3, "group_size": 64, "embedding_bits": 8}}],
        "what": What(parts=("weights",), steps="learned"),
        "rate": 2e-4,
    },
    "2:4": {
        "recipe": [{"sparsegpt": {"pattern": "2:4"}}],
        "what": What(parts=("weights",)),
        "rate": 2e-4,
    },
    "30 % cut": {
        "recipe": [
            {
                "prune-channels": {
                    "amount": 0.3,
                    "target": "block-parameters",
                    "importance": "flap",
                    "max_amount": 0.9,
                    "recover": True,
                    "round_to": 16,
                }
            }
        ],
        "what": What(parts=("lora", "floats"), rank=32, alpha=32),
        "rate": 5e-4,
    },
}
OBJECTIVES: dict[str, Any] = {
    "ce": "ce",
    "kd": "kd",
    "kd, half labels": {"kd": {"hard_ratio": 0.5}},
    "reverse-kl": "reverse-kl",
    "skew-kl": "skew-kl",
    "jsd": {"gkd": {"on_policy": 0.0}},
    "gkd": {"gkd": {"on_policy": 0.5, "new_tokens": 16}},
    "cakld": "cakld",
    "minillm": {"minillm": {"new_tokens": 16}},
    "kd and hidden": {"kd": {}, "hidden": {"weight": 1.0}},
    "ted": {"ted": {"filter_steps": 20}},
}


@torch.no_grad()
def perplexity(graph: TrainingGraph, windows: Tensor) -> float:
    """``exp`` of the mean next-token loss over ``windows [S, T]``."""
    name = graph.signature.placeholder("input_ids")
    assert name is not None
    total = 0.0
    for row in windows:
        scores = graph({name: row[None]}).scores[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(scores, row[1:]))
    return math.exp(total / len(windows))


def compress(program: Program, student: str, tokenizer: Any, samples: int) -> RunResult:
    rows = calibration_windows(tokenizer, samples)
    batches = [{"input_ids": row[None], "use_cache": False} for row in rows]
    return run_recipe(
        program, STUDENTS[student]["recipe"], as_calibration(batches, program, samples=samples), verify="off"
    )


def measure(
    program: Program, small: RunResult, student: str, objective: str, tokenizer: Any, options: Any
) -> dict[str, Any]:
    """Train one student by one objective; perplexities at every look."""
    spec, plan = STUDENTS[student], Plan(small.program)
    graph = TrainingGraph(plan, small.state, spec["what"])
    teacher = TrainingGraph(Plan(program), CompressionState(program.weights), None)
    texts = held_out(tokenizer, options.windows)
    windows = texts["documentation"]
    rows = calibration_windows(tokenizer, options.sequences)
    cut = rows.unfold(1, options.length, options.length).flatten(0, 1)  # shorter sequences, all different
    data = as_training(
        [{"input_ids": r[None], "use_cache": False} for r in cut], small.program, samples=1 << 20
    )
    started = time.process_time()
    looked = 0.0
    curve = [[0, perplexity(graph, windows)]]
    news = [perplexity(graph, texts["news"])]

    def look(event: ProgressEvent) -> None:
        nonlocal looked
        if event.stage == "distill" and event.done % options.look == 0:
            begun = time.process_time()
            curve.append([event.done, perplexity(graph, windows)])
            looked += time.process_time() - begun
            sys.stderr.write(f"{student}, {objective}: step {event.done}: {curve[-1][1]:.2f}\n")

    settings = TrainingOptions(
        steps=options.steps,
        batch_size=options.batch,
        learning_rate=spec["rate"],
        precision=options.precision,
        seed=options.seed,
    )
    result = train(graph, teacher, data, objective_from(OBJECTIVES[objective]), settings, progress=look)
    seconds = round(time.process_time() - started - looked)
    return {
        "curve": curve,
        "news": [*news, perplexity(graph, texts["news"])],
        "tokens": result.tokens,
        "trained": sum(p.numel() for p in graph.parameters() if p.requires_grad),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", nargs="*", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--objectives", nargs="*", choices=list(OBJECTIVES), default=["ce", "kd"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--look", type=int, default=15)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--name", default="distillation")
    options = parser.parse_args()
    model, tokenizer = packaged_model()
    program = capture_model(model, (), EXAMPLE)
    path = RESULTS / f"{options.name}.json"
    protocol = (
        f"{options.steps} steps of {options.batch} × {options.length} tokens,"
        f"{' products in bfloat16,' if options.precision == 'bf16' else ''}"
        f" {options.windows} held-out windows of 512 tokens"
    )
    content = json.loads(path.read_text()) if path.exists() else {}
    if content.get("protocol") != protocol:  # figures of another protocol are not comparable
        content = {"protocol": protocol}
    content["environment"] = environment(["-m", "tests.benchmarks.distillation"])
    if "fp32" not in content:
        original = TrainingGraph(Plan(program), CompressionState(program.weights), None)
        texts = held_out(tokenizer, options.windows)
        content["fp32"] = {name: perplexity(original, windows) for name, windows in texts.items()}
    for student in options.students:
        rows = content.setdefault("students", {}).setdefault(student, {})
        wanted = [name for name in options.objectives if options.again or name not in rows]
        small = compress(program, student, tokenizer, options.samples) if wanted else None
        for objective in wanted:
            assert small is not None
            rows[objective] = measure(program, small, student, objective, tokenizer, options)
            write(options.name, content)


if __name__ == "__main__":
    main()
