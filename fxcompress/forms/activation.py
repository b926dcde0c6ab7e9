"""Activation quantizers of a site's normal form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.forms.component import Component, component


@dataclass(frozen=True, eq=False)
class ActivationQuantizer(Component):
    """Base of activation quantizers; codes are signed int8 for 8 bits and fewer."""


@component("dynamic-per-token")
@dataclass(frozen=True, eq=False)
class DynamicPerToken(ActivationQuantizer):
    """Symmetric, one scale per token (all leading dimensions), computed at run time.

    ``s = max|x| / (2**(bits-1) - 1)``; a token of zeros gets s = 1.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"DynamicPerToken: bits={self.bits}, expected 2…8.")


@component("static-per-tensor")
@dataclass(frozen=True, eq=False)
class StaticPerTensor(ActivationQuantizer):
    """One calibrated scale and zero-point: ``q = clamp(round(x / scale) + zero)`` on signed codes.

    Args:
        bits: Code width, 2…8.
        scale: 0-d float32, positive.
        zero: 0-d int32, signed zero-point (0 when symmetric).

    Raises:
        FormatError: ``bits`` is out of range, or a tensor's shape or dtype differs.
    """

    bits: int
    scale: Tensor
    zero: Tensor

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"StaticPerTensor: bits={self.bits}, expected 2…8.")
        for field, tensor, dtype in (
            ("scale", self.scale, torch.float32),
            ("zero", self.zero, torch.int32),
        ):
            if tensor.dim() != 0 or tensor.dtype != dtype:
                raise FormatError(
                    f"StaticPerTensor: {field} is {tuple(tensor.shape)} {tensor.dtype}, expected () {dtype}."
                )
