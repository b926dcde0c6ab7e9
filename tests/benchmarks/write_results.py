"""Render the committed measurements as docs/results.md, and the table in README.md.

Run: python -m tests.benchmarks.write_results
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.render_common import MODELS, TEXTS, environment, head, tables
from tests.benchmarks.render_gpu import NO_GPU, gpu
from tests.benchmarks.render_runtime import caches, first_token, onnx
from tests.benchmarks.render_sparsity import sparse_kernels, sparsity
from tests.benchmarks.render_summary import write_summary
from tests.benchmarks.render_training import distillation
from tests.benchmarks.suites import SUITES

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "results.md"


def quality(content: dict[str, Any]) -> list[str]:
    return [
        *head("Quality", content),
        "Perplexity and its change against float32, on two kinds of text the calibration has not seen:",
        "Python's own documentation (the kind of the calibration text) and news written for this project.",
        "Forms are evaluated by the reference interpreter. The packaged weights lie on a 4-bit grid, which",
        "flatters some 4-bit formats; the off-grid copy computes the same function with rescaled channels.",
        "",
        *tables("quality", content),
    ]


def activations(content: dict[str, Any]) -> list[str]:
    return [
        *head("Weights and activations", content),
        "As above. The copy with outliers computes the same function with one channel of every norm's output",
        "50 times larger. Where nothing else is said, weights have one scale per row at 8 and 6 bits, per 64",
        "inputs at 4 bits, activations one per token; output heads are left alone. FP8 has no 6-bit row: its",
        "two formats have 8 bits.",
        "",
        *tables("activations", content),
    ]


def structured(content: dict[str, Any]) -> list[str]:
    lines = [
        *head("Fewer channels and blocks", content),
        "Share of the parameters of the repeated blocks that goes, by what a unit is kept for; *refitted*:",
        "what reads the cut channels is fitted to its old outputs by least squares. Blocks go to the nearest",
        "number of whole ones. The last columns are what is left of the blocks' parameters and of all",
        "operations.",
        "",
    ]
    for kind, title in MODELS.items():
        rows = content.get(kind)
        if not rows:
            continue
        lines += [f"### {title}", "", "| variant | documentation | news | parameters | operations |"]
        lines += ["|---|---|---|---|---|"]
        for name in ("fp32", *SUITES["structured"]):
            if name in rows:
                row = rows[name]
                cells = [f"{row['perplexity'][text]:.2f}" for text in TEXTS]
                sizes = row.get("structure")
                left = [
                    f"{100 * sizes['after'][of] / sizes['before'][of]:.1f} %" if sizes else "100 %"
                    for of in ("block_parameters", "flops")
                ]
                lines.append(f"| {name} | {' | '.join([*cells, *left])} |")
        lines.append("")
    return lines


def structured_speed(content: dict[str, Any]) -> list[str]:
    lines = ["## Speed with fewer channels and blocks", "", environment(content), ""]
    lines += [
        "Plain checkpoints of uniformly cut models, loaded by transformers and run eagerly in float32 (and",
        "compressed and compiled, where a recipe is named). Expected: if decoding followed the parameters a",
        "step reads and a prompt of 512 tokens its operations. Variants take turns.",
        "",
    ]
    for name, rows in content.items():
        if name == "environment":
            continue
        lines += [f"### {name}", "", "| model | decode × | expected | prefill × | expected |"]
        lines += ["|---|---|---|---|---|"]
        for model, row in rows.items():
            cells = [
                f"{row[what][kind] or 0.0:.2f}"
                for kind in ("decode", "prefill")
                for what in ("speed-up", "expected")
            ]
            lines.append(f"| {model} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def low_rank(content: dict[str, Any]) -> list[str]:
    return [
        *head("Low rank", content),
        "Share of the numbers removed from the linear layers (embedding and head are left alone); sizes are",
        "those of the whole model. Residuals are factors of 8 bits beside 4-, 3- or 2-bit codes. A tenth",
        "fewer numbers of a square matrix are 55 % fewer singular values: without regard for the activations",
        "every matrix is a third off then, which a small model whose matrices have full rank cannot survive.",
        "",
        *tables("low-rank", content),
    ]


def low_rank_speed(content: dict[str, Any]) -> list[str]:
    lines = [
        "## Speed of factors",
        "",
        environment(content),
        "",
        "Two products with the factors against one with the matrix, taking turns; above 1 the factors are",
        "faster. Without any cost per call the ratio would be one over their share of the numbers.",
        "",
        "| size | numbers | rank | "
        + " | ".join(f"{kind}, {t} tokens" for kind, t in _columns(content))
        + " |",
        "|---|---|---|" + "---|" * len(_columns(content)),
    ]
    found: dict[tuple[str, str, int], dict[tuple[str, int], float]] = {}
    for row in content["rows"]:
        key = f"{row['rows']}×{row['columns']}", f"{row['numbers']:.0%}", row["rank"]
        found.setdefault(key, {})[row["kind"], row["tokens"]] = row["ratio"]
    for (size, share, rank), ratios in found.items():
        cells = " | ".join(f"{ratios[column]:.2f}" for column in _columns(content))
        lines.append(f"| {size} | {share} | {rank} | {cells} |")
    return [*lines, ""]


def _columns(content: dict[str, Any]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["kind"], row["tokens"]) for row in content["rows"]))


def speed(content: dict[str, Any]) -> list[str]:
    settings, limits = content["settings"], content["limits"]
    lines = ["## Speed", "", environment(content), ""]
    lines += [
        f"Decode: {settings['steps']} greedy steps after {settings['prompt']} tokens (eager: dynamic cache;",
        "compiled: static cache; compressed: the loop of their `generate`); prefill:",
        f"{settings['prefill']} tokens. Variants take turns; better of {settings['tries']} tries, medians of",
        f"{settings['rounds']} rounds; × is the median ratio to float32 eager in the same round.",
        "",
        "The last columns are the distance to the machine: weights read per second in decoding, as a share",
        f"of the {limits['read GB/s']:.0f} GB/s that its threads read from memory, and operations per second",
        f"in prefill, as a share of the {limits['int8 GOP/s']:.0f} GOP/s of oneDNN's 8-bit product. What is",
        "missing in decoding is mostly calls of small kernels; small weights hide less of them.",
        "",
        "| variant | decode tok/s | × | prefill tok/s | × | resident MB | first calls, s | of reading"
        " | of int8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for item in content["variants"]:
        size, first = item["weight_bytes"] / 1e6, item["warmup_seconds"]
        gap = content["distances"][item["name"]]
        lines.append(
            f"| {item['name']} | {item['decode']:.1f} | {item['decode_ratio']:.2f} | {item['prefill']:.0f} |"
            f" {item['prefill_ratio']:.2f} | {size:.0f} | {first:.0f} | {gap['read %']:.0f} % |"
            f" {gap['GOP/s %']:.0f} % |"
        )
    return [*lines, ""]


PEERS = {
    "peers-packaged": "Beside other tools",
    "peers-packaged-lengths": "Beside other tools: short and long prompts",
    "peers-synthetic-1b": "Beside other tools: a decoder of 1.1 billion parameters, random weights",
}


def peers(title: str, content: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    rates = content["rates"]
    works = list(next(iter(rates.values())))
    lines = [f"## {title}", "", f"{environment(content)} {versions}.", ""]
    lines += [
        "All take turns: decode is 63 greedy steps after 128 tokens, prefill reads a prompt; better of two",
        "tries, medians of the rounds; × is the median ratio to float32 eager torch in the same round.",
        "llama.cpp runs a file of the same weights, requantized by its own tool.",
        "",
        "| contender | " + " | ".join(f"{work}, tok/s | ×" for work in works) + " |",
        "|---" * (1 + 2 * len(works)) + "|",
    ]
    for name, found in sorted(rates.items(), key=lambda item: -item[1]["decode"]["ratio"]):
        cells = [f"{found[work]['tokens/s']:.0f} | {found[work]['ratio']:.2f}" for work in works]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for name, found in content.get("perplexity", {}).items():
        texts = ", ".join(f"{value:.2f} on {text}" for text, value in found.items())
        lines.append(f"Perplexity of {name}: {texts}.")
    lines += [f"Did not run: {name} ({reason})." for name, reason in content["failures"].items()]
    return [*lines, ""]


_SHOWN = ("w4zg-a8", "w4z-a8", "w4zg,", "w8-a8", "int8×int8", "int4", "MatMulNBits", "float32")


def kernels(content: dict[str, Any]) -> list[str]:
    gigabytes = content["streaming bytes per second"] / 1e9
    lines = [
        "## Kernels",
        "",
        environment(content),
        "",
        f"Outputs × inputs. Shares are of what all threads read from memory ({gigabytes:.0f} GB/s), and of",
        "oneDNN's 8-bit product (ATen int8×int8) of the same size in the same run, whose activations are",
        "codes already; generated kernels quantize theirs. Few tokens are bound by reading, many by sums.",
        "",
        "| size | tokens | kernel | ms | of reading | GOP/s | of oneDNN int8 |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = content["rows"]
    for row in rows:
        if not any(part in row["name"] for part in _SHOWN):
            continue
        (peer,) = [
            other
            for other in rows
            if other["name"] == "ATen int8×int8"
            and all(other[key] == row[key] for key in ("rows", "columns", "tokens"))
        ]
        size = f"{row['rows']}×{row['columns']}"
        lines.append(
            f"| {size} | {row['tokens']} | {row['name']} | {row['milliseconds']:.3f} |"
            f" {row['streaming']:.0%} | {row['gigaops']:.0f} | {row['gigaops'] / peer['gigaops']:.0%} |"
        )
    return [*lines, ""]


def single_rows(content: dict[str, Any]) -> list[str]:
    """Products of one row on one more machine."""
    rows = [row for row in content["rows"] if any(part in row["name"] for part in (*_SHOWN, "sum"))]
    large = max(row["rows"] * row["columns"] for row in rows)
    lines = [
        "### Single rows on another machine",
        "",
        environment(content),
        "",
        "Weights of 4 and 8 bits against a sum over about as many bytes (`torch.sum`), all taking turns.",
        "The sum reads the smaller sizes, which caches hold, more slowly than the products: no share there."
        " A long stream is read at"
        f" {content['streaming bytes per second'] / 1e9:.0f} GB/s here.",
        "",
        "| size | kernel | ms | GB/s | of the sum | × MatMulNBits |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [other for other in rows if (other["rows"], other["columns"]) == (row["rows"], row["columns"])]
        peer = next((other for other in same if "MatMulNBits" in other["name"]), None)
        share = f"{row['streaming']:.0%}" if row["rows"] * row["columns"] == large else ""
        ratio = f"{peer['milliseconds'] / row['milliseconds']:.2f}" if peer and row["name"][0] == "w" else ""
        lines.append(
            f"| {row['rows']}×{row['columns']} | {row['name']} | {row['milliseconds']:.3f} |"
            f" {row['gigabytes']:.1f} | {share} | {ratio} |"
        )
    return [*lines, ""]


def groups(content: dict[str, Any]) -> list[str]:
    lines = [
        "## Channel groups",
        "",
        environment(content),
        "",
        "What the analysis finds in each graph. Random units of all groups were cut together and compared",
        "with masking them in float64. Seconds are of the analysis, capture not counted; steps are the axes",
        "it touched, which grow in proportion to the graph. Heads are cut whole: their channels are among",
        "the frozen dimensions.",
        "",
        "| model | nodes | groups | frozen | most frequent reasons | seconds | steps | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in content["models"].items():
        found = ", ".join(f"{count} × {units}" for units, count in row["units"].items())
        why = "; ".join(f"{reason} ({count})" for reason, count in list(row["reasons"].items())[:4])
        lines.append(
            f"| {name} | {row['nodes']} | {found or 'none'} | {row['frozen']} | {why} |"
            f" {row['seconds']:.2f} | {row['steps']} | {row['largest difference']:.0e} |"
        )
    return [*lines, ""]


def main() -> None:
    lines = [
        "# Results",
        "",
        "Written by `tests/benchmarks/write_results.py` from the measurements in `tests/benchmarks/results`;",
        "nothing here is typed by hand. Model: SmolLM2-135M-Instruct, as packaged.",
        "",
    ]
    sections = {
        "quality": quality,
        "activations": activations,
        "structured": structured,
        "structured-speed": structured_speed,
        "sparsity": sparsity,
        "sparse-kernels": sparse_kernels,
        "low-rank": low_rank,
        "low-rank-speed": low_rank_speed,
        "kv_cache": caches,
        "onnx": onnx,
        "speed": speed,
        "first-token": first_token,
        "distillation": distillation,
    }
    for name, render in sections.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += render(json.loads(path.read_text(encoding="utf-8")))
    for name, title in PEERS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += peers(title, json.loads(path.read_text(encoding="utf-8")))
    path = RESULTS / "kernels.json"
    if path.exists():
        lines += kernels(json.loads(path.read_text(encoding="utf-8")))
    path = RESULTS / "kernels-single.json"
    if path.exists():
        lines += single_rows(json.loads(path.read_text(encoding="utf-8")))
    path = RESULTS / "groups.json"
    if path.exists():
        lines += groups(json.loads(path.read_text(encoding="utf-8")))
    lines += ["## Triton kernels on GPUs", ""]
    devices = sorted(RESULTS.glob("gpu-*.json"))
    for path in devices:
        lines += gpu(json.loads(path.read_text(encoding="utf-8")))
    lines += [] if devices else [*NO_GPU.splitlines(), ""]
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    write_summary(RESULTS)


if __name__ == "__main__":
    main()
