"""Keep keys and values of past tokens in few bits.

    cache: [B, H, S, D] floats  →  codes, scales and minima of the past; the last tokens as they are

Nothing changes within one call on a fresh cache: a token is quantized when later calls have it as their
past. Uniform codes per channel or per token with a residual window (Liu et al., 2024, KIVI,
arXiv:2402.02750, section 3), or 8-bit floating point; optionally in a basis rotated by the Hadamard matrix
(Ashkboos et al., 2024, QuaRot, arXiv:2404.00456, section 4). No data are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fxcompress.errors import FormatError, RecipeError
from fxcompress.forms import (
    CacheStore,
    CacheTransform,
    ExactStore,
    FloatStore,
    HeadRotation,
    IntStore,
)
from fxcompress.pass_base import BlockContext
from fxcompress.passes._cache_sites import CachedAttention, CachePass
from fxcompress.passes._selection import float_kind

_EXACT = 16


@dataclass(frozen=True)
class QuantizeKvCache(CachePass):
    """Quantize the key/value cache.

    Args:
        bits: Code width of keys and values, 2…8. Default 8.
        key_bits, value_bits: Instead of ``bits`` for keys or values alone; 16 keeps them exact.
        key_axis, value_axis: ``"token"``: the channels of a token share scales. ``"channel"``: consecutive
            tokens share a scale in every channel, which keeps outlier channels apart (keys have them; KIVI's
            choice for keys). Default ``"token"``.
        group_size: Channels (or tokens, for ``"channel"``) that share a scale; 0 = all channels of a head.
            Default 0.
        residual: Most recent tokens that stay exact: always so many with ``"token"``; with ``"channel"`` so
            many gather and are quantized together, hence a multiple of the group. Default 0.
        sinks: First tokens that stay exact. Default 0.
        rotate: Quantize in a basis rotated by the Hadamard matrix. Default False.
        format: ``"int"`` (default), ``"fp8-e4m3"`` or ``"fp8-e5m2"``: one scale per token and head.
        include, exclude: Patterns of the weights that values are computed with, see :class:`SelectivePass`;
            attentions left out stay exact, and a later pass may take them.

    Raises:
        RecipeError: an option is out of range, or the residual is no multiple of the group.

    Example:
        >>> QuantizeKvCache(bits=4, key_axis="channel", group_size=64, residual=64).needs_calibration
        False
    """

    bits: int = 8
    key_bits: int | None = None
    value_bits: int | None = None
    key_axis: Literal["token", "channel"] = "token"
    value_axis: Literal["token", "channel"] = "token"
    group_size: int = 0
    residual: int = 0
    sinks: int = 0
    rotate: bool = False
    format: str = field(default="int", kw_only=True)

    name: ClassVar[str] = "quantize-kv-cache"
    summary: ClassVar[str] = "Keep keys and values of past tokens in few bits."
    source: ClassVar[str] = "Liu et al., 2024 (KIVI, arXiv:2402.02750), section 3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rotate, bool):
            raise RecipeError(f"{self.name}: rotate={self.rotate!r}, expected true or false.")
        for option in ("key_bits", "value_bits"):
            value = getattr(self, option)
            if value is not None and (type(value) is not int or value not in (*range(2, 9), _EXACT)):
                raise RecipeError(f"{self.name}: {option}={value!r}, expected 2…8, or 16 for exact.")
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise RecipeError(f"{self.name}: bits={self.bits!r}, expected an integer 2…8.")
        kind = float_kind(self.name, self.format, self.bits)
        if kind is not None and (self.group_size or "channel" in (self.key_axis, self.value_axis)):
            raise RecipeError(
                f"{self.name}: format={self.format!r} has one scale per token and head.",
                fix="leave out the axes and group_size.",
            )
        try:
            keys, values = self._store("key"), self._store("value")
        except FormatError as error:
            raise RecipeError(f"{self.name}: {error}") from error
        if isinstance(keys, ExactStore) and isinstance(values, ExactStore):
            raise RecipeError(f"{self.name}: key_bits and value_bits are both 16: nothing to do.")

    def stores(self, block: BlockContext, attention: CachedAttention) -> tuple[CacheStore, CacheStore, str]:
        """The same for every attention."""
        key, value = self._store("key"), self._store("value")
        return key, value, f"keys {key.describe()}, values {value.describe()}"

    def _store(self, half: str) -> CacheStore:
        given: int | None = getattr(self, f"{half}_bits")
        bits = self.bits if given is None else given
        if bits == _EXACT:
            return ExactStore()
        transforms: tuple[CacheTransform, ...] = (HeadRotation(),) if self.rotate else ()
        kind = float_kind(self.name, self.format, self.bits)
        if kind is not None:
            return FloatStore(kind, residual=self.residual, sinks=self.sinks, transforms=transforms)
        axis = getattr(self, f"{half}_axis")
        return IntStore(
            *(bits, axis, self.group_size),
            residual=self.residual,
            sinks=self.sinks,
            transforms=transforms,
        )
