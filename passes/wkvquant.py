"""Two-dimensional quantization of the key/value cache (Yue et al., 2024, WKVQuant, arXiv:2402.12065).

    cache of x  →  codes per token and group of channels of (x − shift) / scale, with shift and scale per
    channel

A channel's calibrated middle and half range are taken out before the tokens are quantized with ranges of
their own, so that neither an outlier channel nor a large token widens the grid for the others. The token of
the current step takes part as it is (past-only quantization), as in every cache here. The paper's
cross-block reconstruction of the shifts is not part of this pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError, FormatError, RecipeError
from fxcompress.forms import CacheStore, ChannelAffine, IntStore
from fxcompress.pass_base import BlockContext
from fxcompress.passes._cache_sites import CachedAttention, CachePass, finite


@dataclass(frozen=True)
class Wkvquant(CachePass):
    """Quantize the key/value cache per channel and per token.

    Args:
        bits: Code width, 2…8. Default 4.
        group_size: Channels of a token that share a scale; 0 = all of a head. Default 0.
        residual: Most recent tokens that stay exact. Default 0.
        include, exclude: See :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: NaN or inf among the keys and values of the calibration data.

    Example:
        >>> Wkvquant(bits=4).needs_calibration
        True
    """

    bits: int = 4
    group_size: int = 0
    residual: int = 0

    name: ClassVar[str] = "wkvquant"
    summary: ClassVar[str] = "Quantize the key/value cache per channel (calibrated) and per token."
    source: ClassVar[str] = "Yue et al., 2024 (WKVQuant, arXiv:2402.12065), section 3"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            IntStore(self.bits, "token", self.group_size, residual=self.residual)
        except FormatError as error:
            raise RecipeError(f"{self.name}: {error}") from error

    def stores(self, block: BlockContext, attention: CachedAttention) -> tuple[CacheStore, CacheStore, str]:
        """Ranges over all calibration tokens."""
        key, value = attention.site.key, attention.site.value
        ranges: dict[str, list[tuple[Tensor, Tensor]]] = {"keys": [], "values": []}
        for found in block.values([key, value]):
            for what, x in (
                ("keys", attention.keys(found[key])),
                ("values", attention.values(found[value])),
            ):
                finite(x, f"{attention.name}: {what}")
                ranges[what].append((x.amin(0), x.amax(0)))
        if not ranges["keys"]:
            raise CalibrationError(f"{attention.name}: no calibration token reaches its attention.")
        stores = [self._store(ranges[what]) for what in ("keys", "values")]
        return stores[0], stores[1], f"int{self.bits} around calibrated channels"

    def _store(self, ranges: list[tuple[Tensor, Tensor]]) -> IntStore:
        low = torch.stack([least for least, _ in ranges]).amin(0)  # [H, D]
        high = torch.stack([most for _, most in ranges]).amax(0)
        scale = torch.where(high > low, (high - low) / 2, 1.0)
        smooth = ChannelAffine(((high + low) / 2).contiguous(), scale.contiguous())
        return IntStore(self.bits, "token", self.group_size, residual=self.residual, transforms=(smooth,))
