"""Time of a pair of factors against the matrix they stand for: dense, and as codes on generated kernels.

All variants of a size and number of tokens take turns in one run. The ratio is the dense time over the
pair's: above 1 the pair is faster. ``numbers`` is the share of the matrix' numbers that the factors hold,
which is what their speed would follow if reading and sums were all.

Run: python -m tests.benchmarks.low_rank [--shapes 8192x2048 576x1536] [--tokens 1 512] [--write]
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.cpu.selection import this_machine
from fxcompress.passes._rank import budget_rank
from tests.benchmarks.common import environment, write
from tests.benchmarks.kernels import Variant, best_times, generated

KINDS = {  # name → (bits, symmetric, group, activation), or None for plain numbers
    "float32": None,
    "bfloat16": None,
    "int8 per row": (8, True, 0, None),
    "int4 g64": (4, False, 64, None),
    "int4 g64, int8 activations": (4, False, 64, "dynamic"),
}


def whole(weight: Tensor, kind: str) -> Variant:
    form = KINDS[kind]
    if form is not None:
        return generated(weight, *form)
    if kind == "bfloat16":
        half = weight.to(torch.bfloat16)
        return Variant(kind, lambda x: F.linear(x.to(torch.bfloat16), half), half.nbytes)
    return Variant(kind, lambda x: F.linear(x, weight), weight.nbytes)


def pair(rows: int, columns: int, rank: int, kind: str) -> Variant:
    right, left = whole(torch.randn(rank, columns), kind), whole(torch.randn(rows, rank), kind)
    return Variant(f"{kind}, rank {rank}", lambda x: left.run(right.run(x)), left.nbytes + right.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=["8192x2048", "1536x576", "576x1536", "576x576"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 512])
    parser.add_argument("--keep", nargs="*", type=float, default=[0.8, 0.6, 0.3])
    parser.add_argument("--seconds", type=float, default=1.0, help="per size and number of tokens")
    parser.add_argument("--write", action="store_true", help="keep the result under tests/benchmarks/results")
    options = parser.parse_args()
    table = []
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        for kind in KINDS:
            ranks = {keep: budget_rank(rows, columns, keep) // 8 * 8 for keep in options.keep}
            dense = whole(torch.randn(rows, columns), kind)
            pairs = {keep: pair(rows, columns, rank, kind) for keep, rank in ranks.items()}
            for tokens in options.tokens:
                x = torch.randn(tokens, columns)
                found = best_times([dense, *pairs.values()], x, options.seconds)
                for keep, variant in pairs.items():
                    row = {
                        "rows": rows,
                        "columns": columns,
                        "kind": kind,
                        "rank": ranks[keep],
                        "numbers": ranks[keep] * (rows + columns) / (rows * columns),
                        "bytes": variant.nbytes / dense.nbytes,
                        "tokens": tokens,
                        "dense milliseconds": found[dense.name] * 1e3,
                        "pair milliseconds": found[variant.name] * 1e3,
                        "ratio": found[dense.name] / found[variant.name],
                    }
                    table.append(row)
                    sys.stdout.write(
                        f"{shape:>10} M={tokens:<4} {kind:28} rank {row['rank']:<5}"
                        f" {row['numbers']:4.0%} of the numbers {row['pair milliseconds']:9.4f} ms,"
                        f" dense {row['dense milliseconds']:9.4f} ms: {row['ratio']:.2f}x\n"
                    )
    if options.write:
        content = {
            "environment": environment(["-m", "tests.benchmarks.low_rank", *sys.argv[1:]]),
            "isa": this_machine().isa.name,
            "rows": table,
        }
        write("low-rank-speed", content)


if __name__ == "__main__":
    main()
