"""The table in README.md: speed and perplexity of other tools and ours, from the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.render_common import environment

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- written by tests/benchmarks/write_results.py -->\n", "<!-- end -->\n"
ROWS = {
    "torch fp32 eager": ("torch, float32", "fp32"),
    "torch bf16 Inductor, freezing": ("torch.compile, bfloat16", None),
    "torchao int4 g32, bf16, Inductor": ("torchao int4, compiled", None),
    "ONNX Runtime int4 g32": ("ONNX Runtime int4", None),
    "llama.cpp Q4_0": ("llama.cpp Q4_0", None),
    "llama.cpp Q4_K_M": ("llama.cpp Q4_K_M", None),
    "fxcompress w4a16": ("**fxcompress** 4 bits, GPTQ", "w4 g64, gptq on both"),
    "fxcompress w4 and w6, 16-bit activations": (
        "**fxcompress** 4 and 6 bits, GPTQ",
        "w4 and w6 g64, gptq on both",
    ),
    "fxcompress w8a8": ("**fxcompress** `w8a8-smooth`", "w8a8-smooth on documentation"),
}
"""Contender → title, and the row of the quality table that has the same kernels (None: measured beside)."""


def summary(peers: dict[str, Any], quality: dict[str, Any]) -> list[str]:
    """The table and what it was measured with."""
    versions = ", ".join(f"{name} {version}" for name, version in peers["versions"].items())
    lines = [
        "Tokens per second as multiples of float32 eager torch, all taking turns, and perplexity on two",
        "texts that no calibration has seen; 135M parameters. Speeds of ours are those of the same kernels",
        "without calibration, which changes numbers only.",
        "",
        "| | decode × | prompt of 512 × | documentation | news |",
        "|---|---|---|---|---|",
    ]
    rates, perplexity = peers["rates"], peers["perplexity"]
    for name, (title, row) in ROWS.items():
        found = quality["packaged"][row]["perplexity"] if row is not None else perplexity.get(name, {})
        cells = [f"{rates[name][work]['ratio']:.1f}" for work in ("decode", "prefill 512")]
        cells += [f"{found[text]:.2f}" if text in found else "" for text in ("documentation", "news")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, "", f"{environment(peers)} {versions}."]


def write_summary(results: Path) -> None:
    """Replace the part of README.md between the marks."""
    peers, quality = (
        json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("peers-packaged", "quality")
    )
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    body = "\n".join(summary(peers, quality)) + "\n"
    README.write_text(f"{before}{BEGIN}{body}{END}{after}", encoding="utf-8")
