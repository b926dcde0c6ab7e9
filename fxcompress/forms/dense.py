"""A dense weight as a term: what a sparse one is computed as where no kernel takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.forms.component import component
from fxcompress.forms.emit import Emit
from fxcompress.forms.terms import WeightTerm


@component("dense-weight")
@dataclass(frozen=True, eq=False)
class DenseWeight(WeightTerm):
    """A value of the parameter's shape.

    Args:
        value: The parameter.
    """

    value: Tensor

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        return tuple(self.value.shape)

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """The value."""
        value = emit.tensor("value")
        return value if self.value.dtype == dtype else emit.call(torch.ops.aten.to.dtype, value, dtype)

    def describe(self) -> str:
        """E.g. ``"dense float32"``."""
        return f"dense {str(self.value.dtype).removeprefix('torch.')}"
