"""Which entries of a parameter are zero for good."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.forms.component import Component, component
from fxcompress.forms.layout import WeightLayout


@component("sparsity-mask")
@dataclass(frozen=True, eq=False)
class SparsityMask(Component):
    """The mask that a pruned parameter owns: later passes keep its zeros.

    Args:
        keep: bool, shape of the parameter: False where the value is zero.
        perm, batch_dims, row_dims: The parameter's :class:`WeightLayout`, along whose inputs groups run.
        n, m: At most n of every m consecutive inputs are kept, the last group of a row being shorter where m
            does not divide it. 0, 0: no such pattern.

    Raises:
        FormatError: ``keep`` is not bool, the pattern is impossible, or ``keep`` does not follow it.

    Example:
        >>> keep = torch.tensor([[True, True, False, False]])
        >>> SparsityMask(keep, (0, 1), 0, 1, 2, 4).describe()
        '2:4'
    """

    keep: Tensor
    perm: tuple[int, ...]
    batch_dims: int = 0
    row_dims: int = 1
    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        if self.keep.dtype != torch.bool:
            raise FormatError(f"SparsityMask: keep has dtype {self.keep.dtype}, expected torch.bool.")
        if (self.n, self.m) != (0, 0) and not 0 < self.n < self.m:
            raise FormatError(f"SparsityMask: pattern {self.n}:{self.m}, expected 0 < n < m.")
        over = groups_over(self.matrix, self.n, self.m) if self.m else 0
        if over:
            raise FormatError(f"SparsityMask: {over} groups of {self.m} inputs keep more than {self.n}.")

    @property
    def layout(self) -> WeightLayout:
        """The parameter's canonical view."""
        return WeightLayout(tuple(self.keep.shape), self.perm, self.batch_dims, self.row_dims)

    @property
    def matrix(self) -> Tensor:
        """``keep`` as ``[B, N, K]``."""
        return self.layout.to_matrix(self.keep)

    @property
    def pruned(self) -> int:
        """Number of entries that are zero."""
        return self.keep.numel() - int(self.keep.sum())

    def broken_by(self, value: Tensor) -> int:
        """How many pruned entries ``value``, of the parameter's shape, fills."""
        return int(((value != 0) & ~self.keep.to(value.device)).sum())

    def describe(self) -> str:
        """E.g. ``"2:4"`` or ``"50.0% zeros"``."""
        if self.m:
            return f"{self.n}:{self.m}"
        return f"{self.pruned / max(1, self.keep.numel()):.1%} zeros"


def groups_over(matrix: Tensor, n: int, m: int) -> int:
    """How many groups of ``m`` inputs of ``[..., K]`` (bool, or values) have more than ``n`` non-zeros."""
    kept = F.pad((matrix != 0).to(torch.int32), (0, -matrix.shape[-1] % m))
    return int((kept.unflatten(-1, (-1, m)).sum(-1) > n).sum())
