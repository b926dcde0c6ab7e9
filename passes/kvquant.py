"""Codebooks for the key/value cache (Hooper et al., 2024, KVQuant, arXiv:2401.18079).

    keys    →  codes of (unrotated key − offset) / span per channel, rotated again when read    (sections 3.1,
    3.2)
    values  →  codes of (value − offset) / span, offset and span per token
    both    →  one non-uniform codebook per layer (3.3), outliers apart (3.4), first tokens exact (3.5)

Offset and span of key channels are calibrated between the quantiles that leave the outliers out. A codebook
is the weighted k-means of the normalised values. The paper weights with squared gradients of the model's
loss; here the weight of a value is the second moment of what it is multiplied with (queries, per pair of
channels) times its squared span, the diagonal of the same expansion with the attention's own error in place
of the loss. The outliers take a fixed number of places per token and head, so that the cache keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError, RecipeError
from fxcompress.forms import CacheStore, CodebookStore, PositionRotation
from fxcompress.pass_base import BlockContext
from fxcompress.passes._cache_sites import CachedAttention, CachePass, finite
from fxcompress.passes._rotary import find_rotation

_ITERATIONS = 50


@dataclass(frozen=True)
class Kvquant(CachePass):
    """Quantize the key/value cache by codebooks.

    Args:
        bits: Code width, 2…8. Default 3.
        outliers: Share of every head's channels kept in 16 bits for each token, rounded up to whole
            channels; 0 keeps none. Default 0.01.
        sinks: First tokens that stay exact. Default 1.
        residual: Most recent tokens that stay exact. Default 0, as in the paper.
        pre_rotary: Quantize keys before their rotary embedding. Default True.
        q_norm: Shift and scale the codebook so that quantized values keep mean and deviation; for 2 bits.
            Default False.
        tokens: Calibration tokens that codebooks are found on. Default 4096.
        include, exclude: See :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: NaN or inf among the keys and values of the calibration data, or too few tokens.

    Example:
        >>> Kvquant(bits=3).needs_calibration
        True
    """

    bits: int = 3
    outliers: float = 0.01
    sinks: int = 1
    residual: int = 0
    pre_rotary: bool = True
    q_norm: bool = False
    tokens: int = 4096

    name: ClassVar[str] = "kvquant"
    summary: ClassVar[str] = (
        "Quantize the key/value cache by codebooks, keys before rotation, outliers apart."
    )
    source: ClassVar[str] = "Hooper et al., 2024 (KVQuant, arXiv:2401.18079), section 3"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise RecipeError(f"{self.name}: bits={self.bits!r}, expected an integer 2…8.")
        if type(self.outliers) not in (int, float) or not 0 <= self.outliers <= 1:
            raise RecipeError(f"{self.name}: outliers={self.outliers!r}, expected a share from 0 to 1.")
        for option, least in (("sinks", 0), ("residual", 0), ("tokens", 1)):
            value = getattr(self, option)
            if type(value) is not int or value < least:
                raise RecipeError(f"{self.name}: {option}={value!r}, expected an integer from {least}.")
        for option in ("pre_rotary", "q_norm"):
            if not isinstance(getattr(self, option), bool):
                raise RecipeError(f"{self.name}: {option}={getattr(self, option)!r}, expected true or false.")

    def stores(self, block: BlockContext, attention: CachedAttention) -> tuple[CacheStore, CacheStore, str]:
        """Calibrated on this attention's own keys, values and queries."""
        rotation = find_rotation(block, attention) if self.pre_rotary else None
        note = ""
        if isinstance(rotation, str):
            rotation, note = None, f"; keys as attention reads them: {rotation}"
        keys, values, moments = self._sample(block, attention, rotation)
        key = self._key_store(keys, moments, rotation)
        value = self._value_store(values)
        return key, value, f"keys {key.describe()}, values {value.describe()}{note}"

    def _sample(
        self, block: BlockContext, attention: CachedAttention, rotation: PositionRotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys ``[N, H, D]``, values, and the second moments of queries by key channel ``[H, D]``."""
        site = attention.site
        keys: list[Tensor] = []
        values: list[Tensor] = []
        moments: list[Tensor] = []
        for found in block.values([site.query, site.key, site.value]):
            length = found[site.value].shape[-2]
            if length <= self.sinks:
                continue
            positions = torch.arange(length)
            by_sequence = attention.keys(found[site.key]).unflatten(0, (-1, length)).transpose(1, 2)
            if rotation is not None:
                by_sequence = rotation.apply(by_sequence, positions.to(by_sequence.device))
            keys.append(by_sequence.transpose(1, 2)[:, self.sinks :].flatten(0, 1).cpu())
            of_values = attention.values(found[site.value]).unflatten(0, (-1, length))
            values.append(of_values[:, self.sinks :].flatten(0, 1).cpu())
            moments.append(_moments(found[site.query], attention.heads, rotation).cpu())
        if not keys:
            raise CalibrationError(
                f"{attention.name}: no calibration sequence is longer than the {self.sinks} first tokens."
            )
        moment = torch.stack(moments).mean(0)
        k, v = (self._some(parts, attention.name, block) for parts in (keys, values))
        return k, v, finite(moment, f"{attention.name}: queries")

    def _some(self, parts: Sequence[Tensor], name: str, block: BlockContext) -> Tensor:
        every = finite(torch.cat(list(parts)), f"{name}: keys or values")
        if every.shape[0] <= self.tokens:
            return every
        step = every.shape[0] / self.tokens
        return every[(torch.arange(self.tokens) * step).long()]

    def _count(self, width: int) -> int:
        return math.ceil(self.outliers * width)

    def _key_store(self, keys: Tensor, moments: Tensor, rotation: PositionRotation | None) -> CodebookStore:
        cut = self.outliers / 2
        ordered = keys.sort(0).values  # [N, H, D]
        last = keys.shape[0] - 1
        low, high = ordered[math.floor(cut * last)], ordered[math.ceil((1 - cut) * last)]
        offset, span = (high + low) / 2, (high - low) / 2
        span = torch.where(span > 0, span, 1.0)
        normal = ((keys - offset) / span).flatten()
        weights = (moments * span.square()).expand(keys.shape).flatten()
        return CodebookStore(
            self._codebook(normal, weights),
            offset.contiguous(),
            span.contiguous(),
            self._count(keys.shape[2]),
            residual=self.residual,
            sinks=self.sinks,
            transforms=() if rotation is None else (rotation,),
        )

    def _value_store(self, values: Tensor) -> CodebookStore:
        count = self._count(values.shape[2])
        middle = values.median(-1, keepdim=True).values
        far = (values - middle).abs()
        cut = far.kthvalue(max(1, values.shape[2] - count), -1, keepdim=True).values
        inside = torch.where(far <= cut, values, middle)
        low, high = inside.amin(-1, keepdim=True), inside.amax(-1, keepdim=True)
        span = torch.where(high > low, (high - low) / 2, 1.0)
        normal = (values - (high + low) / 2) / span
        return CodebookStore(
            self._codebook(normal.flatten(), span.square().expand(values.shape).flatten()),
            outliers=count,
            residual=self.residual,
            sinks=self.sinks,
        )

    def _codebook(self, normal: Tensor, weights: Tensor) -> Tensor:
        """``[2**bits]`` float32, ascending: weighted k-means of the values within −1…1."""
        chosen = normal.abs() <= 1
        x, w = normal[chosen].double(), weights[chosen].double()
        if not x.numel() or float(w.sum()) <= 0:
            return torch.linspace(-1, 1, 1 << self.bits)
        x, order = x.sort()
        w = w[order]
        book = lloyd(x, w, 1 << self.bits)
        if self.q_norm:
            codes = torch.bucketize(x, (book[1:] + book[:-1]) / 2)
            mean, deviation = _moments_of(x, w)
            mean_q, deviation_q = _moments_of(book[codes], w)
            if deviation_q > 0:
                book = (book - mean_q) * (deviation / deviation_q) + mean
        return book.float()


def lloyd(x: Tensor, w: Tensor, count: int, iterations: int = _ITERATIONS) -> Tensor:
    """``[count]`` centres of the weighted k-means of sorted ``x: [N]`` float64, ascending.

    Starts at the quantiles; a centre that nothing is nearest to stays where it is.
    """
    total = torch.cat([w.new_zeros(1), w.cumsum(0)])  # sums of the first n
    moment = torch.cat([w.new_zeros(1), (w * x).cumsum(0)])
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count * x.numel()
    centres = x[middle.long().clamp_max(x.numel() - 1)]
    centres = centres + torch.arange(count) * 1e-12  # distinct
    for _ in range(iterations):
        ends = torch.searchsorted(x, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), x.numel())])
        weight = total[ends[1:]] - total[ends[:-1]]
        mean = (moment[ends[1:]] - moment[ends[:-1]]) / weight.clamp_min(1e-300)
        new = torch.where(weight > 0, mean, centres).sort().values
        if torch.equal(new, centres):
            break
        centres = new
    return centres


def _moments(query: Tensor, heads: int, rotation: PositionRotation | None) -> Tensor:
    """``[H, D]``: mean squares of the queries that meet each key head; equal within a rotated pair."""
    squares = query.float().square().mean((0, 2)).unflatten(0, (heads, -1)).mean(1)
    if rotation is not None:
        squares = (squares + squares[:, rotation.partner.to(squares.device)]) / 2
    return cast("Tensor", squares)


def _moments_of(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    mean = (w * x).sum() / w.sum()
    return mean, ((w * (x - mean).square()).sum() / w.sum()).sqrt()
