"""Products with sparse weights beside dense ones, few rows and many, weights read from memory.

For every shape, form and number of tokens: the time of a product, of as many different weights as exceed the
caches (a decoder reads each weight once per token), dense and sparse taking turns. ``PAYS_BELOW``,
``PAYS_EVEN`` and ``FEW_ROWS`` of ``backends/cpu/sparse.py`` come from this table.

Run: python -m tests.benchmarks.sparse_kernels [--shapes 1536x576 576x1536] [--tokens 1 8 512] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.cpu.generator import DTYPES
from fxcompress.backends.cpu.native import ensure_kernel
from fxcompress.backends.cpu.selection import this_machine
from fxcompress.backends.cpu.sparse import FEW_ROWS, RowBitmapWeight, row_bitmap
from fxcompress.backends.cpu.sparse_form import SparseForm
from fxcompress.passes._pruning import keep_groups, keep_highest
from tests.benchmarks.common import environment, write

PATTERNS = ("2:4", "1:4", "50%", "70%", "80%", "90%")
_BYTES = 128 << 20  # of dense weights per shape


@dataclass(frozen=True)
class Row:
    """One measurement."""

    rows: int
    columns: int
    dtype: str
    pattern: str
    tokens: int
    sparse_ms: float  # as executed: the kernel up to FEW_ROWS, expansion and a dense product beyond
    dense_ms: float
    bytes_share: float  # of the sparse weight in memory, beside the dense one

    @property
    def ratio(self) -> float:
        """How many times faster than dense."""
        return self.dense_ms / self.sparse_ms


def pruned(rows: int, columns: int, pattern: str, dtype: torch.dtype) -> Tensor:
    dense = torch.randn(rows, columns)
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        return (dense * keep_groups(dense.abs(), n, m)).to(dtype)
    return (dense * keep_highest(dense.abs(), float(pattern.rstrip("%")) / 100)).to(dtype)


def product(weight: RowBitmapWeight, number: int, columns: int, x: Tensor) -> Tensor:
    packed = (weight.values, weight.bits, weight.offsets)
    if x.shape[0] <= FEW_ROWS[x.dtype]:
        y: Tensor = torch.ops.fxcompress_cpu.sparse_linear(x, *packed, None, number)
        return y
    return F.linear(x, torch.ops.fxcompress_cpu.sparse_expand(*packed, columns, number))


def turns(ways: list[Callable[[], None]], seconds: float) -> list[float]:
    """Median time of each, all taking turns."""
    times: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for way, found in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def measure(rows: int, columns: int, pattern: str, dtype: torch.dtype, tokens: int, seconds: float) -> Row:
    count = max(1, _BYTES // (rows * columns * dtype.itemsize)) if tokens <= FEW_ROWS[dtype] else 1
    first = pruned(rows, columns, pattern, dtype)
    dense = [first.clone() for _ in range(count)]
    weights = [row_bitmap(weight, (0, 1)) for weight in dense]
    form = SparseForm(DTYPES[dtype], weights[0].even)
    if (reason := ensure_kernel(form, this_machine().isa)) is not None:
        raise SystemExit(reason)
    number = form.number(this_machine().isa)
    x = torch.randn(tokens, columns).to(dtype)

    def sparse_way() -> None:
        for weight in weights:
            product(weight, number, columns, x)

    def dense_way() -> None:
        for weight in dense:
            F.linear(x, weight)

    fast, slow = turns([sparse_way, dense_way], seconds)
    held = sum(t.nbytes for t in (weights[0].values, weights[0].bits, weights[0].offsets))
    name = DTYPES[dtype]
    return Row(
        rows, columns, name, pattern, tokens, fast / count * 1e3, slow / count * 1e3, held / first.nbytes
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=["1536x576", "576x1536"], help="outputs x inputs")
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 8, 512])
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES.values()), default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--write", action="store_true", help="keep the result under tests/benchmarks/results")
    options = parser.parse_args()
    names = {name: dtype for dtype, name in DTYPES.items()}
    table = []
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        for dtype in options.dtypes:
            for pattern in PATTERNS:
                for tokens in options.tokens:
                    row = measure(rows, columns, pattern, names[dtype], tokens, options.seconds)
                    table.append(row)
                    sys.stdout.write(
                        f"{shape:>10} {dtype:8} {pattern:4} M={tokens:<4} sparse {row.sparse_ms:8.3f} ms,"
                        f" dense {row.dense_ms:8.3f} ms, {row.ratio:5.2f} times,"
                        f" {row.bytes_share:.2f} of the bytes\n"
                    )
                    sys.stdout.flush()
    if options.write:
        content = {
            "environment": environment(["-m", "tests.benchmarks.sparse_kernels", *sys.argv[1:]]),
            "isa": this_machine().isa.name,
            "rows": [{**asdict(row), "ratio": row.ratio} for row in table],
        }
        write("sparse-kernels", content)


if __name__ == "__main__":
    main()
