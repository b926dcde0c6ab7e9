"""Weight terms in the layouts of CUDA kernels: 2:4 as CUTLASS takes it, and tiles of 32-bit words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats.semi_structured import semi_structured_problem
from fxcompress.forms.component import component
from fxcompress.forms.emit import Emit
from fxcompress.forms.layout import WeightLayout
from fxcompress.forms.terms import WeightTerm

ops = torch.ops.fxcompress
_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class _MatrixTerm(WeightTerm):
    """A term of one matrix.

    Args:
        shape: Shape of the parameter, two dimensions.
        perm: ``(0, 1)`` when it is stored ``[N, K]``, ``(1, 0)`` when ``[K, N]``.
    """

    shape: tuple[int, ...]
    perm: tuple[int, ...]

    @property
    def layout(self) -> WeightLayout:
        """The parameter's canonical view."""
        return WeightLayout(self.shape, self.perm)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        return self.shape

    def _turned(self, matrix: Any, emit: Emit) -> Any:
        return matrix if self.perm == (0, 1) else emit.call(torch.ops.aten.t.default, matrix)

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or sorted(self.perm) != [0, 1]:
            raise FormatError(
                f"{type(self).__name__}: shape {self.shape} and perm {self.perm} are no matrix."
            )


@component("semi-structured-weight")
@dataclass(frozen=True, eq=False)
class SemiStructuredWeight(_MatrixTerm):
    """2:4 values with metadata in CUTLASS's order, see :mod:`fxcompress.formats.semi_structured`.

    Args:
        shape, perm: See above.
        values: ``[N, K / 2]`` float16 or bfloat16.
        meta: ``[N, K / 16]`` int16.

    Raises:
        FormatError: a tensor's shape or dtype does not follow from the shape.
    """

    values: Tensor
    meta: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        _, rows, columns = self.layout.matrix_shape
        problem = semi_structured_problem(rows, columns, self.values.dtype)
        if problem is not None or not self.values.is_floating_point():
            raise FormatError(f"SemiStructuredWeight: {problem or self.values.dtype}.")
        if tuple(self.values.shape) != (rows, columns // 2) or tuple(self.meta.shape) != (
            rows,
            columns // 16,
        ):
            raise FormatError(
                f"SemiStructuredWeight: values {tuple(self.values.shape)} and meta {tuple(self.meta.shape)},"
                f" expected {(rows, columns // 2)} and {(rows, columns // 16)}."
            )
        if self.meta.dtype != torch.int16:
            raise FormatError(f"SemiStructuredWeight: meta is {self.meta.dtype}, expected torch.int16.")

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """The dense matrix."""
        dense = emit.call(
            ops.semi_structured_dense.default, emit.tensor("values"), emit.tensor("meta"), dtype
        )
        return self._turned(dense, emit)

    def describe(self) -> str:
        """E.g. ``"2:4 CUTLASS float16"``."""
        return f"2:4 CUTLASS {str(self.values.dtype).removeprefix('torch.')}"


@component("tiled-sparse-weight")
@dataclass(frozen=True, eq=False)
class TiledSparseWeight(_MatrixTerm):
    """Entries in tiles of 128 × 64, see :mod:`fxcompress.formats.tiled_sparse`.

    Args:
        shape, perm: See above.
        value_dtype: ``"float16"`` or ``"bfloat16"``.
        words: ``[W]`` int32.
        offsets: ``[tiles + 2]`` int32.

    Raises:
        FormatError: a tensor's dtype or the number of tiles does not fit.
    """

    value_dtype: str
    words: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        _, rows, columns = self.layout.matrix_shape
        tiles = -(-rows // 256) * 2 * -(-columns // 64)
        if self.value_dtype not in _HALVES:
            raise FormatError(f"TiledSparseWeight: value_dtype={self.value_dtype!r}.")
        good = self.words.dtype == self.offsets.dtype == torch.int32 and self.words.dim() == 1
        if not good or tuple(self.offsets.shape) != (tiles + 2,):
            raise FormatError(
                f"TiledSparseWeight: words {tuple(self.words.shape)} {self.words.dtype}, offsets"
                f" {tuple(self.offsets.shape)} {self.offsets.dtype}, expected int32 and {(tiles + 2,)}."
            )

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """The dense matrix."""
        _, rows, columns = self.layout.matrix_shape
        tensors = (emit.tensor("words"), emit.tensor("offsets"))
        half = _HALVES[self.value_dtype]
        dense = emit.call(ops.tiled_dense.default, *tensors, rows, columns, half, dtype)
        return self._turned(dense, emit)

    def describe(self) -> str:
        """E.g. ``"tiles of float16"``."""
        return f"tiles of {self.value_dtype}"
