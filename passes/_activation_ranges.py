"""The static quantizer of a range of activations."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError
from fxcompress.forms import StaticPerTensor


def static_quantizer(low: Tensor, high: Tensor, bits: int, name: str) -> StaticPerTensor:
    """The asymmetric quantizer of the range ``low…high``, widened to contain zero.

    Args:
        low: 0-d, least value seen.
        high: 0-d, greatest value seen.
        bits: Code width.
        name: Parameter, for messages.

    Returns:
        Signed codes ``-2**(bits-1) … 2**(bits-1)-1``: ``low`` is the first, ``high`` the last, 0 is exact.

    Raises:
        CalibrationError: ``low`` or ``high`` is not finite.
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise CalibrationError(
            f"{name}: its calibrated inputs contain NaN or inf.",
            fix="check the calibration data, and the model's dtype (float16 overflows).",
        )
    levels = 2**bits - 1
    scale = ((high - low) / levels).float().clamp_min(torch.finfo(torch.float32).tiny)
    if float(high) == float(low):  # both zero
        scale = torch.ones_like(scale)
    first = -(2 ** (bits - 1))
    zero = (first - low / scale).round().clamp(first, first + levels)
    return StaticPerTensor(bits=bits, scale=scale, zero=zero.to(torch.int32))
