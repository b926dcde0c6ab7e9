"""Products of torch and torchao, measured beside the generated kernels by tests/benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.triton.devices import Device
from fxcompress.backends.triton.tuning import measure, rotations

GROUP = 128
Work = Callable[[], object]


def torch_products(x: Tensor, outputs: int, model: str, device: Device) -> Iterator[dict[str, Any]]:
    """The products of others for ``x: [M, K]``; what is missing here has the error instead of a time."""
    for name, (make, size) in PEERS.items():
        row = {"format": name, "model": model, "outputs": outputs, "inputs": x.shape[1], "rows": x.shape[0]}
        count = rotations(int(size * outputs * x.shape[1]), device)
        try:
            yield {**row, "seconds": measure(*(make(x, outputs) for _ in range(count)))}
        except Exception as error:
            yield {**row, "seconds": None, "error": str(error).splitlines()[0][:200]}


def _dense(x: Tensor, outputs: int) -> Work:
    w = torch.randn(outputs, x.shape[1], device=x.device, dtype=torch.bfloat16)
    return lambda: x @ w.t()


def _codes(x: Tensor, rows: int) -> Tensor:
    return torch.randint(-100, 100, (rows, x.shape[1]), dtype=torch.int8, device=x.device)


def _int8(x: Tensor, outputs: int) -> Work:
    q, w = _codes(x, max(x.shape[0], 32)), _codes(x, outputs)
    return lambda: torch._int_mm(q, w.t())


def _small_floats(x: Tensor, outputs: int, rowwise: bool) -> Work:
    rows = max(x.shape[0], 16)
    q, w = ((_codes(x, count).float() / 8).to(torch.float8_e4m3fn) for count in (rows, outputs))
    sizes = ((rows, 1), (1, outputs)) if rowwise else ((), ())
    scale, other = (torch.ones(size, device=x.device) for size in sizes)
    return lambda: torch._scaled_mm(q, w.t(), scale, other, out_dtype=torch.bfloat16)


def _int4(x: Tensor, outputs: int) -> Work:
    inputs = x.shape[1]
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=x.device)
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.ones(inputs // GROUP, outputs, 2, device=x.device, dtype=torch.bfloat16)
    return lambda: torch._weight_int4pack_mm(x, packed, GROUP, scales)


def _semi_structured(x: Tensor, outputs: int) -> Work:
    from torch.sparse import to_sparse_semi_structured

    w = torch.randn(outputs, x.shape[1], device=x.device, dtype=torch.bfloat16)
    mask = torch.tensor([1, 1, 0, 0], device=x.device, dtype=torch.bool).repeat(outputs, x.shape[1] // 4)
    sparse = to_sparse_semi_structured(w * mask)
    return lambda: F.linear(x, sparse)


def _torchao(x: Tensor, outputs: int, options: dict[str, Any]) -> Work:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(x.shape[1], outputs, bias=False, device=x.device, dtype=x.dtype)
    quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP, **options))
    return lambda: layer(x)


PEERS: dict[str, tuple[Callable[[Tensor, int], Work], float]] = {
    "torch bf16": (_dense, 2),
    "torch int8 (_int_mm, 32 rows at least)": (_int8, 1),
    "torch fp8 (_scaled_mm, 16 rows at least)": (partial(_small_floats, rowwise=False), 1),
    "torch fp8 (_scaled_mm, scales per row)": (partial(_small_floats, rowwise=True), 1),
    "torch int4 (_weight_int4pack_mm)": (_int4, 0.5),
    "torch 2:4": (_semi_structured, 1.125),
    "torchao int4": (partial(_torchao, options={}), 0.5),
    "torchao int4 (tiles)": (
        partial(_torchao, options={"int4_packing_format": "tile_packed_to_4d"}),
        0.5,
    ),
}
"""Maker of a product with weights of its own, and bytes per weight."""
