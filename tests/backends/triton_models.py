"""Small models lowered to Triton kernels, run by its interpreter: the whole way from a recipe.

Run as a program: ``TRITON_INTERPRET=1 FXCOMPRESS_TARGET=triton python -m tests.backends.triton_models``; with
``FXCOMPRESS_CHECK_DEVICE=cuda`` alone, on a device, everything between the kernels compiled by Inductor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxcompress
from fxcompress.backends import dynamo
from fxcompress.backends.cpu.lowering import Plan
from fxcompress.backends.triton import launch
from fxcompress.backends.triton.lowering import TritonInterpreter
from fxcompress.backends.triton.tuning import current_device
from fxcompress.cache_record import CacheRecord, to_text
from fxcompress.forms.cache import CacheForm
from fxcompress.forms.cache_stores import IntStore
from tests.backends.triton_common import DEVICE

FACTORS = "factors in float16"
RECIPES = {
    "w4a16": "linear-w4zg64",
    "w8a8": "bytes-int8",
    "w4a8": "aint8",
    "fp8": "bytes-e4m3",
    "nf4": "linear-t4g64",
    "sparse-2of4": "sparse24-float16",
    FACTORS: "rank16",
}
WITH_FACTORS = {
    "passes": [{"quantize-weights": {"bits": 4, "group_size": 64}}, {"low-rank-residual": {"rank": 4}}]
}


class Block(nn.Module):
    """A norm (root-mean-square, or of torch's layers), and a gated layer behind it."""

    def __init__(self, width: int, hidden: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.randn(width))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is None:
            wide = x.to(torch.float32)
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            h = self.weight * wide.to(x.dtype)
        else:
            h = self.norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


def as_it_is(module: fx.GraphModule, fakes: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """In place of Inductor, which has no device to compile for."""
    return lambda inputs: module(*inputs)


def cached_attention() -> dict[str, Any]:
    """A graph that reads and appends to a quantized cache, lowered: attention and append are one operator."""
    form = CacheForm(IntStore(bits=4, axis="channel", group_size=16), IntStore(bits=4), 1, 32, 32)
    text, _ = to_text(form)
    record = CacheRecord(form, 64, torch.float16)

    def step(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, length: Tensor, mask: Tensor) -> Tensor:
        found = torch.ops.fxcompress.update_cache(memory, length, k, v, [], text, 64, 64)
        keys, values = (x.unsqueeze(2).expand(1, 1, 2, 64, 32).reshape(1, 2, 64, 32) for x in found)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    def inputs(tokens: int) -> list[Tensor]:
        return [torch.randn(1, heads, tokens, 32).half().to(DEVICE) for heads in (2, 1, 1)]

    memory, length = record.allocate(1, DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    record.append(memory, 0, *inputs(21)[1:])
    length.fill_(21)
    mask = (torch.arange(64, device=DEVICE) < 22)[None, None, None]
    given = inputs(1)
    graph = make_fx(step, pre_dispatch=True, tracing_mode="fake")(*given, memory, length, mask)
    other, count = memory.clone(), length.clone()
    expected = step(*given, other, count, mask).float()
    lowered = TritonInterpreter(graph, Plan(), {}, current_device(DEVICE))
    found = lowered.run(*given, memory, length, mask).float()
    return {
        "error": float((found - expected).norm() / expected.norm()),
        "fused": len(lowered.caches),
        "same memory": torch.equal(memory, other) and torch.equal(length, count),
    }


def started_kernels() -> list[str]:
    """Titles of the kernels that are started from now on."""
    started: list[str] = []
    start = launch.launch

    def noted(form: Any, *arguments: Any) -> None:
        started.append(form.title)
        start(form, *arguments)

    launch.launch = noted
    return started


def main() -> None:
    """Print error, kernels and numbers of calls by recipe."""
    if DEVICE.type == "cpu":
        dynamo.compile_with_inductor = as_it_is
    started = started_kernels()
    torch.manual_seed(0)
    model = nn.Sequential(Block(64, 128), Block(64, 128, nn.LayerNorm(64))).half().eval().to(DEVICE)
    x = torch.randn(2, 3, 64).half().to(DEVICE)
    rows: dict[str, Any] = {}
    for recipe, kernel in RECIPES.items():
        if sys.argv[1:] and recipe not in sys.argv[1:]:
            continue
        made = fxcompress.Recipe.load(WITH_FACTORS) if recipe == FACTORS else recipe
        small = fxcompress.compress(model, made, calibration=[(x,)], example_inputs=(x,))
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
    if "cache" in (sys.argv[1:] or ["cache"]):
        rows["cache"] = cached_attention()
    print(json.dumps(rows))  # noqa: T201


if __name__ == "__main__":
    main()
