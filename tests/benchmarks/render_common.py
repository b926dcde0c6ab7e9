"""What the sections of docs/results.md share."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.suites import SUITES

TEXTS = ("documentation", "news")
MODELS = {"packaged": "Packaged model", "off-grid": "Off-grid copy", "outlier": "Copy with outliers"}


def environment(content: dict[str, Any]) -> str:
    known = content["environment"]
    versions = ", ".join(f"{key} {known[key]}" for key in ("python", "torch", "transformers"))
    return (
        f"Machine: {known['processor']} ({known['cpu capability']}), {known['threads']} threads; {versions}."
        f" Command: `{known['command']}`."
    )


def head(title: str, content: dict[str, Any]) -> list[str]:
    return [f"## {title}", "", f"{content['protocol']}. {environment(content)}", ""]


def tables(suite: str, content: dict[str, Any]) -> list[str]:
    """One table per model, rows in the order of the suite."""
    lines = []
    for kind, title in MODELS.items():
        rows = content.get(kind)
        if not rows:
            continue
        lines += [f"### {title}", "", "| variant | documentation | news | MB |", "|---|---|---|---|"]
        for name in ("fp32", *SUITES[suite]):
            if name not in rows:
                continue
            row, cells = rows[name], []
            for text in TEXTS:
                change = row.get("change %", {}).get(text)
                cells.append(
                    f"{row['perplexity'][text]:.2f}" + (f" ({change:+.2f} %)" if change is not None else "")
                )
            size = row.get("totals", {}).get("bytes_after")
            lines.append(f"| {name} | {cells[0]} | {cells[1]} | {f'{size / 1e6:.0f}' if size else '538'} |")
        lines.append("")
    return lines
