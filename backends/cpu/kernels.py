"""Linear kernels made of what torch brings: what each accepts, how its weights lie, and the ATen it runs.

A kernel is a plain function of tensors, inlined into the graph when a block is traced, so that Inductor fuses
what surrounds the matrix product. Layouts are shared between kernels: a prefill graph and a decode graph of
the same model hold one copy of the packed weights. Which of these a machine should run is decided in
``selection.py``.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.cpu.kernel_types import Kernel, LinearSpec, QuantizedInput
from fxcompress.backends.cpu.layouts import (
    INT4_BLOCKED,
    INT4_GROUPS,
    INT8_ROWS,
    int4_layout_is_known,
    unpack_int4_blocked,
)

# aten::_weight_int8pack_mm (torch 2.13) reads past the end of rows of any other length: wrong results or a
# crash.
_INT8_PACK_STEP = 16


class Int8Int8(Kernel):
    """8-bit activations × 8-bit rows: oneDNN integer product, scales applied in the fused epilogue."""

    name = "oneDNN int8×int8"
    layout = INT8_ROWS

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`Kernel.refuses`."""
        if spec.activation is None:
            return "activations are not quantized"
        return None if spec.per_row else "the weight has several scales per row"

    def product(
        self, x: Tensor, quantized: QuantizedInput | None, packed: dict[str, Tensor], spec: LinearSpec
    ) -> Tensor:
        """See :meth:`Kernel.product`."""
        assert quantized is not None
        codes = quantized.codes.reshape(-1, spec.columns)
        single = spec.tokens == 1
        # aten::_int_mm (torch 2.13) is wrong for one row whose stride of the row dimension is not K, and
        # Inductor is free to choose that stride: two rows have only one layout.
        rows = F.pad(codes, (0, 0, 0, 1)) if single else codes
        product = torch._int_mm(rows, packed["values"].t())[: 1 if single else None].float()
        zero = quantized.zero
        if zero is not None:
            product = product - zero.float() * packed["total"].float()
        product = product * packed["scale"]
        if "offset" in packed:
            sums = codes.sum(dim=-1, keepdim=True, dtype=torch.int32).float()
            sums = sums if zero is None else sums - zero.float() * spec.columns
            product = product + sums * packed["offset"]
        scale = quantized.scale.float()
        product = product * (scale if scale.dim() == 0 else scale.reshape(-1, 1))
        return product.reshape(*x.shape[:-1], spec.rows).to(spec.dtype)


class Int8WeightOnly(Kernel):
    """16/32-bit activations × 8-bit rows, few tokens: ATen's bfloat16 kernel streams the weight once."""

    name = "ATen int8 weight-only"
    layout = INT8_ROWS

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`Kernel.refuses`."""
        if not spec.per_row:
            return "the weight has several scales per row"
        if spec.columns % _INT8_PACK_STEP:
            return f"{spec.columns} inputs are no multiple of {_INT8_PACK_STEP}"
        return "more tokens than the decode kernel is good for" if spec.many_rows else None

    def product(
        self, x: Tensor, quantized: QuantizedInput | None, packed: dict[str, Tensor], spec: LinearSpec
    ) -> Tensor:
        """See :meth:`Kernel.product`."""
        flat = x.reshape(-1, spec.columns)
        # Scales are applied outside in float32: the kernel would round them to bfloat16.
        product = torch.ops.aten._weight_int8pack_mm(
            flat.to(torch.bfloat16), packed["values"], packed["ones"]
        )
        return _scale_rows(product, flat, packed, spec).reshape(*x.shape[:-1], spec.rows)


class Int8Unpacked(Kernel):
    """16/32-bit activations × 8-bit rows, many tokens: rows widened to bfloat16 (exactly), oneDNN product."""

    name = "int8 → bfloat16, oneDNN"
    layout = INT8_ROWS

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`Kernel.refuses`."""
        return None if spec.per_row else "the weight has several scales per row"

    def product(
        self, x: Tensor, quantized: QuantizedInput | None, packed: dict[str, Tensor], spec: LinearSpec
    ) -> Tensor:
        """See :meth:`Kernel.product`."""
        flat = x.reshape(-1, spec.columns)
        product = F.linear(flat.to(torch.bfloat16), packed["values"].to(torch.bfloat16))
        return _scale_rows(product, flat, packed, spec).reshape(*x.shape[:-1], spec.rows)


