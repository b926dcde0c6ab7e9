"""Products with weights that are no dense codes: 8-bit floats and 2:4, one weight each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxcompress.backends.cpu.kernel_types import SinglePlan
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.cpu.planning import Plan
from fxcompress.backends.triton.bytes_form import BytesForm
from fxcompress.backends.triton.configs import ProductForm
from fxcompress.backends.triton.devices import Device
from fxcompress.backends.triton.linear_form import DTYPES, LinearForm
from fxcompress.backends.triton.packing import FloatWordsLayout
from fxcompress.backends.triton.selection import call
from fxcompress.backends.triton.sparse_form import PairsLayout, SparseForm
from fxcompress.formats.floating import FLOAT_DTYPES

__all__ = ["describe", "plan_singles", "small_float_form"]

aten = torch.ops.aten
ops = torch.ops.fxcompress
KINDS = {dtype: kind for kind, dtype in FLOAT_DTYPES.items()}
_MATRIX = ([0, 1], 0, 1)  # perm, batch_dims, row_dims of a weight stored [N, K]


def small_float_form(node: fx.Node, device: Device) -> BytesForm | None:
    """The form of ``linear(dequantize(x codes), dequantize(weight codes))`` of 8-bit floats."""
    if node.target is not aten.linear.default:
        return None
    x, weight = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    if x.target is not ops.dequantize_float_activation.default:
        return None
    if weight.target is not ops.dequantize_float_weight.default:
        return None
    q, x_scale, codes = (_value(argument) for argument in (*x.args[:2], weight.args[0]))
    block_rows, block_columns, shape, perm = cast("tuple[Any, ...]", weight.args[2:6])
    dtype = str(cast("torch.dtype", weight.args[-1])).removeprefix("torch.")
    per_token = x_scale.dim() == q.dim() and x_scale.shape[-1] == 1
    plain = len(shape) == 2 and list(perm) == [0, 1] and q.dtype == codes.dtype
    if not (per_token and plain and dtype in DTYPES and block_columns % 32 == 0):
        return None
    rows = block_rows or int(shape[0])
    return BytesForm(KINDS[q.dtype], False, rows, block_columns, 0, dtype, False, not device.small_floats)


def plan_singles(
    plan: Plan, nodes: Sequence[fx.Node], position: Mapping[fx.Node, int], device: Device
) -> None:
    """Add the plans of a block's products with such weights; see ``make_plan`` for ``position``."""
    if not device.serves:
        return
    for node in nodes:
        found = _single(node, device)
        if found is not None and found[2] in position:
            form, layout, tensor, outputs = found
            plan.singles[node] = SinglePlan(layout, position[tensor], _runner(form, outputs))


def _single(node: fx.Node, device: Device) -> tuple[ProductForm, Layout, fx.Node, int] | None:
    """Form, layout, one of the weight's tensors, and the outputs of a product."""
    if node.target is not aten.linear.default or small_float_form(node, device) is not None:
        return None
    weight = cast("fx.Node", node.args[1])
    reader = _READERS.get(weight.target)
    return None if reader is None else reader(weight)


def _float_words(weight: fx.Node) -> tuple[ProductForm, Layout, fx.Node, int] | None:
    codes = cast("fx.Node", weight.args[0])
    block_rows, block_columns, shape, perm = cast("tuple[Any, ...]", weight.args[2:6])
    dtype = str(cast("torch.dtype", weight.args[-1])).removeprefix("torch.")
    if len(shape) != 2 or list(perm) != [0, 1] or block_rows > 1 or block_columns or dtype not in DTYPES:
        return None
    form = LinearForm(KINDS[_value(codes).dtype], 8, False, "row", 0, "float32", dtype)
    return form, _float_layout(), codes, int(shape[0])


def _sparse_floats(weight: fx.Node) -> tuple[ProductForm, Layout, fx.Node, int] | None:
    values, slots, shape, *rest = cast("tuple[Any, ...]", weight.args)
    dtype = str(rest[-1]).removeprefix("torch.")
    if not _is_2_of_4(slots) or len(shape) != 2 or dtype not in DTYPES or tuple(rest[:3]) != _MATRIX:
        return None
    return SparseForm(16, False, 0, dtype), _pairs_layout(16, rest[-1]), values, int(shape[0])


def _sparse_codes(weight: fx.Node) -> tuple[ProductForm, Layout, fx.Node, int] | None:
    codes, _, slots, _, zero, bits, group, shape, *rest = cast("tuple[Any, ...]", weight.args)
    dtype = str(rest[-1]).removeprefix("torch.")
    if not _is_2_of_4(slots) or len(shape) != 2 or dtype not in DTYPES or tuple(rest[:3]) != _MATRIX:
        return None
    if bits not in (4, 8) or max(group, 0) % 128:
        return None
    form = SparseForm(bits, zero is not None, max(group, 0), dtype)
    return form, _pairs_layout(bits, rest[-1]), codes, int(shape[0])


def _is_2_of_4(slots: fx.Node) -> bool:
    return slots.target is ops.nm_slots.default and slots.args[1:3] == (2, 4)


_READERS: Mapping[Any, Callable[[fx.Node], tuple[ProductForm, Layout, fx.Node, int] | None]] = {
    ops.dequantize_float_weight.default: _float_words,
    ops.sparse_dense.default: _sparse_floats,
    ops.dequantize_sparse_weight.default: _sparse_codes,
}
DEQUANTIZERS = tuple(_READERS)


@functools.cache
def _float_layout() -> FloatWordsLayout:
    return FloatWordsLayout()


@functools.cache
def _pairs_layout(bits: int, dtype: torch.dtype) -> PairsLayout:
    return PairsLayout(bits, dtype)


def _runner(form: ProductForm, outputs: int) -> Callable[[Tensor, dict[str, Tensor], Tensor | None], Tensor]:
    def run(x: Tensor, packed: dict[str, Tensor], bias: Tensor | None) -> Tensor:
        named = dict(packed) if bias is None else {**packed, "bias": bias}
        return call(replace(form, bias=bias is not None), x, named, outputs)

    return run


def describe(weight: fx.Node, device: Device) -> str | None:
    """What ``explain()`` says of a weight that is no dense codes; None when it is dequantized."""
    for user in weight.users:
        bytes_form = small_float_form(user, device)
        if bytes_form is not None:
            return f"triton {bytes_form.title}"
        found = _single(user, device) if device.serves else None
        if found is not None:
            return f"triton {found[0].title}"
    return None


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
