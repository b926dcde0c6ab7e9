"""Sections of docs/results.md about pruned weights."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.render_common import environment, head, tables


def sparsity(content: dict[str, Any]) -> list[str]:
    """Perplexity of every way to choose a mask."""
    return [
        *head("Sparsity", content),
        "Linear layers of the blocks pruned, embedding and head left alone; calibrated on documentation.",
        "*OWL* and *SAMSP* share half the weights out between layers; other rows prune every row of",
        "every layer alike (*one threshold*: every layer alike). Sizes are those of the saved model: rows",
        "without a storage keep their zeros in dense float32.",
        "",
        *tables("sparsity", content),
    ]


def sparse_kernels(content: dict[str, Any]) -> list[str]:
    """Speed of the sparse kernel against the dense product."""
    rows = content["rows"]
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    lines = [
        "## Speed of sparse weights",
        "",
        environment(content),
        "",
        f"Generated kernel ({content['isa']}) against the dense product, taking turns; above 1 the sparse",
        "one is faster. Bytes are those of values, bitmap and offsets as a share of the dense weight. Half a",
        "matrix is worth it where reading it takes the time (single tokens); many tokens are multiplied",
        "densely.",
        "",
        "| size | dtype | pattern | bytes | " + " | ".join(f"{count} tokens" for count in tokens) + " |",
        "|---" * (4 + len(tokens)) + "|",
    ]
    found: dict[tuple[str, str, str], dict[int, Any]] = {}
    for row in rows:
        key = f"{row['rows']}×{row['columns']}", row["dtype"], row["pattern"]
        found.setdefault(key, {})[row["tokens"]] = row
    for (size, dtype, pattern), ratios in found.items():
        share = next(iter(ratios.values()))["bytes_share"]
        cells = " | ".join(f"{ratios[count]['ratio']:.2f}" for count in tokens)
        lines.append(f"| {size} | {dtype} | {pattern} | {share:.2f} | {cells} |")
    return [*lines, ""]
