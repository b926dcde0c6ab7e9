"""Decoding with generated kernels: attention over long quantized caches, rows, and a whole random decoder."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import fxcompress.backends.triton.operators  # noqa: F401  (registers the operators)
from fxcompress.backends.triton.launch import run_hadamard, run_quantize
from fxcompress.backends.triton.linear_form import LinearForm
from fxcompress.backends.triton.row_forms import HadamardForm, QuantizeForm
from fxcompress.backends.triton.texts import text_of
from fxcompress.backends.triton.tuning import copies, current_device, elapsed, measure, rotations
from fxcompress.cache_record import CacheRecord, to_text
from fxcompress.forms.cache import CacheForm
from fxcompress.forms.cache_stores import IntStore
from tests.benchmarks.gpu_formats import words

FORM = LinearForm("int", 4, True, "group", 128, "bfloat16", "bfloat16")
ops = torch.ops.fxcompress_triton


class Budget(Protocol):
    """The time that is left, see tests/benchmarks/gpu.py."""

    def allows(self, what: str) -> bool: ...


class _Always:
    """Time without end."""

    def allows(self, what: str) -> bool:
        return True


def caches(bits: int, key_heads: int, width: int) -> CacheForm:
    """Keys per channel and values per token, as kv4-kivi keeps them (8 bits: both per token)."""
    key = IntStore(bits=bits, axis="channel", group_size=64) if bits < 8 else IntStore(bits=8)
    return CacheForm(key, IntStore(bits=bits), key_heads, width, width)


def attention(device: torch.device, context: int, tiny: bool, clock: Budget) -> list[dict[str, Any]]:
    """One query over ``context`` tokens, four heads to a key head, beside torch's attention."""
    rows: list[dict[str, Any]] = []
    known = current_device(device)
    heads, key_heads, width = (4, 1, 64) if tiny else (32, 8, 128)
    for batch in (1,) if tiny else (1, 8):
        query = torch.randn(batch, heads, 1, width, device=device, dtype=torch.bfloat16)
        new = torch.randn(batch, key_heads, 1, width, device=device, dtype=torch.bfloat16)
        past = torch.randn(batch, key_heads, context, width, device=device, dtype=torch.bfloat16)
        row = {"batch": batch, "context": context}
        if clock.allows(f"attention bf16 {batch}"):
            pasts = [torch.randn_like(past) for _ in range(1 + rotations(past.nbytes, known))]
            pairs = zip(pasts, pasts[1:] + pasts[:1], strict=True)
            took = measure(
                *(partial(F.scaled_dot_product_attention, query, k, v, enable_gqa=True) for k, v in pairs)
            )
            rows.append({**row, "cache": "torch bf16", "seconds": took, "bytes": 2 * past.nbytes})
            del pasts
        del past
        for bits in (8, 4, 2):
            if not clock.allows(f"attention int{bits} {batch}"):
                continue
            form = caches(bits, key_heads, width)
            text, _ = to_text(form)
            capacity = context + 64
            record = CacheRecord(form, capacity, torch.bfloat16)
            memory = record.allocate(batch, device)
            length = torch.full((1,), context, dtype=torch.int64, device=device)

            steps = [
                partial(_attend, query, new, each["memory"], length, capacity, text)
                for each in copies({"memory": memory}, known)
            ]
            rows.append({**row, "cache": f"int{bits}", "seconds": measure(*steps), "bytes": memory.nbytes})
            del steps
    return rows


def _attend(query: Tensor, new: Tensor, memory: Tensor, length: Tensor, capacity: int, text: str) -> Tensor:
    length.fill_(capacity - 64)  # one token more would be appended at every call
    y: Tensor = ops.attend_cached(query, new, new, None, memory, length, capacity, 0.088, text)
    return y


def row_kernels(device: torch.device, tiny: bool, clock: Budget) -> list[dict[str, Any]]:
    """Quantizers behind norms and gates, Hadamard transforms; beside the same in torch, compiled on a GPU."""
    rows: list[dict[str, Any]] = []
    width = 256 if tiny else 4096
    for tokens in (2,) if tiny else (1, 64, 2048):
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        weight = torch.ones(width, device=device, dtype=torch.bfloat16)

        norm, gate = (QuantizeForm(source, "int8", 8, "bfloat16") for source in ("rms-norm", "gate"))
        hadamard = HadamardForm(128, "bfloat16")
        cases: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]] = {
            "norm, int8": (partial(run_quantize, norm, x, (weight,), 1e-5), partial(_norm, x, weight)),
            "gate · up, int8": (partial(run_quantize, gate, x, (x,)), partial(_gate, x)),
            "Hadamard 128": (partial(run_hadamard, hadamard, x), None),
        }
        for name, (ours, other) in cases.items():
            if clock.allows(f"{name} {tokens}"):
                compiled = other if other is None or tiny else torch.compile(other)
                took = measure(compiled) if compiled is not None else None
                rows.append({"kernel": name, "tokens": tokens, "seconds": measure(ours), "torch": took})
    return rows


def _norm(x: Tensor, weight: Tensor) -> Any:
    return torch.ops.fxcompress.quantize_per_token(F.rms_norm(x, (x.shape[1],), weight, 1e-5), 8)


