"""Changes of the basis in which keys and values are quantized; all are undone when they are read."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.forms.component import Component, component

__all__ = ["CacheTransform", "ChannelAffine", "HeadRotation", "PositionRotation"]


@dataclass(frozen=True, eq=False)
class CacheTransform(Component):
    """An invertible map of the channels of a head; ``x: [B, H, T, D]`` float32, ``positions: [T]``."""

    by_position: ClassVar[bool] = False
    """Whether it depends on ``positions``."""

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """What is quantized."""
        raise FormatError(f"{type(self).__name__} does not implement apply()")

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of :meth:`apply`."""
        raise FormatError(f"{type(self).__name__} does not implement undo()")

    def check(self, width: int) -> None:
        """Refuse heads of another width.

        Raises:
            FormatError: the transform is for another number of channels.
        """

    def for_heads(self, name: str, heads: int) -> None:
        """Refuse another number of heads.

        Raises:
            FormatError: the transform is for another number of heads.
        """


@component("cache-rotation")
@dataclass(frozen=True, eq=False)
class HeadRotation(CacheTransform):
    """The Walsh–Hadamard matrix over the channels of a head, orthonormal and its own inverse.

    Where the width is no power of two, over parts as long as its largest factor that is one. It spreads
    outlier channels evenly (Ashkboos et al., 2024, QuaRot, arXiv:2404.00456, section 4).
    """

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x Hᵀ``."""
        size = x.shape[-1] & -x.shape[-1]
        matrix = hadamard(size).to(x.device, x.dtype)
        parts: Tensor = x.unflatten(-1, (-1, size))
        return (parts @ matrix).flatten(-2)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """The same."""
        return self.apply(x, positions)

    def describe(self) -> str:
        """For the report."""
        return "rotated"


@functools.lru_cache(maxsize=16)
def hadamard(size: int) -> Tensor:
    """``[size, size]`` float32, symmetric and orthonormal; ``size`` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix / math.sqrt(size)).float()


@component("cache-affine")
@dataclass(frozen=True, eq=False)
class ChannelAffine(CacheTransform):
    """``(x − shift) / scale``, calibrated per head and channel.

    Args:
        shift: ``[H, D]`` float32.
        scale: ``[H, D]`` float32, positive.

    Raises:
        FormatError: another shape or dtype.
    """

    shift: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        check_per_channel("ChannelAffine", shift=self.shift, scale=self.scale)

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """Centred and of even range."""
        return (x - self.shift.to(x.device)[:, None]) / self.scale.to(x.device)[:, None]

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """Back."""
        return x * self.scale.to(x.device)[:, None] + self.shift.to(x.device)[:, None]

    def check(self, width: int) -> None:
        """One entry per channel."""
        if self.shift.shape[1] != width:
            raise FormatError(f"ChannelAffine: for {self.shift.shape[1]} channels, heads have {width}.")

    def for_heads(self, name: str, heads: int) -> None:
        """One row per head."""
        if self.shift.shape[0] != heads:
            raise FormatError(f"{name}: ChannelAffine for {self.shift.shape[0]} heads, found {heads}.")

    def describe(self) -> str:
        """For the report."""
        return "smoothed"


@component("cache-unrotate")
@dataclass(frozen=True, eq=False)
class PositionRotation(CacheTransform):
    """Takes a rotary embedding off before quantizing and puts it back after.

    Rotation by position p: ``y[d] = cos(p·w[d]) x[d] − sin(p·w[d]) x[partner[d]]``, so the members of a pair
    have opposite frequencies, and a channel that is not rotated has frequency 0. Positions are places in the
    cache: in a left-padded sequence all keys are off by one constant rotation, which costs accuracy but not
    correctness.

    Args:
        partner: ``[D]`` int64, its own inverse.
        frequency: ``[D]`` float64, radians per position.

    Raises:
        FormatError: shapes or dtypes differ, or the pairs are none.
    """

    partner: Tensor
    frequency: Tensor

    by_position: ClassVar[bool] = True

    def __post_init__(self) -> None:
        width = self.partner.numel()
        if self.partner.dtype != torch.int64 or self.partner.dim() != 1:
            raise FormatError(f"PositionRotation: partner is {self.partner.dtype}, expected an int64 vector.")
        if tuple(self.frequency.shape) != (width,) or self.frequency.dtype != torch.float64:
            raise FormatError(
                f"PositionRotation: frequency is {tuple(self.frequency.shape)} {self.frequency.dtype},"
                f" expected ({width},) float64."
            )
        if self.partner.is_meta:  # read for its layout alone
            return
        inside = bool(((self.partner >= 0) & (self.partner < width)).all())
        if not inside or not torch.equal(self.partner[self.partner], torch.arange(width)):
            raise FormatError("PositionRotation: partner does not pair up the channels.")
        if not torch.equal(self.frequency[self.partner], -self.frequency):
            raise FormatError("PositionRotation: members of a pair have no opposite frequencies.")

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate back to position 0."""
        return self._rotated(x, -positions)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate to the position."""
        return self._rotated(x, positions)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = positions.to(torch.float64)[:, None] * self.frequency.to(x.device)  # [T, D]
        other = x.index_select(-1, self.partner.to(x.device))
        return x * angle.cos().to(x.dtype) - other * angle.sin().to(x.dtype)

    def check(self, width: int) -> None:
        """One entry per channel."""
        if self.partner.numel() != width:
            raise FormatError(f"PositionRotation: for {self.partner.numel()} channels, heads have {width}.")

    def describe(self) -> str:
        """For the report."""
        return "pre-rotary"


def check_per_channel(what: str, **tensors: Tensor) -> None:
    """Refuse tensors that are not float32 ``[H, D]`` of one shape.

    Raises:
        FormatError: naming the tensor.
    """
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    for field, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.dtype != torch.float32 or len(shapes) > 1:
            raise FormatError(
                f"{what}: {field} is {tuple(tensor.shape)} {tensor.dtype}, expected float32"
                " [heads, channels]."
            )
