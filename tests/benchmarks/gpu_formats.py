"""Formats of products that tests/benchmarks/gpu.py measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxcompress.backends.triton.bytes_form import BytesForm
from fxcompress.backends.triton.linear_form import LinearForm
from fxcompress.backends.triton.packing import shared_table
from fxcompress.backends.triton.sparse_form import SparseForm

GROUP = 128
Made = tuple[Any, Tensor, dict[str, Tensor]]


def words(form: LinearForm, x: Tensor, outputs: int) -> dict[str, Tensor]:
    """Random codes and scales of a form."""
    chunks, device = -(-x.shape[1] // form.chunk), x.device
    groups = -(-x.shape[1] // form.group) if form.group else 1
    tiles = -(-outputs // 64), chunks * form.chunk // form.depth, 768 if form.words == 3 else 512
    info = torch.iinfo(torch.int32)
    words = torch.randint(info.min, info.max, tiles, dtype=torch.int32, device=device)
    found = {"words": words}
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(form.scale_dtype)
    scale = torch.full((groups, outputs), 0.01, device=device)
    found["scale"] = scale.to(kind) if kind else torch.full_like(scale, 120).to(torch.uint8)
    if form.zero:
        found["zero"] = torch.randint(0, 16, (groups, outputs), dtype=torch.uint8, device=device)
    if form.values == "table":
        found["table"] = shared_table(torch.linspace(-1, 1, 1 << form.bits, device=device), form.bits)
    return found


def _words(form: LinearForm) -> Callable[[Tensor, int], Made]:
    def make(x: Tensor, outputs: int) -> Made:
        if form.activation is None:
            return form, x, words(form, x, outputs)
        q = torch.randint(-127, 127, x.shape, dtype=torch.int8, device=x.device)
        scale = torch.full((x.shape[0],), 0.01, device=x.device)
        return form, q, {**words(form, x, outputs), "x_scale": scale}

    return make


def _bytes(codes: str) -> Callable[[Tensor, int], Made]:
    def make(x: Tensor, outputs: int) -> Made:
        emulated = codes != "int8" and not small_floats(x.device)
        form = BytesForm(codes, False, 1, 0, 0, "bfloat16", False, emulated)
        w = torch.randint(-100, 100, (outputs, x.shape[1]), dtype=torch.int8, device=x.device)
        q = torch.randint(-100, 100, x.shape, dtype=torch.int8, device=x.device)
        if codes != "int8":
            w, q = w.view(torch.float8_e4m3fn), q.view(torch.float8_e4m3fn)
        scale = torch.full((1, outputs), 0.01, device=x.device)
        return form, q, {"w": w, "scale": scale, "x_scale": torch.full((x.shape[0],), 0.01, device=x.device)}

    return make


def _sparse(x: Tensor, outputs: int) -> Made:
    form = SparseForm(16, False, 0, "bfloat16")
    chunks = -(-x.shape[1] // form.chunk)
    pairs = torch.full((chunks * 32, outputs), 0x3C003C00, dtype=torch.int32, device=x.device)
    places = torch.full((chunks * 16, outputs), 0x44, dtype=torch.uint8, device=x.device)
    return form, x, {"pairs": pairs, "places": places}


def small_floats(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit floats."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _int(bits: int, activation: str | None = None) -> LinearForm:
    return LinearForm("int", bits, activation is None, "group", GROUP, "bfloat16", "bfloat16", activation)


FORMATS: dict[str, Callable[[Tensor, int], Made]] = {
    "w4a16 g128": _words(_int(4)),
    "w8a8": _bytes("int8"),
    "fp8": _bytes("e4m3"),
    "w4a8 g128": _words(_int(4, "int8")),
    "w2a16 g128": _words(_int(2)),
    "w3a16 g128": _words(_int(3)),
    "w8a16 g128": _words(_int(8)),
    "nf4 g64": _words(LinearForm("table", 4, False, "group", 64, "bfloat16", "bfloat16")),
    "mxfp4": _words(LinearForm("e2m1", 4, False, "group", 32, "e8m0", "bfloat16")),
    "2:4 generated": _sparse,
}
