"""What fusing more behind (or before) a generated product could save at most: the time of the operation
itself, as Inductor compiles it alone, as a share of the block's products and operations together.

Times are processor time of one thread, the least of many turns taken in rotation, so that other work on the
machine hardly shows. A fused kernel still computes the operation; what it saves is less than is printed here.

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

from tests.benchmarks.kernels import Variant, generated

Turn = tuple[str, Callable[[], Any]]


def gated(both: Tensor) -> Tensor:
    """Gate and up, as siblings give them, to the input of the down product."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def residual(x: Tensor, y: Tensor) -> Tensor:
    """The residual sum behind a product."""
    return x + y


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """The norm before a product."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def turns(width: int, hidden: int, tokens: int, form: tuple[Any, ...]) -> list[Turn]:
    """The gate·up and down products of a block, and what lies around them."""
    expand: Variant = generated(torch.randn(2 * hidden, width), *form)
    reduce: Variant = generated(torch.randn(width, hidden), *form)
    x, inner, both = torch.randn(tokens, width), torch.randn(tokens, hidden), torch.randn(tokens, 2 * hidden)
    compiled = {f.__name__: torch.compile(f, fullgraph=True, dynamic=False) for f in (gated, residual, norm)}
    weight, one = torch.ones(width), torch.ones(1, 1)
    return [
        ("gate·up product", lambda: expand.run(x)),
        ("down product", lambda: reduce.run(inner)),
        ("gated", lambda: compiled["gated"](both)),
        ("residual", lambda: compiled["residual"](x, x)),
        ("norm", lambda: compiled["norm"](x, weight)),
        ("call of a compiled function", lambda: compiled["residual"](one, one)),
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
    parser.add_argument("--seconds", type=float, default=2.0, help="per form and number of tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for tokens in options.tokens:
        for form in ((4, False, 64, None), (4, False, 64, "dynamic")):
            with torch.no_grad():
                found = least(turns(options.width, options.hidden, tokens, form), options.seconds)
            call = found.pop("call of a compiled function")  # inside a block there is none
            own = {
                name: seconds if name.endswith("product") else max(0.0, seconds - call)
                for name, seconds in found.items()
            }
            total = sum(own.values())
            for name, seconds in own.items():
                share = f"{seconds * 1e6:9.1f} µs {seconds / total:6.1%}"
                sys.stdout.write(f"M={tokens:<4} {form[3] or 'float':8} {name:16} {share}\n")


if __name__ == "__main__":
    main()
