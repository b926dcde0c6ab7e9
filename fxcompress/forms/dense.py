"""Plain numbers as a term: a factor that no pass has rounded, or a sparse weight where no kernel takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.forms.component import component
from fxcompress.forms.emit import Emit
from fxcompress.forms.terms import WeightTerm


@component("dense-weight")
@dataclass(frozen=True, eq=False)
class DenseWeight(WeightTerm):
    """Plain numbers.

    Args:
        values: Floating, of the shape that the term stands for.

    Raises:
        FormatError: the values are not floating-point numbers.
    """

    values: Tensor

    def __post_init__(self) -> None:
        if not self.values.is_floating_point():
            raise FormatError("DenseWeight: values is no floating-point tensor.")

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return tuple(self.values.shape)

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """The values in ``dtype``."""
        values = emit.tensor("values")
        return values if self.values.dtype == dtype else emit.call(torch.ops.aten.to.dtype, values, dtype)

    def describe(self) -> str:
        """E.g. ``"float32"``."""
        return str(self.values.dtype).removeprefix("torch.")
