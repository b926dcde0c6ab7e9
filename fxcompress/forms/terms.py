"""Weight terms: the summands of a linear site's normal form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats.integer import IntFormat
from fxcompress.formats.packing import packed_width
from fxcompress.forms.component import Component, component
from fxcompress.forms.layout import WeightLayout


@dataclass(frozen=True, eq=False)
class WeightTerm(Component):
    """One summand of a site's weight. Subclasses give :meth:`dense`, the parameter-shaped value."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The term as a tensor of the parameter's shape."""
        raise FormatError(f"{type(self).__name__} does not implement dense()")

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        raise FormatError(f"{type(self).__name__} does not implement parameter_shape")


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
        _check("codes", self.codes, (batch, rows, packed_width(columns, self.bits)), torch.uint8)
        _check("scale", self.scale, scales, self.format.scale_dtype)
        if self.symmetric != (self.zero is None):
            raise FormatError("QuantizedWeight: zero is given exactly when symmetric is false.")
        if self.zero is not None:
            _check("zero", self.zero, scales, torch.uint8)

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

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Dequantize to the parameter's shape."""
        from fxcompress.ops.weight import dequantize_weight

        return dequantize_weight(self, dtype)


def _check(field: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise FormatError(
            f"QuantizedWeight: {field} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}."
        )
