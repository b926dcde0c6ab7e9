"""The section of docs/results.md about GPUs."""

from __future__ import annotations

from typing import Any

NO_GPU = """No figures of the generated Triton kernels on a GPU exist yet: none was available. The kernels
were compiled for compute capability 8.0 and 9.0 and compared with the reference in Triton's interpreter;
`python -m tests.benchmarks.gpu --write` measures everything in one call on a machine with a CUDA device."""


def gpu(content: dict[str, Any]) -> list[str]:
    """Tables of one device; figures are ratios to what was measured on it in the same run."""
    known, limits = content["environment"], content["ceilings"]
    wrong = [name for name, error in content["checks"].items() if error is not None]
    lines = [
        f"### {known['device']}",
        "",
        f"torch {known['torch']}, triton {known['triton']}, CUDA {known['cuda']}. Command:"
        f" `{known['command']}`. Copies {limits['copy'] / 1e9:.0f} GB/s, multiplies bfloat16 at"
        f" {limits['bfloat16'] / 1e12:.0f} TFLOP/s.",
        f"Checks against the reference: {', '.join(wrong) + ' failed' if wrong else 'all passed'}"
        f" ({len(content['checks'])} programs).",
        "",
        *([*content["note"], ""] if content.get("note") else []),
        *_decoders(content.get("models", {})),
        "| layer | rows | format | µs | GB/s | of copy | TFLOP/s | of peak | × bf16 | time / predicted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = content["products"]
    dense = {_product(row): row["seconds"] for row in rows if row["format"] == "torch bf16"}
    for row in rows:
        if row["seconds"] is None:
            continue
        took, base = row["seconds"], dense.get(_product(row))
        cells = [
            f"{row['outputs']}×{row['inputs']} ({row['model']})",
            str(row["rows"]),
            row["format"],
            f"{took * 1e6:.1f}",
        ]
        if "bytes" in row:
            rate, done = row["bytes"] / took, row["operations"] / took
            cells += [f"{rate / 1e9:.0f}", f"{rate / limits['copy']:.0%}", f"{done / 1e12:.1f}"]
            cells.append(f"{done / limits['bfloat16']:.0%}")
        else:
            cells += [""] * 4
        cells.append(f"{base / took:.2f}" if base else "")
        cells.append(f"{took / row['predicted']:.2f}" if "predicted" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| attention | batch | tokens | µs | × bf16 |", "|---|---|---|---|---|"]
    exact = {row["batch"]: row["seconds"] for row in content["attention"] if row["cache"] == "torch bf16"}
    for row in content["attention"]:
        base = exact.get(row["batch"])
        ratio = f"{base / row['seconds']:.2f}" if base else ""
        lines.append(
            f"| {row['cache']} | {row['batch']} | {row['context']} | {row['seconds'] * 1e6:.1f} | {ratio} |"
        )
    lines += ["", "| rows | tokens | µs | torch, µs |", "|---|---|---|---|"]
    for row in content["rows"]:
        other = "" if row["torch"] is None else f"{row['torch'] * 1e6:.1f}"
        lines.append(f"| {row['kernel']} | {row['tokens']} | {row['seconds'] * 1e6:.1f} | {other} |")
    lines += ["", "| decoder | layers | tokens of context | ms per token |", "|---|---|---|---|"]
    for row in content["decoder"]:
        lines.append(
            f"| {row['decoder']} | {row['layers']} | {row['context']} | {row['seconds'] * 1e3:.2f} |"
        )
    lines += _model(content.get("model", []))
    left = content["left out"]
    return [*lines, "", *([f"Left out for lack of time: {', '.join(left)}.", ""] if left else [])]


def _decoders(models: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Small random decoders, compressed and run on the device."""
    rows = [
        (name, row) for part in models.values() for name, row in (part or {}).items() if "same tokens" in row
    ]
    if not rows:
        return []
    lines = [
        "A random decoder of two layers in float16, compressed on the device. Differences of logits,",
        "relative: from the same forms computed by torch, from the uncompressed model; and how many of 24",
        "greedy tokens are equal. Rounded activations (w8a8, w4a8, fp8) and caches take the next code where",
        "sums differ in the last bit.",
        "",
        "| recipe | from the reference | from the original | equal tokens |",
        "|---|---|---|---|",
    ]
    for name, row in rows:
        lines.append(f"| {name} | {row['error']:.4f} | {row['compression']:.2f} | {row['same tokens']} |")
    return [*lines, ""]


def _model(rows: list[dict[str, Any]]) -> list[str]:
    """The packaged model."""
    if not rows:
        return []
    lines = ["", "| packaged model | perplexity | of the reference | tokens/s |", "|---|---|---|---|"]
    for row in rows:
        shown = [f"{row[key]:.2f}" if key in row else "" for key in ("perplexity", "perplexity, reference")]
        lines.append(f"| {row['model']} | {' | '.join(shown)} | {row['tokens per second']:.0f} |")
    return lines


def _product(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["outputs"], row["inputs"], row["rows"]
