"""Weight terms that store only the entries of a pruned weight, and how these are found again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats.integer import IntFormat, make_term
from fxcompress.formats.packing import packed_width, unpack_codes
from fxcompress.formats.sparse_index import nm_bytes
from fxcompress.forms.component import Component, component
from fxcompress.forms.emit import Eager, Emit
from fxcompress.forms.layout import WeightLayout
from fxcompress.forms.terms import QuantizedWeight, WeightTerm

ops = torch.ops.fxcompress


@dataclass(frozen=True)
class Within:
    """The calls of a component inside another: its tensors lie under ``field``."""

    emit: Emit
    field: str

    def call(self, target: Any, *args: Any) -> Any:
        """See :class:`Emit`."""
        return self.emit.call(target, *args)

    def tensor(self, field: str) -> Any:
        """See :class:`Emit`."""
        return self.emit.tensor(f"{self.field}.{field}")


@dataclass(frozen=True, eq=False)
class SparseIndex(Component):
    """Which entries of ``[B, N, K]`` are stored."""

    def slots(self, size: tuple[int, int, int], emit: Emit) -> Any:
        """``[B, N, K]`` int64: number of the stored value of every element, −1 for zeros."""
        raise FormatError(f"{type(self).__name__} does not implement slots()")

    def check(self, size: tuple[int, int, int], stored: int) -> None:
        """Refuse tensors that do not belong to a matrix of that size with so many stored values."""
        raise FormatError(f"{type(self).__name__} does not implement check()")


@component("nm-index")
@dataclass(frozen=True, eq=False)
class NmIndex(SparseIndex):
    """n positions of every m inputs, each in ``max(2, ⌈log2 m⌉)`` bits.

    Args:
        n, m: The pattern.
        positions: ``[B, N, packed]`` uint8, a bit stream per row.
    """

    n: int
    m: int
    positions: Tensor

    def slots(self, size: tuple[int, int, int], emit: Emit) -> Any:
        """See :class:`SparseIndex`."""
        return emit.call(ops.nm_slots.default, emit.tensor("positions"), self.n, self.m, size[2])

    def check(self, size: tuple[int, int, int], stored: int) -> None:
        """See :class:`SparseIndex`."""
        batch, rows, columns = size
        if not 0 < self.n < self.m <= 256:
            raise FormatError(f"NmIndex: {self.n}:{self.m}, expected 0 < n < m <= 256.")
        expected = (batch, rows, nm_bytes(1, columns, self.n, self.m))
        _check("NmIndex", "positions", self.positions, expected, torch.uint8)
        if stored != batch * rows * -(-columns // self.m) * self.n:
            raise FormatError(f"NmIndex: {stored} stored values do not fit {size} in {self.n}:{self.m}.")

    def describe(self) -> str:
        """E.g. ``"2:4"``."""
        return f"{self.n}:{self.m}"


@component("bitmap-index")
@dataclass(frozen=True, eq=False)
class BitmapIndex(SparseIndex):
    """One bit per element.

    Args:
        bits: ``[B, N, ceil(K / 8)]`` uint8.
    """

    bits: Tensor

    def slots(self, size: tuple[int, int, int], emit: Emit) -> Any:
        """See :class:`SparseIndex`."""
        return emit.call(ops.bitmap_slots.default, emit.tensor("bits"), size[2])

    def check(self, size: tuple[int, int, int], stored: int) -> None:
        """See :class:`SparseIndex`."""
        _check("BitmapIndex", "bits", self.bits, (*size[:2], packed_width(size[2], 1)), torch.uint8)

    def describe(self) -> str:
        """``"bitmap"``."""
        return "bitmap"


@component("csr-index")
@dataclass(frozen=True, eq=False)
class CsrIndex(SparseIndex):
    """Compressed rows.

    Args:
        pointers: ``[B · N + 1]`` int32.
        columns: ``[nnz]`` int16 or int32.
    """

    pointers: Tensor
    columns: Tensor

    def slots(self, size: tuple[int, int, int], emit: Emit) -> Any:
        """See :class:`SparseIndex`."""
        tensors = (emit.tensor("pointers"), emit.tensor("columns"))
        return emit.call(ops.csr_slots.default, *tensors, size[0], size[2])

    def check(self, size: tuple[int, int, int], stored: int) -> None:
        """See :class:`SparseIndex`."""
        _check("CsrIndex", "pointers", self.pointers, (size[0] * size[1] + 1,), torch.int32)
        if self.columns.dtype not in (torch.int16, torch.int32) or self.columns.dim() != 1:
            raise FormatError(f"CsrIndex: columns is {tuple(self.columns.shape)} {self.columns.dtype}.")

    def describe(self) -> str:
        """``"compressed rows"``."""
        return "compressed rows"


@component("sparse-weight")
@dataclass(frozen=True, eq=False)
class SparseWeight(WeightTerm):
    """Entries in the parameter's own dtype, zeros left out.

    Args:
        shape, perm, batch_dims, row_dims: The :class:`WeightLayout`.
        index: Where they lie in ``[B, N, K]``.
        values: ``[stored]`` floating, in row-major order, at least one.

    Raises:
        FormatError: a tensor's shape or dtype does not follow from the other fields.
    """

    shape: tuple[int, ...]
    perm: tuple[int, ...]
    batch_dims: int
    row_dims: int
    index: SparseIndex
    values: Tensor

    def __post_init__(self) -> None:
        if self.values.dim() != 1 or not self.values.is_floating_point() or not self.values.numel():
            raise FormatError(
                f"SparseWeight: values is {tuple(self.values.shape)} {self.values.dtype}, expected a"
                " non-empty floating vector."
            )
        self.index.check(self.layout.matrix_shape, self.values.numel())

    @property
    def layout(self) -> WeightLayout:
        """The parameter's canonical view."""
        return WeightLayout(self.shape, self.perm, self.batch_dims, self.row_dims)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        return self.shape

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """Zeros with the entries put in."""
        slots = self.index.slots(self.layout.matrix_shape, Within(emit, "index"))
        layout = (list(self.shape), list(self.perm), self.batch_dims, self.row_dims)
        return emit.call(ops.sparse_dense.default, emit.tensor("values"), slots, *layout, dtype)

    def describe(self) -> str:
        """E.g. ``"2:4 float32"``."""
        return f"{self.index.describe()} {str(self.values.dtype).removeprefix('torch.')}"


