"""A weight term whose codes are indices into a table of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats.codebook import CodebookFormat
from fxcompress.formats.packing import packed_width
from fxcompress.forms.component import component
from fxcompress.forms.layout import WeightLayout
from fxcompress.forms.terms import WeightTerm, check_tensor

if TYPE_CHECKING:
    from fxcompress.forms.emit import Emit


@component("codebook-weight")
@dataclass(frozen=True, eq=False)
class CodebookWeight(WeightTerm):
    """Dense codes that index a table: ``value = scale · table[code]``.

    Args:
        bits: Width of one code, 2…8.
        group_size: Consecutive inputs that share a scale; 0 = one scale per row, or no scales at all.
        shape, perm, batch_dims, row_dims: The :class:`WeightLayout`.
        codes: ``[B, N, packed_width(K, bits)]`` uint8, little-endian bit stream per row.
        table: ``[1, 1, 2**bits]`` float32, for all rows; or ``[B, N, 2**bits]`` bfloat16, one per row.
        scale: ``[B, N, G]``, bfloat16 for groups, else float32; or None.

    Raises:
        FormatError: a tensor's shape or dtype does not follow from the other fields.
    """

    bits: int
    group_size: int
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    batch_dims: int
    row_dims: int
    codes: Tensor
    table: Tensor
    scale: Tensor | None

    def __post_init__(self) -> None:
        batch, rows, columns = self.layout.matrix_shape
        fmt, what = self.format, "CodebookWeight"
        check_tensor("codes", self.codes, (batch, rows, packed_width(columns, self.bits)), torch.uint8, what)
        check_tensor("table", self.table, fmt.table_shape(batch, rows), fmt.table_dtype, what)
        if self.scale is None and self.group_size:
            raise FormatError(f"CodebookWeight: group_size={self.group_size} without scales, expected 0.")
        shape = fmt.scale_shape(batch, rows, columns)
        if self.scale is not None and shape is not None:
            check_tensor("scale", self.scale, shape, fmt.scale_dtype, what)

    @property
    def layout(self) -> WeightLayout:
        """The parameter's canonical view."""
        return WeightLayout(self.shape, self.perm, self.batch_dims, self.row_dims)

    @property
    def per_row(self) -> bool:
        """Whether every row has a table of its own."""
        return self.table.dtype == torch.bfloat16

    @property
    def format(self) -> CodebookFormat:
        """The number format of the codes."""
        return CodebookFormat(self.bits, None if self.scale is None else self.group_size, self.per_row)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        return self.shape

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """Dequantize to the parameter's shape."""
        return emit.call(
            torch.ops.fxcompress.dequantize_codebook.default,
            *self._tensors(emit),
            self.bits,
            self.group_size,
            list(self.shape),
            list(self.perm),
            self.batch_dims,
            self.row_dims,
            dtype,
        )

    def emit_rows(self, indices: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """See :meth:`WeightTerm.emit_rows`."""
        if self.perm != (0, 1):
            return None
        target = torch.ops.fxcompress.codebook_embedding.default
        tensors = self._tensors(emit)
        return emit.call(target, indices, *tensors, self.bits, self.group_size, self.shape[1], dtype)

    def _tensors(self, emit: Emit) -> tuple[Any, Any, Any]:
        scale = None if self.scale is None else emit.tensor("scale")
        return emit.tensor("codes"), emit.tensor("table"), scale

    def describe(self) -> str:
        """E.g. ``"4-bit codes, one table, group 64"``."""
        return self.format.describe()
