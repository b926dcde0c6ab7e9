"""Activation quantizers of a site's normal form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats.floating import FLOAT_DTYPES
from fxcompress.forms.component import Component, component
from fxcompress.forms.emit import Emit


@dataclass(frozen=True, eq=False)
class ActivationQuantizer(Component):
    """Base of activation quantizers.

    Subclasses give :meth:`emit`; integer codes are signed int8 for 8 bits and fewer.
    """

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """Describe the quantized and dequantized ``x: [..., K]``, in ``dtype``, the dtype of ``x``.

        See :mod:`fxcompress.forms.emit`.
        """
        raise FormatError(f"{type(self).__name__} does not implement emit()")


@component("dynamic-per-token")
@dataclass(frozen=True, eq=False)
class DynamicPerToken(ActivationQuantizer):
    """Symmetric, one scale per token (all leading dimensions), computed at run time.

    ``s = max|x| / (2**(bits-1) - 1)``; a token of zeros gets s = 1.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"DynamicPerToken: bits={self.bits}, expected 2…8.")

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """Scale found from ``x`` itself."""
        ops = torch.ops.fxcompress
        q, scale = emit.call(ops.quantize_per_token.default, x, self.bits)
        return emit.call(ops.dequantize_activation.default, q, scale, None, dtype)

    def describe(self) -> str:
        """E.g. ``"int8 activations per token"``."""
        return f"int{self.bits} activations per token"


@component("dynamic-per-group")
@dataclass(frozen=True, eq=False)
class DynamicPerGroup(ActivationQuantizer):
    """Symmetric, one scale per token and group of neighbouring channels, computed at run time.

    Args:
        bits: Code width, 2…8.
        group_size: Channels that share a scale; the last group of a token may be smaller.
    """

    bits: int = 8
    group_size: int = 64

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"DynamicPerGroup: bits={self.bits}, expected 2…8.")
        if self.group_size < 1:
            raise FormatError(f"DynamicPerGroup: group_size={self.group_size}, expected at least 1.")

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """Scales found from ``x`` itself."""
        ops = torch.ops.fxcompress
        q, scale = emit.call(ops.quantize_per_group.default, x, self.bits, self.group_size)
        return emit.call(ops.dequantize_per_group.default, q, scale, self.group_size, dtype)

    def describe(self) -> str:
        """E.g. ``"int8 activations per token g64"``."""
        return f"int{self.bits} activations per token g{self.group_size}"


@component("static-per-tensor")
@dataclass(frozen=True, eq=False)
class StaticPerTensor(ActivationQuantizer):
    """One calibrated scale and zero-point: ``q = clamp(round(x / scale) + zero)`` on signed codes.

    Args:
        bits: Code width, 2…8.
        scale: 0-d float32, positive.
        zero: 0-d int32, signed zero-point (0 when symmetric).

    Raises:
        FormatError: ``bits`` is out of range, or a tensor's shape or dtype differs.
    """

    bits: int
    scale: Tensor
    zero: Tensor

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"StaticPerTensor: bits={self.bits}, expected 2…8.")
        for field, tensor, dtype in (
            ("scale", self.scale, torch.float32),
            ("zero", self.zero, torch.int32),
        ):
            if tensor.dim() != 0 or tensor.dtype != dtype:
                raise FormatError(
                    f"StaticPerTensor: {field} is {tuple(tensor.shape)} {tensor.dtype}, expected () {dtype}."
                )

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """Calibrated scale and zero-point."""
        ops = torch.ops.fxcompress
        scale, zero = emit.tensor("scale"), emit.tensor("zero")
        q = emit.call(ops.quantize_per_tensor.default, x, scale, zero, self.bits)
        return emit.call(ops.dequantize_activation.default, q, scale, zero, dtype)

    def describe(self) -> str:
        """E.g. ``"int8 activations static"``."""
        return f"int{self.bits} activations static"


