"""Which generated kernel serves a product on a CUDA device, and why; what none serves is left to Inductor."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxcompress.backends.cpu.kernel_types import BiasKernel, Kernel, LinearSpec, QuantizedInput
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.triton import configs
from fxcompress.backends.triton.bytes_form import BytesForm
from fxcompress.backends.triton.devices import Device
from fxcompress.backends.triton.generator import missing_triton, render
from fxcompress.backends.triton.linear_form import DTYPES, LinearForm
from fxcompress.backends.triton.packing import BytesLayout, WordsLayout
from fxcompress.backends.triton.texts import text_of
from fxcompress.backends.triton.tuning import choose
from fxcompress.errors import BackendError

__all__ = ["Extra", "GeneratedBytes", "GeneratedWords", "choose_kernel"]

RANKS = (16, 32, 64, 128)
_LARGEST_SUM = (1 << 31) - 1


@functools.cache
def words_layout() -> WordsLayout:
    """The layout; one object, which packed tensors are found by."""
    return WordsLayout()


@functools.cache
def bytes_layout() -> BytesLayout:
    """See :func:`words_layout`."""
    return BytesLayout()


class GeneratedWords(BiasKernel):
    """A product with packed codes; float activations, or int8 ones with codes of fewer than 8 bits.

    Args:
        form: Without a bias.
        device: To say what runs.
    """

    def __init__(self, form: LinearForm, device: Device) -> None:
        self.form, self.device = form, device
        self.name = f"triton {form.title}"
        self.layout: Layout = words_layout()

    def refuses(self, spec: LinearSpec) -> str | None:
        """Made for one use, which it serves."""
        return None

    def describe(self, spec: LinearSpec) -> str:
        """The form and how it is divided."""
        return _described(self.form, spec, self.device)

    def run(
        self,
        x: Tensor,
        quantized: QuantizedInput | None,
        packed: dict[str, Tensor],
        spec: LinearSpec,
        bias: Tensor | None = None,
        extra: Extra | None = None,
    ) -> Tensor:
        """See :meth:`Kernel.run`; ``extra`` is added by the same kernel."""
        form = replace(self.form, bias=bias is not None)
        named = dict(packed)
        if form.activation:
            assert quantized is not None
            x, named["x_scale"] = quantized.codes, quantized.scale
        if bias is not None:
            named["bias"] = bias
        if extra is not None:
            form = replace(form, **extra.fields())
            named.update(extra.tensors)
        return call(form, x, named, spec.rows)


class Extra:
    """A second term that the kernel of the first one adds.

    Args:
        tensors: ``columns`` and ``values`` (outlier columns), or ``v`` and ``u`` (factors).
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def fields(self) -> dict[str, Any]:
        """Fields of the form."""
        if "columns" in self.tensors:
            return {"outliers": True}
        rank = int(self.tensors["v"].shape[0])
        return {"rank": next(size for size in RANKS if rank <= size)}


