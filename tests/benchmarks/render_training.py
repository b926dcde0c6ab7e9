"""The section of docs/results.md about training, and its learning curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tests.benchmarks.render_common import head

PAGE = Path(__file__).parents[2] / "docs" / "results.md"


def distillation(content: dict[str, Any]) -> list[str]:
    lines = [
        *head("Training", content),
        "Perplexity on held-out documentation before and after training on other documentation, by",
        "objective; *recovered* is the share of the loss in log perplexity that training gave back, against",
        f"float32 ({content['fp32']:.2f}). Every row of a student sees the same data in the same order. *ce*",
        "is plain fine-tuning without a teacher. Budgets are minutes of one core, not the thousands of steps",
        "that published results take.",
        "",
        "| student | objective | before | after | recovered | trained numbers | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    base = math.log(content["fp32"])
    for student, rows in content["students"].items():
        for objective, row in rows.items():
            before, after = row["curve"][0][1], row["curve"][-1][1]
            lost, back = math.log(before) - base, math.log(before) - math.log(after)
            cells = [f"{before:.2f}", f"{after:.2f}", f"{100 * back / lost:.0f} %"]
            cells += [f"{row['trained'] / 1e6:.1f} M", str(row["seconds"])]
            lines.append(f"| {student} | {objective} | {' | '.join(cells)} |")
    lines.append("")
    for student, rows in content["students"].items():
        name = f"distillation-{''.join(c if c.isalnum() else '-' for c in student)}.svg"
        plot_curves(student, rows, content["fp32"], PAGE.parent / "images" / name)
        lines += [f"![Learning curves of the {student} student](images/{name})", ""]
    return lines


def plot_curves(student: str, rows: dict[str, Any], base: float, path: Path) -> None:
    """Held-out perplexity by step, one line per objective; the same data give the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fxcompress"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for objective, row in rows.items():
        steps, values = zip(*row["curve"], strict=True)
        axes.plot(steps, values, marker="o", markersize=3, label=objective)
    axes.axhline(base, color="gray", linestyle="--", linewidth=1, label="float32")
    axes.set(title=f"{student} student", xlabel="step", ylabel="perplexity (held-out documentation)")
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    path.parent.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
