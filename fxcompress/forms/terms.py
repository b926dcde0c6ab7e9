"""Weight terms: the summands of a weight site's normal form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats.floating import FloatFormat
from fxcompress.formats.integer import IntFormat
from fxcompress.formats.packing import packed_width
from fxcompress.forms.component import Component, component
from fxcompress.forms.emit import Eager, Emit
from fxcompress.forms.layout import WeightLayout


@dataclass(frozen=True, eq=False)
class WeightTerm(Component):
    """One summand of a site's weight. Subclasses give :meth:`emit`, the parameter-shaped value."""

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """Describe the term's value, of the parameter's shape; see :mod:`fxcompress.forms.emit`."""
        raise FormatError(f"{type(self).__name__} does not implement emit()")

    def emit_rows(self, indices: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """Describe a look-up of rows that reads only them; None (the default) when the term has none."""
        return None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The term as a tensor of the parameter's shape."""
        import fxcompress.ops  # noqa: F401  (registers the operators)

        value: Tensor = self.emit(dtype, Eager(self))
        return value

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        raise FormatError(f"{type(self).__name__} does not implement parameter_shape")

    @property
    def multiplications(self) -> int:
        """Products of numbers per row of inputs: those of a dense matrix unless a kind needs fewer."""
        return math.prod(self.parameter_shape)

    @property
    def factored(self) -> bool:
        """Whether the term computes with factors (:meth:`multiply`) instead of a weight of its own."""
        return False

    def multiply(self, x: Any, bias: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """Describe ``x·Wᵀ + bias`` without W; only asked for when :attr:`factored`.

        Args:
            x: ``[..., K]``, K being the columns of the term's layout.
            bias: ``[N]``, or None.
            dtype: Of the factors' values.
            emit: Where the calls go.
        """
        raise FormatError(f"{type(self).__name__} does not implement multiply()")

    def convolve(self, call: Mapping[str, Any], target: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """Describe the convolution ``target`` without its kernel; None when the term has no factors for it.

        Args:
            call: The call's arguments by schema name, in order; ``weight`` is to be replaced.
            target: The operator.
            dtype: Of the factors' values.
            emit: Where the calls go.
        """
        return None


@component("quantized-weight")
@dataclass(frozen=True, eq=False)
class QuantizedWeight(WeightTerm):
    """Dense integer codes with scales: ``value = scale · (code − zero)``.

    Args:
        bits: Width of one code, 2…8.
        symmetric: Codes are unsigned with the fixed zero-point ``2**(bits-1)``; ``zero`` is None then.
        group_size: Consecutive inputs that share a scale; 0 = one scale per row; -1 = one per matrix.
        shape, perm, batch_dims, row_dims: The :class:`WeightLayout`.
        codes: ``[B, N, packed_width(K, bits)]`` uint8, little-endian bit stream per row.
        scale: ``[B, N, G]`` (``[B, 1, 1]`` per matrix), G = ceil(K / group_size) or 1.
        zero: uint8, shape of ``scale``, or None when symmetric.

    Raises:
        FormatError: a tensor's shape or dtype does not follow from the other fields.
    """

    bits: int
    symmetric: bool
    group_size: int
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    batch_dims: int
    row_dims: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __post_init__(self) -> None:
        batch, rows, columns = self.layout.matrix_shape
        scales = self.format.scale_shape(batch, rows, columns)
        check_tensor("codes", self.codes, (batch, rows, packed_width(columns, self.bits)), torch.uint8)
        check_tensor("scale", self.scale, scales, self.format.scale_dtype)
        if self.symmetric != (self.zero is None):
            raise FormatError("QuantizedWeight: zero is given exactly when symmetric is false.")
        if self.zero is not None:
            check_tensor("zero", self.zero, scales, torch.uint8)

    @property
    def layout(self) -> WeightLayout:
        """The parameter's canonical view."""
        return WeightLayout(self.shape, self.perm, self.batch_dims, self.row_dims)

    @property
    def format(self) -> IntFormat:
        """The number format of the codes."""
        return IntFormat(bits=self.bits, symmetric=self.symmetric, group_size=self.group_size)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        return self.shape

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """Dequantize to the parameter's shape."""
        return emit.call(
            torch.ops.fxcompress.dequantize_weight.default,
            emit.tensor("codes"),
            emit.tensor("scale"),
            emit.tensor("zero") if self.zero is not None else None,
            self.bits,
            self.group_size,
            list(self.shape),
            list(self.perm),
            self.batch_dims,
            self.row_dims,
            dtype,
        )

    def emit_rows(self, indices: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """See :meth:`WeightTerm.emit_rows`; a table stored transposed has no rows to read."""
        if self.perm != (0, 1):
            return None
        tensors = (
            emit.tensor("codes"),
            emit.tensor("scale"),
            emit.tensor("zero") if self.zero is not None else None,
        )
        target = torch.ops.fxcompress.quantized_embedding.default
        return emit.call(target, indices, *tensors, self.bits, self.group_size, self.shape[1], dtype)

    def describe(self) -> str:
        """E.g. ``"int4 asym g64"``."""
        group = {0: "per row", -1: "per matrix"}.get(self.group_size, f"g{self.group_size}")
        return f"int{self.bits} {'sym' if self.symmetric else 'asym'} {group}"


@component("float-weight")
@dataclass(frozen=True, eq=False)
class FloatWeight(WeightTerm):
    """Dense 8-bit floating-point codes with scales: ``value = scale · code``.

    Args:
        format_kind, block_rows, block_columns: The :class:`~fxcompress.formats.FloatFormat`.
        shape, perm, batch_dims, row_dims: The :class:`WeightLayout`.
        codes: ``[B, N, K]`` float8_e4m3fn or float8_e5m2.
        scale: ``[B, ⌈N/block_rows⌉, ⌈K/block_columns⌉]`` float32; a block size of 0 means one block.

    Raises:
        FormatError: a tensor's shape or dtype does not follow from the other fields.
    """

    format_kind: str
    block_rows: int
    block_columns: int
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    batch_dims: int
    row_dims: int
    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        size = self.layout.matrix_shape
        check_tensor("codes", self.codes, size, self.format.dtype, "FloatWeight")
        check_tensor("scale", self.scale, self.format.scale_shape(*size), torch.float32, "FloatWeight")

    @property
    def layout(self) -> WeightLayout:
        """The parameter's canonical view."""
        return WeightLayout(self.shape, self.perm, self.batch_dims, self.row_dims)

    @property
    def format(self) -> FloatFormat:
        """The number format of the codes."""
        return FloatFormat(self.format_kind, self.block_rows, self.block_columns)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        return self.shape

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """Dequantize to the parameter's shape."""
        return emit.call(
            torch.ops.fxcompress.dequantize_float_weight.default,
            emit.tensor("codes"),
            emit.tensor("scale"),
            self.block_rows,
            self.block_columns,
            list(self.shape),
            list(self.perm),
            self.batch_dims,
            self.row_dims,
            dtype,
        )

    def describe(self) -> str:
        """E.g. ``"fp8-e4m3 per row"``."""
        return self.format.describe()


def check_tensor(
    field: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str = "QuantizedWeight"
) -> None:
    """Refuse a tensor of another shape or dtype; ``what`` names the component."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise FormatError(
            f"{what}: {field} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}."
        )
