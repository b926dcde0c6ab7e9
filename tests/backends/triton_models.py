"""Small models lowered to Triton kernels, run by its interpreter: the whole way from a recipe.

Run as a program: ``TRITON_INTERPRET=1 FXCOMPRESS_TARGET=triton python -m tests.backends.triton_models``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.backends import dynamo
from fxcompress.backends.triton import launch

RECIPES = {
    "w4a16": "linear-w4zg64",
    "w8a8": "bytes-int8",
    "w4a8": "aint8",
    "nf4": "linear-t4g64",
    "w4a16-eora": "linear-w4zg64",
    "w8a8-outlier-columns": "bytes-int8",
    "fp8": "bytes-e4m3",
    "fp8-static": "linear-e4m3",
    "sparse-2of4": "sparse24-float16",
}


class Block(nn.Module):
    """A norm, and a gated layer behind it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = self.weight * wide.to(x.dtype)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


def as_it_is(module: fx.GraphModule, fakes: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """In place of Inductor, which has no device to compile for."""
    return lambda inputs: module(*inputs)


def main() -> None:
    """Print error, kernels and numbers of calls by recipe."""
    dynamo.compile_with_inductor = as_it_is
    started: list[str] = []
    start = launch.launch

    def noted(form: Any, *arguments: Any) -> None:
        started.append(form.title)
        start(form, *arguments)

    launch.launch = noted
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(64, 128) for _ in range(2)]).half().eval()
    x = torch.randn(2, 3, 64).half()
    rows = {}
    for recipe, kernel in RECIPES.items():
        small = fxcompress.compress(model, recipe, calibration=[(x,)], example_inputs=(x,))
        small(x)
        started.clear()
        y = small(x)
        kernels = sorted(set(started))
        choices = small.explain()
        small.set_backend("eager")
        reference = small(x).float()
        rows[recipe] = {
            "error": float((y.float() - reference).norm() / reference.norm()),
            "kernel": kernel,
            "choices": choices,
            "kernels": kernels,
        }
    print(json.dumps(rows))  # noqa: T201


if __name__ == "__main__":
    main()