@component("sparse-quantized-weight")
@dataclass(frozen=True, eq=False)
class SparseQuantizedWeight(WeightTerm):
    """Integer codes of the entries only; elsewhere the code is that of zero.

    Args:
        bits, symmetric, group_size, shape, perm, batch_dims, row_dims, scale, zero: As for
            :class:`QuantizedWeight`.
        index: Where the entries lie in ``[B, N, K]``.
        stored: How many there are, at least one.
        codes: ``[packed_width(stored, bits)]`` uint8, one bit stream in row-major order.

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
    index: SparseIndex
    stored: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __post_init__(self) -> None:
        what = "SparseQuantizedWeight"
        size = self.layout.matrix_shape
        scales = self.format.scale_shape(*size)
        if self.stored < 1:
            raise FormatError(f"{what}: stored={self.stored}, expected at least one.")
        _check(what, "codes", self.codes, (packed_width(self.stored, self.bits),), torch.uint8)
        _check(what, "scale", self.scale, scales, self.format.scale_dtype)
        if self.symmetric != (self.zero is None):
            raise FormatError(f"{what}: zero is given exactly when symmetric is false.")
        if self.zero is not None:
            _check(what, "zero", self.zero, scales, torch.uint8)
        self.index.check(size, self.stored)

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
        slots = self.index.slots(self.layout.matrix_shape, Within(emit, "index"))
        layout = (list(self.shape), list(self.perm), self.batch_dims, self.row_dims)
        return emit.call(
            ops.dequantize_sparse_weight.default,
            *(emit.tensor("codes"), self.stored, slots, emit.tensor("scale")),
            emit.tensor("zero") if self.zero is not None else None,
            *(self.bits, self.group_size, *layout, dtype),
        )

    def expanded(self) -> QuantizedWeight:
        """The same weight with a code for every element."""
        import fxcompress.ops  # noqa: F401  (registers the operators)

        layout = self.layout
        slots = self.index.slots(layout.matrix_shape, Within(Eager(self), "index"))
        codes = unpack_codes(self.codes, self.bits, self.stored)
        full = ops.sparse_codes.default(codes, slots, self.zero, self.bits, self.group_size)
        return make_term(full, self.scale, self.zero, layout, self.format)

    def describe(self) -> str:
        """E.g. ``"2:4 int8 sym per row"``."""
        group = {0: "per row", -1: "per matrix"}.get(self.group_size, f"g{self.group_size}")
        kind = "sym" if self.symmetric else "asym"
        return f"{self.index.describe()} int{self.bits} {kind} {group}"


def _check(what: str, field: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise FormatError(
            f"{what}: {field} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}."
        )
