"""Static activation quantizers from calibrated ranges."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError
from fxcompress.formats.floating import FLOAT_DTYPES
from fxcompress.forms import FloatPerTensor, StaticPerCluster, StaticPerTensor


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
    _check_finite(torch.stack([low, high]), name)
    levels = 2**bits - 1
    scale = ((high - low) / levels).float().clamp_min(torch.finfo(torch.float32).tiny)
    if float(high) == float(low):  # both zero
        scale = torch.ones_like(scale)
    first = -(2 ** (bits - 1))
    zero = (first - low / scale).round().clamp(first, first + levels)
    return StaticPerTensor(bits=bits, scale=scale, zero=zero.to(torch.int32))


def cluster_quantizer(
    low: Tensor, high: Tensor, clusters: tuple[int, ...], bits: int, name: str
) -> StaticPerCluster:
    """One :func:`static_quantizer` per cluster of neighbouring channels.

    Args:
        low: ``[K]`` least value seen per channel.
        high: ``[K]`` greatest value seen per channel.
        clusters: Sizes of the clusters, K in all. One cluster equals quantization per tensor, K clusters per
            channel.
        bits: Code width.
        name: Parameter, for messages.

    Raises:
        CalibrationError: a value is not finite.
    """
    parts = [
        static_quantizer(part_low.min(), part_high.max(), bits, name)
        for part_low, part_high in zip(low.split(list(clusters)), high.split(list(clusters)), strict=True)
    ]
    ends = torch.tensor(clusters).cumsum(0)
    scale, zero = torch.stack([part.scale for part in parts]), torch.stack([part.zero for part in parts])
    return StaticPerCluster(bits, ends, scale.cpu(), zero.cpu())


def static_float_quantizer(top: Tensor, kind: str, name: str) -> FloatPerTensor:
    """The floating-point quantizer whose largest code is ``top``.

    Args:
        top: 0-d, greatest magnitude seen; counts as 1/512 when it is less, as in dynamic quantization.
        kind: ``"e4m3"`` or ``"e5m2"``.
        name: Parameter, for messages.

    Raises:
        CalibrationError: ``top`` is not finite.
    """
    _check_finite(top, name)
    largest = float(torch.finfo(FLOAT_DTYPES[kind]).max)
    return FloatPerTensor(kind, (top.double().clamp_min(1 / 512) / largest).to("cpu", torch.float32))


def _check_finite(value: Tensor, name: str) -> None:
    if not bool(torch.isfinite(value).all()):
        raise CalibrationError(
            f"{name}: its calibrated inputs contain NaN or inf.",
            fix="check the calibration data, and the model's dtype (float16 overflows).",
        )
