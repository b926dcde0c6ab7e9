"""Outlier features: a few input channels that stay unquantized beside an integer product.

x·W  =  (x without outlier channels)·W  +  (outlier channels of x)·W[outlier channels]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.forms.activation import ActivationQuantizer
from fxcompress.forms.component import component
from fxcompress.forms.emit import Emit
from fxcompress.forms.layout import WeightLayout
from fxcompress.forms.terms import WeightTerm

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class SplitQuantizer(ActivationQuantizer):
    """A quantizer whose result is a sum of two parts, so that a product may treat them differently."""

    def split(self, x: Any, dtype: torch.dtype, emit: Emit) -> tuple[Any, Any]:
        """``(dequantized part [..., K], unquantized part)``; what the second is depends on the kind."""
        raise FormatError(f"{type(self).__name__} does not implement split()")


@component("outlier-split")
@dataclass(frozen=True, eq=False)
class OutlierSplit(SplitQuantizer):
    """Outlier features found at run time (LLM.int8()): channels with any ``|x| >= threshold``.

    All tokens of a call count together. Outlier channels are zeroed before the scale of each token is taken,
    and added back unquantized: the second part of :meth:`split` is ``[..., K]``, zero elsewhere.

    Args:
        bits: Code width, 2…8.
        threshold: Positive and finite.
    """

    bits: int
    threshold: float

    def __post_init__(self) -> None:
        _check_bits("OutlierSplit", self.bits)
        if not (0 < self.threshold < math.inf):
            raise FormatError(f"OutlierSplit: threshold={self.threshold}, expected a positive finite number.")

    def split(self, x: Any, dtype: torch.dtype, emit: Emit) -> tuple[Any, Any]:
        """One operator, static shapes."""
        ops = torch.ops.fxcompress
        q, scale, outliers = emit.call(
            ops.quantize_outlier_split.default, x, self.bits, float(self.threshold)
        )
        return emit.call(ops.dequantize_activation.default, q, scale, None, dtype), outliers

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """The sum of both parts."""
        return emit.call(aten.add.Tensor, *self.split(x, dtype, emit))

    def describe(self) -> str:
        """E.g. ``"int8 activations per token, outliers from 6"``."""
        return f"int{self.bits} activations per token, outliers from {self.threshold:g}"


@component("fixed-outliers")
@dataclass(frozen=True, eq=False)
class FixedOutliers(SplitQuantizer):
    """Outlier features chosen in calibration; the second part of :meth:`split` is ``x[..., columns]``.

    Args:
        bits: Code width, 2…8.
        columns: ``[k]`` int64, ascending, k ≥ 1.
    """

    bits: int
    columns: Tensor

    def __post_init__(self) -> None:
        _check_bits("FixedOutliers", self.bits)
        _check_columns("FixedOutliers", self.columns)

    def split(self, x: Any, dtype: torch.dtype, emit: Emit) -> tuple[Any, Any]:
        """Codes of the rest, per token, and the chosen channels."""
        ops = torch.ops.fxcompress
        columns = emit.tensor("columns")
        rest = emit.call(aten.index_fill.int_Scalar, x, -1, columns, 0)
        q, scale = emit.call(ops.quantize_per_token.default, rest, self.bits)
        dense = emit.call(ops.dequantize_activation.default, q, scale, None, dtype)
        return dense, emit.call(aten.index_select.default, x, -1, columns)

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """The codes' values with the chosen channels put back."""
        dense, chosen = self.split(x, dtype, emit)
        return emit.call(aten.index_copy.default, dense, -1, emit.tensor("columns"), chosen)

    def describe(self) -> str:
        """E.g. ``"int8 activations per token, 16 outlier columns"``."""
        return f"int{self.bits} activations per token, {self.columns.numel()} outlier columns"


@component("outlier-columns")
@dataclass(frozen=True, eq=False)
class OutlierColumns(WeightTerm):
    """Columns of a matrix in full precision; zero elsewhere.

    Args:
        shape: Shape of the parameter, two dimensions.
        perm: ``(0, 1)`` when it is stored ``[N, K]``, ``(1, 0)`` when ``[K, N]``.
        columns: ``[k]`` int64, ascending.
        values: ``[N, k]`` floating.

    Raises:
        FormatError: a tensor's shape or dtype does not follow from the other fields.
    """

    shape: tuple[int, ...]
    perm: tuple[int, ...]
    columns: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        _check_columns("OutlierColumns", self.columns)
        if len(self.shape) != 2 or sorted(self.perm) != [0, 1]:
            raise FormatError(f"OutlierColumns: shape {self.shape} and perm {self.perm} are no matrix.")
        expected = (self.layout.matrix_shape[1], self.columns.numel())
        if tuple(self.values.shape) != expected or not self.values.is_floating_point():
            raise FormatError(
                f"OutlierColumns: values is {tuple(self.values.shape)} {self.values.dtype}, expected"
                f" {expected}, floating."
            )

    @property
    def layout(self) -> WeightLayout:
        """The parameter's canonical view."""
        return WeightLayout(self.shape, self.perm)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        return self.shape

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """Zeros with the columns put in."""
        columns, values = emit.tensor("columns"), emit.tensor("values")
        if self.values.dtype != dtype:
            values = emit.call(aten.to.dtype, values, dtype)
        size = list(self.layout.matrix_shape[1:])
        empty = emit.call(aten.new_zeros.default, values, size)
        dense = emit.call(aten.index_copy.default, empty, -1, columns, values)
        return dense if self.perm == (0, 1) else emit.call(aten.t.default, dense)

    def describe(self) -> str:
        """E.g. ``"16 columns float32"``."""
        return f"{self.columns.numel()} columns {str(self.values.dtype).removeprefix('torch.')}"


def _check_bits(what: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise FormatError(f"{what}: bits={bits}, expected 2…8.")


def _check_columns(what: str, columns: Tensor) -> None:
    if columns.dim() != 1 or columns.dtype != torch.int64 or not columns.numel():
        raise FormatError(
            f"{what}: columns is {tuple(columns.shape)} {columns.dtype}, expected a non-empty int64 vector."
        )