def _gate(x: Tensor) -> Any:
    return torch.ops.fxcompress.quantize_per_token(F.silu(x) * x, 8)


@dataclass(frozen=True)
class Sizes:
    """Of a decoder."""

    width: int
    hidden: int
    heads: int
    key_heads: int
    head: int
    layers: int
    context: int


EIGHT = Sizes(4096, 14336, 32, 8, 128, 32, 1024)
TINY = Sizes(128, 128, 2, 1, 64, 1, 64)


@dataclass(frozen=True)
class Kind:
    """What layers of one decoder share.

    Args:
        sizes: Of the decoder.
        quantized: 4-bit codes and a 4-bit cache, or all in bfloat16.
    """

    sizes: Sizes
    quantized: bool

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the products."""
        s = self.sizes
        return {
            "qkv": ((s.heads + 2 * s.key_heads) * s.head, s.width),
            "out": (s.width, s.heads * s.head),
            "up": (2 * s.hidden, s.width),
            "down": (s.width, s.hidden),
        }

    @property
    def capacity(self) -> int:
        """Of a cache."""
        return self.sizes.context + 64

    @property
    def cache(self) -> CacheForm:
        """Of every layer."""
        return caches(4, self.sizes.key_heads, self.sizes.head)

    def tensors(self, device: torch.device) -> dict[str, Any]:
        """Random weights and cache of one layer."""
        found: dict[str, Any] = {}
        for name, (rows, columns) in self.shapes.items():
            like = torch.empty(1, columns, device=device, dtype=torch.bfloat16)
            if self.quantized:
                packed = words(FORM, like, rows)
                found[name] = [packed["words"], packed["scale"], packed["zero"]]
            else:
                weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
                found[name] = weight / columns**0.5
        found["norm"] = torch.ones(self.sizes.width, device=device, dtype=torch.bfloat16)
        if self.quantized:
            found["memory"] = CacheRecord(self.cache, self.capacity, torch.bfloat16).allocate(1, device)
            found["length"] = torch.full((1,), self.sizes.context, dtype=torch.int64, device=device)
        else:
            past = (2, 1, self.sizes.key_heads, self.sizes.context, self.sizes.head)
            found["past"] = torch.randn(past, device=device, dtype=torch.bfloat16)
        return found


def layer(kind: Kind, text: str, x: Tensor, tensors: dict[str, Any]) -> Tensor:
    """One layer for one token; ``text`` is the cache's form."""
    s = kind.sizes

    def product(name: str, x: Tensor) -> Tensor:
        if not kind.quantized:
            return F.linear(x, tensors[name])
        y: Tensor = ops.linear(x, tensors[name], kind.shapes[name][0], text_of(FORM))
        return y

    h = F.rms_norm(x, (s.width,), tensors["norm"], 1e-5)
    joined = product("qkv", h).view(1, 1, -1, s.head).transpose(1, 2)
    q, k, v = joined.split([s.heads, s.key_heads, s.key_heads], 1)
    if kind.quantized:
        tensors["length"].fill_(s.context)  # one token more would be appended at every call
        memory, length = tensors["memory"], tensors["length"]
        y = ops.attend_cached(q, k, v, None, memory, length, kind.capacity, 0.088, text)
    else:
        keys, values = tensors["past"]  # of fixed size; the token takes the last place
        keys[:, :, -1:], values[:, :, -1:] = k, v
        y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    x = x + product("out", y.transpose(1, 2).reshape(1, -1))
    gate, up = product("up", F.rms_norm(x, (s.width,), tensors["norm"], 1e-5)).chunk(2, -1)
    return x + product("down", F.silu(gate) * up)


def decoder(device: torch.device, tiny: bool, clock: Budget) -> list[dict[str, Any]]:
    """A step of a decoder of 8 billion parameters in a CUDA graph: 4-bit weights and cache, and bfloat16."""
    sizes = TINY if tiny else EIGHT
    rows: list[dict[str, Any]] = []
    for name, quantized in (("bf16 Inductor", False), ("w4a16 g128, 4-bit cache", True)):
        if not clock.allows(f"decoder {name}"):
            continue
        kind = Kind(sizes, quantized)
        text, _ = to_text(kind.cache)
        layers = [kind.tensors(device) for _ in range(sizes.layers)]
        x = torch.randn(1, sizes.width, device=device, dtype=torch.bfloat16)
        seconds = _graphed(kind, text, x, layers, tiny)
        rows.append({"decoder": name, "layers": sizes.layers, "context": sizes.context, "seconds": seconds})
        del layers
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


@torch.no_grad()
def _graphed(kind: Kind, text: str, x: Tensor, layers: list[dict[str, Any]], tiny: bool) -> float:
    one = layer if tiny else torch.compile(layer)

    def step() -> Tensor:
        y = x
        for tensors in layers:
            y = one(kind, text, y, tensors)
        return y

    if tiny:
        return measure(step)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return statistics.median(elapsed(graph.replay) for _ in range(20))


if __name__ == "__main__":  # compiles what gpu.py measures, which finds it on disk
    _found = decoder(torch.device("cuda"), False, _Always())
    sys.stdout.write(json.dumps(_found) + "\n")