@component("static-per-cluster")
@dataclass(frozen=True, eq=False)
class StaticPerCluster(ActivationQuantizer):
    """Calibrated scale and zero-point per cluster of neighbouring channels, on signed codes.

    Args:
        bits: Code width, 2…8.
        ends: ``[C]`` int64, ascending: cluster c holds the channels ``ends[c-1] … ends[c]-1``.
        scale: ``[C]`` float32, positive.
        zero: ``[C]`` int32, signed zero-points.

    Raises:
        FormatError: ``bits`` is out of range, or a tensor's shape or dtype differs.
    """

    bits: int
    ends: Tensor
    scale: Tensor
    zero: Tensor

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"StaticPerCluster: bits={self.bits}, expected 2…8.")
        clusters = self.ends.numel()
        for field, dtype in (("ends", torch.int64), ("scale", torch.float32), ("zero", torch.int32)):
            tensor: Tensor = getattr(self, field)
            if tuple(tensor.shape) != (clusters,) or tensor.dtype != dtype or not clusters:
                raise FormatError(
                    f"StaticPerCluster: {field} is {tuple(tensor.shape)} {tensor.dtype}, expected"
                    f" ({clusters or 'C'},) {dtype}."
                )

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """Calibrated scales and zero-points."""
        ops = torch.ops.fxcompress
        scale, zero, ends = emit.tensor("scale"), emit.tensor("zero"), emit.tensor("ends")
        q = emit.call(ops.quantize_per_cluster.default, x, scale, zero, ends, self.bits)
        return emit.call(ops.dequantize_per_cluster.default, q, scale, zero, ends, dtype)

    def describe(self) -> str:
        """E.g. ``"int8 activations static, 32 clusters"``."""
        return f"int{self.bits} activations static, {self.ends.numel()} clusters"


@component("float-per-token")
@dataclass(frozen=True, eq=False)
class FloatPerToken(ActivationQuantizer):
    """8-bit floating point, one scale per token, computed at run time: ``s = max|x| / largest code``.

    The scale is at least ``1 / (512 · largest code)``, as in the 8-bit floating-point recipes of inference
    engines: a token of tiny values does not become a token of large codes.

    Args:
        format_kind: ``"e4m3"`` or ``"e5m2"``.
    """

    format_kind: str = "e4m3"

    def __post_init__(self) -> None:
        _check_kind("FloatPerToken", self.format_kind)

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """Scale found from ``x`` itself."""
        ops = torch.ops.fxcompress
        q, scale = emit.call(ops.quantize_float_per_token.default, x, FLOAT_DTYPES[self.format_kind])
        return emit.call(ops.dequantize_float_activation.default, q, scale, dtype)

    def describe(self) -> str:
        """E.g. ``"fp8-e4m3 activations per token"``."""
        return f"fp8-{self.format_kind} activations per token"


@component("float-per-tensor")
@dataclass(frozen=True, eq=False)
class FloatPerTensor(ActivationQuantizer):
    """8-bit floating point with one calibrated scale; greater magnitudes saturate.

    Args:
        format_kind: ``"e4m3"`` or ``"e5m2"``.
        scale: 0-d float32, positive.
    """

    format_kind: str
    scale: Tensor

    def __post_init__(self) -> None:
        _check_kind("FloatPerTensor", self.format_kind)
        if self.scale.dim() != 0 or self.scale.dtype != torch.float32:
            raise FormatError(
                f"FloatPerTensor: scale is {tuple(self.scale.shape)} {self.scale.dtype}, expected () float32."
            )

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """Calibrated scale."""
        ops = torch.ops.fxcompress
        scale = emit.tensor("scale")
        q = emit.call(ops.quantize_float_per_tensor.default, x, scale, FLOAT_DTYPES[self.format_kind])
        return emit.call(ops.dequantize_float_activation.default, q, scale, dtype)

    def describe(self) -> str:
        """E.g. ``"fp8-e4m3 activations static"``."""
        return f"fp8-{self.format_kind} activations static"


def _check_kind(what: str, kind: str) -> None:
    if kind not in FLOAT_DTYPES:
        raise FormatError(f"{what}: format_kind={kind!r}, expected {' or '.join(map(repr, FLOAT_DTYPES))}.")
