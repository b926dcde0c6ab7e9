"""What fusing the end of an MLP into its products saves: gate · up, activation function, residual sum.

Each pair computes the same: the product followed by what Inductor makes of the rest, and the product with
an epilogue. A residual sum is measured with the norm behind it, which Inductor computes in one pass with the
sum; a norm before a product is not fused, and its time shows what that could save at most.

Times are processor time of one thread, the least of many turns taken in rotation, so that other work on the
machine hardly shows.

Run: python -m tests.benchmarks.epilogues [--width 576] [--hidden 1536] [--tokens 1 32 512]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.cpu.epilogues import PLAIN, Epilogue
from fxcompress.backends.cpu.kernel_types import EpilogueKernel, LinearSpec, QuantizedInput
from fxcompress.backends.cpu.selection import choose_kernel
from fxcompress.formats.integer import IntFormat, quantize_to_term
from fxcompress.forms import WeightLayout

Turn = tuple[str, Callable[[], Any]]
Product = Callable[[Tensor, Epilogue, Tensor | None], Tensor]


def gated(both: Tensor) -> Tensor:
    """Gate and up, as siblings give them, to the input of the down product."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """The norm before the next product."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def summed(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The residual sum, which is needed again, and the norm behind it."""
    total = x + y
    return total, norm(total, weight)


def product(weight: Tensor, activation: str | None, tokens: int) -> Product:
    """The kernel that is chosen for a weight in 4 bits and groups of 64."""
    rows, columns = weight.shape
    term = quantize_to_term(weight, WeightLayout.rows(weight.shape), IntFormat(4, False, 64))
    spec = LinearSpec(4, False, 64, rows, columns, activation, tokens, torch.float32)
    kernel, text = choose_kernel(spec)
    if not isinstance(kernel, EpilogueKernel):
        raise SystemExit(f"{text} takes no epilogue")
    packed: dict[str, dict[str, Tensor]] = {}

    def run(x: Tensor, epilogue: Epilogue, residual: Tensor | None) -> Tensor:
        layout = kernel.layout_with(epilogue)
        if layout is None:
            raise SystemExit(f"{text} takes no epilogue")
        if layout.name not in packed:
            packed[layout.name] = layout.pack([term])
        # Kernels quantize what they read themselves: codes and scale are not looked at.
        quantized = None if activation is None else QuantizedInput(x, x, None, x)
        return kernel.run_with(epilogue, x, quantized, packed[layout.name], spec, None, residual)

    return run


def turns(width: int, hidden: int, tokens: int, activation: str | None) -> list[Turn]:
    """Products with and without what follows them."""
    expand = product(torch.randn(2 * hidden, width), activation, tokens)
    inner = product(torch.randn(hidden, width), activation, tokens)
    reduce = product(torch.randn(width, hidden), activation, tokens)
    x, wide = torch.randn(tokens, width), torch.randn(tokens, hidden)
    weight = torch.ones(width)
    compiled: dict[str, Any] = {
        f.__name__: torch.compile(f, fullgraph=True, dynamic=False) for f in (gated, norm, summed, F.gelu)
    }
    gate, gelu, residual = Epilogue("silu", gated=True), Epilogue("gelu"), Epilogue(residual=True)
    return [
        ("gate·up apart", lambda: compiled["gated"](expand(x, PLAIN, None))),
        ("gate·up fused", lambda: expand(x, gate, None)),
        ("gelu apart", lambda: compiled["gelu"](inner(x, PLAIN, None))),
        ("gelu fused", lambda: inner(x, gelu, None)),
        ("residual, norm apart", lambda: compiled["summed"](x, reduce(wide, PLAIN, None), weight)),
        ("residual, norm fused", lambda: compiled["norm"](reduce(wide, residual, x), weight)),
        ("norm", lambda: compiled["norm"](x, weight)),
        ("call", lambda: compiled["norm"](weight[:1], weight[:1])),
    ]


def least(turns: list[Turn], seconds: float) -> dict[str, float]:
    """Least processor time of each turn, all taking turns."""
    for _, run in turns:
        run()
    best = {name: float("inf") for name, _ in turns}
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        for name, run in turns:
            start = time.thread_time()
            run()
            best[name] = min(best[name], time.thread_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 32, 512])
    parser.add_argument("--seconds", type=float, default=4.0, help="per form and number of tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for tokens in options.tokens:
        for activation in (None, "dynamic"):
            with torch.no_grad():
                found = least(turns(options.width, options.hidden, tokens, activation), options.seconds)
            call = found.pop("call")  # of a compiled function; inside a block there is none
            for name in list(found):
                if name != "gate·up fused" and name != "gelu fused":
                    found[name] -= call
            line = f"M={tokens:<4} {activation or 'float':8}"
            for name in ("gate·up", "gelu", "residual, norm"):
                apart, fused = found[f"{name} apart"], found[f"{name} fused"]
                line += f" {name} {apart * 1e6:8.1f} → {fused * 1e6:8.1f} µs ({fused / apart - 1:+.1%});"
            sys.stdout.write(f"{line} norm alone {found['norm'] * 1e6:.1f} µs\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
