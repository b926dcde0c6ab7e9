"""The section of docs/results.md about training, and its learning curves."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from tests.benchmarks.render_common import head

PAGE = Path(__file__).parents[2] / "docs" / "results.md"


def distillation(content: dict[str, Any]) -> list[str]:
    base = content["fp32"]
    lines = [
        *head("Training", content),
        "Perplexity before and after training on documentation, by objective, on documentation that was held",
        "out and on news, a kind of text that was not trained on. *Recovered* is the share of the loss in",
        f"log perplexity that training gave back, against float32 ({base['documentation']:.2f} and",
        f"{base['news']:.2f}). Every row of a student sees the same data in the same order. *ce* is plain",
        "fine-tuning without a teacher: it learns this kind of text besides, and can give back more than was",
        "lost there. Budgets are minutes of one core, not the thousands of steps of published results.",
        "",
        "| student | objective | documentation | recovered | news | recovered | trained | processor, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for student, rows in content["students"].items():
        for objective, row in rows.items():
            looks = {"documentation": [value for _, value in row["curve"]], "news": row["news"]}
            cells = []
            for text, values in looks.items():
                lost, back = (math.log(values[0] / other) for other in (base[text], values[-1]))
                cells += [f"{values[0]:.2f} → {values[-1]:.2f}", f"{100 * back / lost:.0f} %"]
            cells += [f"{row['trained'] / 1e6:.1f} M", _seconds(row)]
            lines.append(f"| {student} | {objective} | {' | '.join(cells)} |")
    lines.append("")
    for student, rows in content["students"].items():
        name = f"distillation-{re.sub('[^a-z0-9]+', '-', student.lower())}.svg"
        plot_curves(student, rows, base["documentation"], PAGE.parent / "images" / name)
        lines += [f"![Learning curves of the {student} student](images/{name})", ""]
    return lines


def _seconds(row: dict[str, Any]) -> str:
    """Of processor time, with the machine where it is not the table's."""
    other = f" ({row['processor']})" if "processor" in row else ""
    return f"{row['seconds']}{other}" if "seconds" in row else ""


def plot_curves(student: str, rows: dict[str, Any], base: float, path: Path) -> None:
    """Held-out perplexity by step, one line per objective; the same data give the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fxcompress"
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7.5, 3.5))
    for objective, row in rows.items():
        steps, values = zip(*row["curve"], strict=True)
        axes.plot(steps, values, marker="o", markersize=3, label=objective)
    axes.axhline(base, color="gray", linestyle="--", linewidth=1, label="float32")
    axes.set(title=f"{student} student", xlabel="step", ylabel="perplexity (held-out documentation)")
    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(ticker.FormatStrFormatter("%g"))
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    path.parent.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
