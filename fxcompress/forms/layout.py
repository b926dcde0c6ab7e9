"""How a parameter of any rank is read as matrices ``[B, N, K]``: B batches of N outputs × K inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fxcompress.errors import FormatError


@dataclass(frozen=True)
class WeightLayout:
    """The canonical view of a parameter.

    The parameter is permuted by ``perm``; the first ``batch_dims`` permuted dimensions become B, the next
    ``row_dims`` become N (outputs: one quantization channel each), the rest become K (the reduction).

    Examples of layouts: linear ``[N, K]`` → ``perm=(0, 1)``; Conv1D/addmm ``[K, N]`` → ``perm=(1, 0)``;
    convolution ``[O, I, kh, kw]`` → ``perm=(0, 1, 2, 3), row_dims=1``; transposed convolution
    ``[I, O, kh, kw]`` → ``perm=(1, 0, 2, 3)``; experts ``[E, K, N]`` → ``perm=(0, 2, 1), batch_dims=1``.

    Args:
        shape: Shape of the parameter as stored in the model.
        perm: Permutation of its dimensions into (batch…, rows…, reduction…) order.
        batch_dims: Number of leading permuted dimensions that are independent matrices. Default 0.
        row_dims: Number of permuted dimensions that are outputs. Default 1.

    Raises:
        FormatError: ``perm`` is not a permutation, or the dimension counts do not fit the rank.
    """

    shape: tuple[int, ...]
    perm: tuple[int, ...]
    batch_dims: int = 0
    row_dims: int = 1

    def __post_init__(self) -> None:
        if sorted(self.perm) != list(range(len(self.shape))):
            raise FormatError(
                f"WeightLayout: perm {self.perm} is no permutation of {len(self.shape)} dimensions."
            )
        if self.batch_dims < 0 or self.row_dims < 1 or self.batch_dims + self.row_dims > len(self.shape):
            raise FormatError(
                f"WeightLayout: batch_dims={self.batch_dims}, row_dims={self.row_dims} do not fit shape"
                f" {self.shape}."
            )

    @classmethod
    def rows(cls, shape: tuple[int, ...] | list[int]) -> WeightLayout:
        """The identity layout: first dimension is N, all others flatten into K."""
        return cls(tuple(shape), tuple(range(len(shape))))

    @property
    def permuted_shape(self) -> tuple[int, ...]:
        """Shape after the permutation."""
        return tuple(self.shape[d] for d in self.perm)

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """The canonical ``(B, N, K)``."""
        permuted = self.permuted_shape
        split = self.batch_dims + self.row_dims
        return (
            math.prod(permuted[: self.batch_dims]),
            math.prod(permuted[self.batch_dims : split]),
            math.prod(permuted[split:]),
        )

    def to_matrix(self, parameter: Tensor) -> Tensor:
        """Read ``parameter`` (shape ``self.shape``) as ``[B, N, K]``."""
        if tuple(parameter.shape) != self.shape:
            raise FormatError(
                f"WeightLayout: parameter has shape {tuple(parameter.shape)}, expected {self.shape}."
            )
        return parameter.permute(self.perm).reshape(self.matrix_shape)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of :meth:`to_matrix`."""
        inverse = sorted(range(len(self.perm)), key=self.perm.__getitem__)
        return matrix.reshape(self.permuted_shape).permute(inverse)