class GeneratedBytes(BiasKernel):
    """int8 activations × 8-bit codes.

    Args:
        form: Without a bias.
        device: To say what runs.
    """

    def __init__(self, form: BytesForm, device: Device) -> None:
        self.form, self.device = form, device
        self.name = f"triton {form.title}"
        self.layout: Layout = bytes_layout()

    def refuses(self, spec: LinearSpec) -> str | None:
        """Made for one use, which it serves."""
        return None

    def describe(self, spec: LinearSpec) -> str:
        """The form and how it is divided."""
        return _described(self.form, spec, self.device)

    def run(
        self,
        x: Tensor,
        quantized: QuantizedInput | None,
        packed: dict[str, Tensor],
        spec: LinearSpec,
        bias: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Kernel.run`."""
        assert quantized is not None
        named = {"w": packed["values"], "scale": packed["scale"], "x_scale": quantized.scale}
        if "zero" in packed:
            named["zero"] = packed["zero"]
        if bias is not None:
            named["bias"] = bias
        return call(replace(self.form, bias=bias is not None), quantized.codes, named, spec.rows)


def call(form: configs.ProductForm, x: Tensor, named: dict[str, Tensor], outputs: int) -> Tensor:
    """The operator, with the tensors in the order of the form's arguments."""
    from fxcompress.backends.triton.operators import tensor_names

    tensors = [named[name] for name in tensor_names(form)]
    y: Tensor = torch.ops.fxcompress_triton.linear(x, tensors, outputs, text_of(form))
    return y


def _described(form: configs.ProductForm, spec: LinearSpec, device: Device) -> str:
    rows = configs.row_bucket(spec.tokens or configs.BUCKETS[-1])
    config = choose(form, configs.Shape(rows, spec.rows, spec.columns), device)
    kind = "split-K gemm" if config.splits > 1 else "gemm"
    tiles = f"{config.block_m}×{config.block_n}" + (f"×{config.splits} splits" if config.splits > 1 else "")
    if config.unpacked:
        kind, tiles = "unpacked, then a dense product;", f"{config.block_n}×{config.block_k}"
    return f"triton {form.title} ({kind} {tiles}, up to {rows} rows)"


def choose_kernel(spec: LinearSpec, device: Device) -> tuple[Kernel | None, str]:
    """The generated kernel of a use and what to say of it; None and why, where Inductor has to serve.

    Args:
        spec: The linear use.
        device: The device.
    """
    problem = missing_triton()
    if problem is not None:
        return None, problem
    if not device.serves:
        return None, f"compute capability {device.capability / 10} is below 8.0"
    dtype = str(spec.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        return None, f"activations are {dtype}, kernels take float16 and bfloat16"
    try:
        configs.check_shape(configs.Shape(1, spec.rows, spec.columns), _float_form(spec, dtype))
    except BackendError as error:
        return None, str(error)
    return _chosen(spec, dtype, device)


def why(spec: LinearSpec, device: Device) -> tuple[str, str, str]:
    """Why a use has its kernel, the generated kernel's name, and its source."""
    kernel, text = choose_kernel(spec, device)
    if not isinstance(kernel, GeneratedWords | GeneratedBytes):
        return f"left to Inductor: {text}", "", ""
    shape = configs.Shape(configs.row_bucket(spec.tokens or configs.BUCKETS[-1]), spec.rows, spec.columns)
    config = choose(kernel.form, shape, device)
    seconds = configs.cost(kernel.form, config, shape, device)
    reason = (
        f"serves the form on compute capability {device.capability / 10}; up to {shape.m} rows the cost model"
        f" expects {seconds * 1e6:.0f} µs of {device.name}"
    )
    return reason, kernel.form.title, render(kernel.form)


def _chosen(spec: LinearSpec, dtype: str, device: Device) -> tuple[Kernel, str]:
    group = max(spec.group_size, 0)
    if spec.activation == "dynamic" and spec.table is None and group % 32 == 0:
        largest = ((1 << max(8, spec.bits)) - 1) * 127 * (group or spec.columns)
        if largest <= _LARGEST_SUM and spec.bits <= 4:
            form = replace(_float_form(spec, dtype), activation="int8")
            words = GeneratedWords(form, device)
            return words, words.describe(spec)
        if largest <= _LARGEST_SUM:
            kernel = GeneratedBytes(BytesForm("int8", not spec.symmetric, 1, group, 0, dtype), device)
            return kernel, kernel.describe(spec)
    generated = GeneratedWords(_float_form(spec, dtype), device)
    text = generated.describe(spec)
    if spec.activation is not None:
        reason = "static scales" if spec.activation == "static" else f"groups of {group}"
        text += f"; multiplies dequantized activations ({reason}: no product of bytes)"
    return generated, text


def _float_form(spec: LinearSpec, dtype: str) -> LinearForm:
    values = {None: "int", "shared": "table", "rows": "row-table"}[spec.table]
    group = max(spec.group_size, 0)
    return LinearForm(
        values=values,
        bits=spec.bits,
        zero=not spec.symmetric,
        scale="group" if group else "row" if spec.scaled else "none",
        group=group,
        scale_dtype="bfloat16" if group else "float32",
        input=dtype,
    )