class Int4WeightOnly(Kernel):
    """16/32-bit activations × 4-bit (or narrower) groups, few tokens: ATen's bfloat16 kernel.

    Args:
        any_tokens: Serve many tokens too where :class:`Int4Unpacked` does not know the machine's layout.
    """

    name = "ATen int4 weight-only"
    layout = INT4_BLOCKED

    def __init__(self, *, any_tokens: bool = True) -> None:
        self.any_tokens = any_tokens

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`Kernel.refuses`."""
        if spec.bits > 4:
            return f"{spec.bits}-bit codes do not fit int4"
        if not spec.per_row and spec.group_size not in INT4_GROUPS:
            return f"group size {spec.group_size} is none of {INT4_GROUPS}"
        return "more tokens than the decode kernel is good for" if self._declines(spec) else None

    def _declines(self, spec: LinearSpec) -> bool:
        return spec.many_rows and not (self.any_tokens and not _int4_unpackable())

    def product(
        self, x: Tensor, quantized: QuantizedInput | None, packed: dict[str, Tensor], spec: LinearSpec
    ) -> Tensor:
        """See :meth:`Kernel.product`."""
        group, columns = _int4_geometry(spec)
        flat = F.pad(x.reshape(-1, spec.columns), (0, columns - spec.columns)).to(torch.bfloat16)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat, packed["packed"], group, packed["parameters"]
        )
        return y[:, : spec.rows].reshape(*x.shape[:-1], spec.rows).to(spec.dtype)


class Int4Unpacked(Int4WeightOnly):
    """16/32-bit activations × 4-bit groups, many tokens: unpacked to bfloat16 in the graph, then oneDNN."""

    name = "int4 → bfloat16, oneDNN"

    def _declines(self, spec: LinearSpec) -> bool:
        return not _int4_unpackable()

    def product(
        self, x: Tensor, quantized: QuantizedInput | None, packed: dict[str, Tensor], spec: LinearSpec
    ) -> Tensor:
        """See :meth:`Kernel.product`."""
        group, columns = _int4_geometry(spec)
        rows = packed["packed"].shape[0]
        codes = unpack_int4_blocked(packed["packed"], rows).view(rows, columns // group, group)
        parameters = packed["parameters"].transpose(0, 1).float()  # [rows, groups, 2]
        dense = (codes.float() - 8) * parameters[:, :, :1] + parameters[:, :, 1:]
        weight = dense.to(torch.bfloat16).view(rows, columns)[: spec.rows, : spec.columns]
        flat = x.reshape(-1, spec.columns).to(torch.bfloat16)
        return F.linear(flat, weight.contiguous()).reshape(*x.shape[:-1], spec.rows).to(spec.dtype)


ATEN_KERNELS: tuple[Kernel, ...] = (
    Int8Int8(),
    Int4WeightOnly(),
    Int4Unpacked(),
    Int8WeightOnly(),
    Int8Unpacked(),
)


def _scale_rows(product: Tensor, flat: Tensor, packed: dict[str, Tensor], spec: LinearSpec) -> Tensor:
    y = product.float() * packed["scale"]
    if "offset" in packed:
        y = y + flat.float().sum(dim=-1, keepdim=True) * packed["offset"]
    return y.to(spec.dtype)


def _int4_geometry(spec: LinearSpec) -> tuple[int, int]:
    """Group size and padded number of inputs."""
    group = spec.group_size if spec.group_size > 0 else INT4_GROUPS[-1]
    return group, -(-spec.columns // group) * group


@functools.cache
def _int4_unpackable() -> bool:
    return int4_layout_is_known()
