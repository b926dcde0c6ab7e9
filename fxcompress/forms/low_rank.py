"""A weight as the product of two thin matrices, each a weight term of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.forms.component import component
from fxcompress.forms.dense import DenseWeight
from fxcompress.forms.emit import Emit, Within
from fxcompress.forms.layout import WeightLayout
from fxcompress.forms.terms import WeightTerm

aten = torch.ops.aten
_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@component("low-rank")
@dataclass(frozen=True, eq=False)
class LowRank(WeightTerm):
    """``W = u·v``: a linear layer becomes two, a convolution one with r outputs and a 1×1 one behind it.

    Args:
        shape, perm, batch_dims, row_dims: The :class:`WeightLayout` of the parameter.
        u: ``[N, r]`` (``[B, N, r]`` for a batch of matrices): a term of that shape.
        v: ``[r, K]`` (``[B, r, K]``).

    Raises:
        FormatError: the factors' shapes do not follow from the layout, or a factor is no weight term.

    Example:
        >>> u, v = torch.randn(8, 2), torch.randn(2, 6)
        >>> term = LowRank.of(WeightLayout.rows((8, 6)), u, v)
        >>> term.rank, torch.allclose(term.dense(torch.float32), u @ v)
        (2, True)
    """

    shape: tuple[int, ...]
    perm: tuple[int, ...]
    batch_dims: int
    row_dims: int
    u: WeightTerm
    v: WeightTerm

    def __post_init__(self) -> None:
        for field in ("u", "v"):
            if not isinstance(getattr(self, field), WeightTerm):
                raise FormatError(f"LowRank: {field} is no weight term.")
        batch, rows, columns = self.layout.matrix_shape
        u, v = tuple(self.u.parameter_shape), tuple(self.v.parameter_shape)
        rank = u[-1] if u else 0
        lead = (batch,) if self.batch_dims else ()
        if u != (*lead, rows, rank) or v != (*lead, rank, columns) or rank < 1:
            raise FormatError(
                f"LowRank: u is {u} and v is {v}, expected {(*lead, rows, 'r')} and {(*lead, 'r', columns)}."
            )

    @classmethod
    def of(cls, layout: WeightLayout, u: Tensor | WeightTerm, v: Tensor | WeightTerm) -> LowRank:
        """The product of two factors, as tensors or as terms, for a parameter of this layout."""
        left, right = (f if isinstance(f, WeightTerm) else DenseWeight(f) for f in (u, v))
        return cls(layout.shape, layout.perm, layout.batch_dims, layout.row_dims, left, right)

    @property
    def layout(self) -> WeightLayout:
        """The parameter's canonical view."""
        return WeightLayout(self.shape, self.perm, self.batch_dims, self.row_dims)

    @property
    def rank(self) -> int:
        """Columns of u, rows of v."""
        return self.u.parameter_shape[-1]

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        return self.shape

    @property
    def multiplications(self) -> int:
        """``r·(N + K)`` per matrix."""
        return self.u.multiplications + self.v.multiplications

    @property
    def factored(self) -> bool:
        """True for a single matrix; a batch of matrices is multiplied out."""
        return self.batch_dims == 0

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """The product in the parameter's shape, for uses that are no product with an activation."""
        u, v = self.u.emit(dtype, Within(emit, "u")), self.v.emit(dtype, Within(emit, "v"))
        value = emit.call(aten.matmul.default, u, v)
        permuted, order = self.layout.permuted_shape, tuple(range(len(self.shape)))
        if tuple(permuted) != tuple(self.layout.matrix_shape[0 if self.batch_dims else 1 :]):
            value = emit.call(aten.reshape.default, value, list(permuted))
        if self.perm != order:
            value = emit.call(aten.permute.default, value, sorted(order, key=self.perm.__getitem__))
        return value

    def multiply(self, x: Any, bias: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """``(x·vᵀ)·uᵀ + bias``."""
        inner = emit.call(aten.linear.default, x, self.v.emit(dtype, Within(emit, "v")))
        u = self.u.emit(dtype, Within(emit, "u"))
        return emit.call(aten.linear.default, inner, u, *(() if bias is None else (bias,)))

    def convolve(self, call: Mapping[str, Any], target: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """R outputs with the original window, then 1×1; None for grouped and transposed convolutions."""
        plain = self.perm == tuple(range(len(self.shape))) and (self.batch_dims, self.row_dims) == (0, 1)
        if not plain or call["groups"] != 1 or call.get("transposed"):
            return None
        window = len(self.shape) - 2
        v = self.v.emit(dtype, Within(emit, "v"))
        v = emit.call(aten.reshape.default, v, [self.rank, *self.shape[1:]])
        inner = emit.call(target, *({**call, "weight": v, "bias": None}).values())
        u = self.u.emit(dtype, Within(emit, "u"))
        u = emit.call(aten.reshape.default, u, [self.shape[0], self.rank, *([1] * window)])
        return emit.call(_CONVOLUTIONS[window], inner, u, call["bias"])

    def describe(self) -> str:
        """E.g. ``"rank 64 (float32)"``."""
        kinds = dict.fromkeys((self.u.describe(), self.v.describe()))
        return f"rank {self.rank} ({', '.join(kinds)})"
