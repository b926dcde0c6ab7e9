"""How near each kernel of a model comes to its machine: bytes moved and operations done per second.

The ceilings are measured in the same run: memory read by all threads at once, and the product that the
machine does fastest in the arithmetic a kernel uses.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from fxcompress.backends.cpu.generated import GeneratedBfloat16, GeneratedDense
from fxcompress.backends.cpu.kernel_types import LinearSpec
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.cpu.measured import random_input
from fxcompress.backends.cpu.selection import choose_kernel, this_machine
from fxcompress.backends.cpu.tiled import TiledLayout
from fxcompress.form_inputs import TensorRef
from fxcompress.store import WeightStore


class Explains(Protocol):
    """A target as far as it is asked here, see :mod:`fxcompress.backends.target`."""

    def reason(self, spec: LinearSpec) -> tuple[str, str, str]:
        """Why a use has its kernel, the generated kernel's name, and its source."""
        ...


@dataclass(frozen=True)
class KernelUse:
    """One product of a compiled model: its spec, the terms (siblings together) it reads, and how they lie."""

    spec: LinearSpec
    terms: tuple[TensorRef, ...]
    layout: Layout
    target: Explains

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for uses that run the same code on equal sizes."""
        return (*vars(replace(self.spec, tokens=None)).values(),)


def ceilings() -> dict[str, float]:
    """Bytes per second read, operations per second in float32, bfloat16 and int8, by all threads."""
    big = torch.ones(1 << 26)
    square = torch.randn(1024, 1024)
    half, codes = square.to(torch.bfloat16), (square * 30).clamp(-127, 127).to(torch.int8)
    operations = 2 * 1024**3
    found = {
        "read": big.nbytes / best_time(big.sum),
        "float32": operations / best_time(lambda: square @ square),
        "int8": operations / best_time(lambda: torch._int_mm(codes, codes)),
    }
    if this_machine().bfloat16:
        found["bfloat16"] = operations / best_time(lambda: half @ half)
    return found


def measure_kernels(
    uses: Sequence[KernelUse], store: WeightStore, tokens: Sequence[int], seconds: float = 0.3
) -> list[dict[str, Any]]:
    """One row per distinct product and number of tokens.

    Args:
        uses: What a model's graphs run.
        store: Its packed weights.
        tokens: Rows of activations to measure with.
        seconds: For every row of the table.

    Returns:
        Rows with ``weights``, ``sites``, ``kernel``, ``outputs``, ``inputs``, ``tokens``, ``milliseconds``,
        ``gigabytes`` and ``gigaops`` per second, ``read share`` and ``peak share`` of the ceilings.
    """
    limits = ceilings()
    distinct: dict[tuple[Any, ...], dict[tuple[TensorRef, ...], KernelUse]] = {}
    for use in uses:  # every graph of a model uses the same weights again
        distinct.setdefault(use.key, {}).setdefault(use.terms, use)
    rows = []
    for same in distinct.values():
        first = next(iter(same.values()))
        for count in tokens:
            row = _measure(first, store, count, seconds, limits)
            if row is not None:
                rows.append({"weights": ", ".join(map(str, first.terms)), "sites": len(same), **row})
    return rows


def best_time(work: Callable[[], object], seconds: float = 0.5) -> float:
    """Seconds of the best of as many tries as fit."""
    work()
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


@torch.no_grad()
def _measure(
    use: KernelUse, store: WeightStore, tokens: int, seconds: float, limits: Mapping[str, float]
) -> dict[str, Any] | None:
    spec = replace(use.spec, tokens=tokens)
    kernel, text = choose_kernel(spec)
    if kernel is None:
        return None
    # A gated layout orders rows otherwise, which a product alone takes as long for.
    same = isinstance(use.layout, TiledLayout) and isinstance(kernel.layout, TiledLayout)
    packed = dict(store.packed(use.layout if same else kernel.layout, use.terms))
    x, quantized = random_input(spec)
    samples: list[float] = []
    kernel.run(x, quantized, packed, spec)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < 5:
        start = time.perf_counter()
        kernel.run(x, quantized, packed, spec)
        samples.append(time.perf_counter() - start)
    took = statistics.median(samples)
    moved = sum(tensor.nbytes for tensor in packed.values()) + x.nbytes * (1 + spec.rows / spec.columns)
    done = 2 * tokens * spec.rows * spec.columns
    wide = isinstance(kernel, GeneratedBfloat16 | GeneratedDense)
    arithmetic = "int8" if quantized else "bfloat16" if wide else "float32"
    return {
        "kernel": text,
        "outputs": spec.rows,
        "inputs": spec.columns,
        "tokens": tokens,
        "milliseconds": took * 1e3,
        "gigabytes": moved / took / 1e9,
        "gigaops": done / took / 1e9,
        "read share": moved / took / limits["read"],
        "peak share": done / took / limits[arithmetic],
        "arithmetic": arithmetic,
    }
