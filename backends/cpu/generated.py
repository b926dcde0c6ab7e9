"""Kernels made by the generator: which forms they serve, and the operator calls that run them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxcompress.backends.cpu.epilogues import Epilogue
from fxcompress.backends.cpu.generator import DTYPES, KernelForm
from fxcompress.backends.cpu.isa import Isa
from fxcompress.backends.cpu.kernel_types import EpilogueKernel, Kernel, LinearSpec, QuantizedInput
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.cpu.native import ensure_kernel
from fxcompress.backends.cpu.tiled import TiledLayout, gated_layout, kernel_group, tiled_layout


class GeneratedLinear(EpilogueKernel):
    """A product straight from the tiles: few rows at memory speed, many rows from panels in cache.

    Quantizes activations itself, once per row, so that codes never pass through memory.

    Args:
        isa: Instruction set to generate for.
    """

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.name = f"generated {isa.name}"
        self.layout: TiledLayout = tiled_layout(isa)

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`Kernel.refuses`. Compiles the kernel: only a kernel that exists is chosen."""
        if spec.dtype not in DTYPES:
            return f"activations are {spec.dtype}"
        return ensure_kernel(self.form(spec), self.isa)

    def form(self, spec: LinearSpec) -> KernelForm:
        """The kernel form of a use."""
        return linear_form(spec)

    def describe(self, spec: LinearSpec) -> str:
        """See :meth:`Kernel.describe`."""
        return f"{self.name} {self.form(spec).title.removeprefix('linear-')}"

    def layout_with(self, epilogue: Epilogue) -> Layout | None:
        """See :meth:`EpilogueKernel.layout_with`."""
        return gated_layout(self.isa, epilogue.gate_last) if epilogue.gated else self.layout

    def run_with(
        self,
        epilogue: Epilogue,
        x: Tensor,
        quantized: QuantizedInput | None,
        packed: dict[str, Tensor],
        spec: LinearSpec,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        """See :meth:`EpilogueKernel.run_with`."""
        static = quantized is not None and spec.activation == "static"
        group = kernel_group(spec.group_size, spec.columns)
        number = self.form(spec).call_number(self.isa, group, epilogue.code)
        operands = (
            packed["weight"],
            packed["scale"],
            packed.get("zero"),
            packed["total"],
            None if bias is None else bias.to(torch.float32),
            quantized.scale.to(torch.float32) if static and quantized is not None else None,
            quantized.zero if static and quantized is not None else None,
            number,
        )
        return product_with(x if quantized is None else quantized.source, residual, operands)


def product_with(x: Tensor, residual: Tensor | None, operands: tuple[Tensor | int | None, ...]) -> Tensor:
    """The operator call of a product, with or without a residual."""
    ops = torch.ops.fxcompress_cpu
    y: Tensor = ops.linear(x, *operands) if residual is None else ops.linear_residual(x, residual, *operands)
    return y


class GeneratedBfloat16(GeneratedLinear):
    """The same, with many rows of activations rounded to bfloat16, where the processor has products of those.

    Weights are not rounded: codes less their zero-points are exact in bfloat16, scales follow in float32.
    """

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`Kernel.refuses`."""
        if spec.activation is not None:
            return "activations are quantized"
        if not spec.many_rows:
            return "fewer tokens than bfloat16 products are good for"
        if not self.isa.bfloat16_flags:
            return f"no bfloat16 products with {self.isa.name}"
        return super().refuses(spec)

    def form(self, spec: LinearSpec) -> KernelForm:
        """See :meth:`GeneratedLinear.form`."""
        return dataclasses.replace(linear_form(spec), kind="linear-bfloat16")


class GeneratedDense(Kernel):
    """Many rows on a machine with matrix units: tiles dequantized to bfloat16, then oneDNN.

    Args:
        isa: Instruction set to generate for.
    """

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.name = f"generated {isa.name} → bfloat16, oneDNN"
        self.layout: TiledLayout = tiled_layout(isa)

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`Kernel.refuses`."""
        if spec.activation is not None:
            return "activations are quantized"
        if not spec.many_rows:
            return "fewer tokens than the bfloat16 product is good for"
        return ensure_kernel(self.form(spec), self.isa)

    def product(
        self, x: Tensor, quantized: QuantizedInput | None, packed: dict[str, Tensor], spec: LinearSpec
    ) -> Tensor:
        """See :meth:`Kernel.product`."""
        weight = torch.ops.fxcompress_cpu.dense(
            packed["weight"],
            packed["scale"],
            packed.get("zero"),
            spec.columns,
            self.form(spec).call_number(self.isa, kernel_group(spec.group_size, spec.columns)),
        )
        product = torch.mm(x.reshape(-1, spec.columns).to(torch.bfloat16), weight)[:, : spec.rows]
        return product.reshape(*x.shape[:-1], spec.rows).to(spec.dtype)

    @staticmethod
    def form(spec: LinearSpec) -> KernelForm:
        """The kernel form of a weight."""
        return KernelForm(
            *("dense", spec.bits, not spec.symmetric, spec.group_size > 0, None, 0, "bfloat16", "bfloat16")
        )


def linear_form(spec: LinearSpec) -> KernelForm:
    """The kernel form of a linear use; activations and result have the dtype of ``spec``."""
    dtype = DTYPES[spec.dtype]
    return KernelForm(
        kind="linear",
        bits=spec.bits,
        has_zero=not spec.symmetric,
        grouped=spec.group_size > 0,
        activation=spec.activation,
        activation_bits=spec.activation_bits if spec.activation else 0,
        input=dtype,
        output=dtype,
    )
