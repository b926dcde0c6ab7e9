"""Calls of kernels on tensors: checks, grids, the second kernel of a split product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.triton.bytes_form import BytesForm
from fxcompress.backends.triton.configs import (
    Config,
    ProductForm,
    Shape,
    bytes_form,
    check_shape,
    unpack_form,
)
from fxcompress.backends.triton.generator import interpreted, load_kernel
from fxcompress.backends.triton.linear_form import LinearForm, ReduceForm
from fxcompress.backends.triton.row_forms import MOST_COLUMNS, HadamardForm, QuantizeForm
from fxcompress.errors import BackendError
from fxcompress.formats.floating import FLOAT_DTYPES

__all__ = ["run_hadamard", "run_product", "run_quantize"]

_REDUCE_BLOCK = 1024


def run_product(
    form: ProductForm, config: Config, x: Tensor, tensors: dict[str, Tensor], outputs: int
) -> Tensor:
    """``[M, outputs]`` of ``x: [M, K]``.

    Args:
        form: Of the kernel.
        config: How it is divided.
        x: Activations, or their codes; contiguous rows.
        tensors: The other tensors by their argument's name, without ``_ptr``.
        outputs: N.

    Raises:
        BackendError: sizes are out of range, or a tensor lies elsewhere.
    """
    shape = Shape(x.shape[0], outputs, x.shape[1])
    check_shape(shape, form)
    _check_place(form.title, x, tensors)
    dtype = getattr(torch, form.input)
    y = x.new_empty((shape.m, shape.n), dtype=dtype)
    if not y.numel():
        return y
    if config.unpacked:
        assert isinstance(form, LinearForm)
        return _unpacked(form, config, x, tensors, shape)
    split = config.splits > 1
    target = x.new_empty((config.splits, shape.m, shape.n), dtype=torch.float32) if split else y
    sizes = _sizes(form, shape, tensors)
    if isinstance(form, BytesForm) and form.emulated:
        x, tensors = x.view(torch.uint8), {**tensors, "w": tensors["w"].view(torch.uint8)}
    arguments = [_argument(a.name, x.contiguous(), tensors, target, sizes) for a in form.arguments()]
    if isinstance(form, BytesForm):
        grid: tuple[int, ...] = (-(-shape.m // config.block_m) * -(-shape.n // config.block_n),)
    else:
        grid = (-(-shape.n // config.block_n), -(-shape.m // config.block_m), config.splits)
    launch(form, grid, arguments, config.constants(form), config)
    if split:
        _reduce(form, target, tensors.get("bias"), y, config.splits)
    return y


_UNPACK_STEPS = 4
_BYTES = Config(128, 128, 128, 1, 8, 3)
"""Of the product with unpacked codes: the fastest for many rows on what was measured."""


def _unpacked(
    form: LinearForm, config: Config, x: Tensor, tensors: dict[str, Tensor], shape: Shape
) -> Tensor:
    """The product with a weight that is unpacked to memory for it."""
    unpack = unpack_form(form)
    assert unpack is not None
    dense = x.new_empty((shape.n, shape.k), dtype=torch.int8 if unpack.codes else x.dtype)
    sizes = _sizes(unpack, shape, tensors)
    arguments = [_argument(a.name, x, tensors, dense, sizes) for a in unpack.arguments()]
    blocks = sizes["chunks"] * (form.chunk // config.block_k)
    grid = (-(-shape.n // config.block_n), -(-blocks // _UNPACK_STEPS))
    constants: dict[str, Any] = {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    launch(unpack, grid, arguments, {**constants, "SCALE_WEIGHT": True, "STEPS": _UNPACK_STEPS}, config)
    if not unpack.codes:
        return F.linear(x, dense, tensors["bias"] if form.bias else None)
    scale = tensors["scale"].float()
    form_ = bytes_form(form)
    how = replace(_BYTES, block_k=max(form_.block_k))
    return run_product(form_, how, x, {**tensors, "w": dense, "scale": scale}, shape.n)


def _argument(name: str, x: Tensor, tensors: dict[str, Tensor], y: Tensor, sizes: dict[str, int]) -> Any:
    if not name.endswith("_ptr"):
        return sizes[name]
    stem = name.removesuffix("_ptr")
    return {"x": x, "y": y}.get(stem, tensors.get(stem))


def _sizes(form: ProductForm, shape: Shape, tensors: dict[str, Tensor]) -> dict[str, int]:
    found = {"M": shape.m, "N": shape.n, "K": shape.k}
    if isinstance(form, BytesForm):
        found["scale_rows"] = tensors["scale"].shape[1]
        found["x_groups"] = tensors["x_scale"].numel() // shape.m
        return found
    found["chunks"] = -(-shape.k // form.chunk)
    if isinstance(form, LinearForm):
        found["groups"] = tensors["scale"].shape[0] if "scale" in tensors else 1
        found["outliers"] = tensors["columns"].shape[0] if form.outliers else 0
        found["rank"] = tensors["v"].shape[0] if form.rank else 0
    return found


def _reduce(form: ProductForm, parts: Tensor, bias: Tensor | None, y: Tensor, splits: int) -> None:
    reduce = ReduceForm(form.input, form.bias)
    size = y.numel()
    arguments: list[Any] = [parts, *([bias] if form.bias else []), y, y.shape[1], splits, size]
    launch(reduce, (-(-size // _REDUCE_BLOCK),), arguments, {"BLOCK": _REDUCE_BLOCK})


def launch(
    form: Any,
    grid: tuple[int, ...],
    arguments: list[Any],
    constants: dict[str, Any],
    config: Config | None = None,
) -> None:
    """Start the kernel of a form."""
    options = {} if config is None else {"num_warps": config.warps, "num_stages": config.stages}
    if interpreted():
        options = {}
    load_kernel(form)[grid](*arguments, **constants, **options)


def _check_place(title: str, x: Tensor, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise BackendError(f"{title}: {name} lies on {tensor.device}, activations on {x.device}.")
        if not tensor.is_contiguous():
            raise BackendError(f"{title}: {name} of shape {tuple(tensor.shape)} is not contiguous.")


def run_quantize(
    form: QuantizeForm, x: Tensor, others: tuple[Tensor, ...] = (), eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Codes like ``x: [..., K]`` and float32 scales ``[..., 1]``.

    Args:
        form: Of the kernel.
        x: Activations (the gate, for ``"gate"``); rows of any distance, each contiguous.
        others: Up, or the norm's weight (and bias).
        eps: Of the norm.

    Raises:
        BackendError: rows are too long for one program.
    """
    columns = x.shape[-1]
    if columns > MOST_COLUMNS:
        raise BackendError(f"{form.title}: rows of {columns}, more than {MOST_COLUMNS}.")
    rows = _as_rows(x)
    codes = torch.int8 if form.codes == "int8" else FLOAT_DTYPES[form.codes]
    q = x.new_empty(x.shape, dtype=codes)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    sizes: list[Any] = [columns, rows.stride(0)]
    tensors = list(others)
    if form.source == "gate":
        tensors = [_as_rows(others[0])]
        sizes.append(tensors[0].stride(0))
    if form.source.endswith("norm"):
        sizes.append(eps)
    if rows.shape[0]:
        written = q if form.codes == "int8" else q.view(torch.uint8)
        block = 1 << (columns - 1).bit_length()
        launch(
            form,
            (rows.shape[0],),
            [rows, *tensors, written, scale, *sizes],
            {"BLOCK": block},
            _row_config(block),
        )
    return q, scale


def _row_config(block: int) -> Config:
    return Config(1, block, 0, 1, max(1, min(16, block // 512)), 1)


def _as_rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def run_hadamard(form: HadamardForm, x: Tensor) -> Tensor:
    """The transform of every part of the last dimension.

    Raises:
        BackendError: the dimension is no multiple of the form's size.
    """
    if x.shape[-1] % form.size:
        raise BackendError(f"{form.title}: {x.shape[-1]} channels are no multiple of {form.size}.")
    source = x.contiguous()
    y = torch.empty_like(source)
    parts = x.numel() // form.size
    block = max(1, 4096 // form.size)
    if parts:
        launch(form, (-(-parts // block),), [source, y, parts], {"BLOCK": block})
    return y
