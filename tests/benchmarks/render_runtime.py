"""Sections of docs/results.md about caches, other runtimes and the time to a first token."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.kv_cache import RECIPES
from tests.benchmarks.render_common import environment


def caches(content: dict[str, Any]) -> list[str]:
    """Perplexity, bytes and speed of quantized key/value caches."""
    lines = ["## Key/value caches", "", environment(content), ""]
    lines += [
        "Perplexity with the cache in use: texts are read in chunks of 64 tokens, each of which sees the",
        "earlier ones as the cache keeps them. Bytes are of the allocated cache for 8192 tokens, overheads",
        "included, as a share of float16. In brackets the change against the cache as it is. This model has",
        "three heads of 64 channels for keys: 2 bits cost it more than models with wider caches, mostly in",
        "the keys. WKVQuant and KVQuant are calibrated on windows of 512 tokens; what they learn of rotated",
        "keys (all of WKVQuant's; KVQuant's *after rotation*) does not hold at positions they have not seen.",
        "",
    ]
    quality = content.get("quality", {})
    columns = [key for key in quality.get("exact", {}) if not key.endswith("%")]
    columns.sort(key=lambda key: (key.rpartition(" ")[0], int(key.rpartition(" ")[2])))
    lines += ["| cache | bytes | " + " | ".join(f"{key} tokens" for key in columns) + " |"]
    lines += ["|---" * (2 + len(columns)) + "|"]
    for name in (name for name in RECIPES if name in quality):
        row = quality[name]
        size = row.get("share of float16 at 8192")
        cells = []
        for key in columns:
            change = row.get(f"{key} change %")
            cells.append(
                ""
                if key not in row
                else f"{row[key]:.2f}" + ("" if change is None else f" ({change:+.2f} %)")
            )
        lines.append(f"| {name} | {'1' if size is None else f'{size:.3f}'} | {' | '.join(cells)} |")
    lines.append("")
    speeds = content.get("speed", {})
    if speeds:
        kinds = [kind for kind in RECIPES if kind in next(iter(speeds.values()))]
        lines += ["Milliseconds per token of a decoder with 8-bit weights, variants taking turns:", ""]
        lines += [
            "| dtype, tokens in the cache | " + " | ".join(kinds) + " |",
            "|---" * (1 + len(kinds)) + "|",
        ]
        for name in sorted(speeds, key=lambda name: (name.split()[0], int(name.split()[1]))):
            row = speeds[name]
            cells = " | ".join(f"{row[kind]:.2f}" for kind in kinds)
            lines.append(f"| {name.removesuffix(' ms per token')} | {cells} |")
        lines.append("")
    return lines


def onnx(content: dict[str, Any]) -> list[str]:
    """Exports beside what ONNX Runtime's own quantizers make."""
    lines = ["## In ONNX Runtime", "", environment(content), ""]
    if "decoders" in content:
        lines += [
            "Decoders exported with their cache, generating in onnxruntime-genai beside the model that its",
            "own builder makes; all take turns.",
            "",
            *_table("folder", content["decoders"]),
        ]
    rows = content.get("rows")
    if not rows:
        return lines
    lines += [
        "The packaged model exported and run by ONNX Runtime, beside what its own quantizers make of the",
        "same float export; all take turns. Perplexity is over windows of the held-out texts.",
        "",
        *_table("file", rows),
    ]
    return lines


def _table(title: str, rows: dict[str, dict[str, float]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.2f}" if c in row else "" for c in columns) + " |")
    return [*lines, ""]


def first_token(content: dict[str, Any]) -> list[str]:
    """Seconds from a new process to its first tokens."""
    rows = content["rows"]
    phases = list(next(iter(rows.values()))["compiling"])
    lines = ["## From a new process to the first token", "", environment(content), ""]
    lines += [
        "Seconds. A saved model is loaded and generates one token, then three (which compiles the step).",
        "The last columns are what compiling took in all, by torch's counters; they contain each other.",
        "",
        "| | import | load | first token | to the first token | step and two more | "
        + " | ".join(phases)
        + " |",
        "|---" * (6 + len(phases)) + "|",
    ]
    keys = ("import", "load", "first token", "to the first token", "step and two more")
    for name, row in rows.items():
        cells = [f"{row[key]:.1f}" for key in keys] + [f"{row['compiling'][key]:.1f}" for key in phases]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]
