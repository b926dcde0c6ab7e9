"""How keys and values are kept in a cache: the quantized past, and exact first and recent tokens.

    tokens   0 … sinks | sinks … sinks + Q(n) | … n
    kept     exact     | codes                | exact, in a ring of ``slots`` places

``Q`` depends on the number of tokens alone, so what a cache holds does not depend on the steps in which it
was filled. A token is quantized only when it has become past: attention reads before it appends.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.forms.cache_transforms import CacheTransform
from fxcompress.forms.component import Component, component

__all__ = ["BlockStore", "CacheForm", "CacheStore", "ExactStore", "Field", "Half"]


class Half(NamedTuple):
    """Keys, or values, of one cache in memory.

    Args:
        tensors: Fields by name, each ``[B, H, *field.shape]``; writing to them changes the cache.
        width: Channels per head.
        dtype: Of the model.
        origin: Position of the first token.
    """

    tensors: Mapping[str, Tensor]
    width: int
    dtype: torch.dtype
    origin: int = 0


class Field(NamedTuple):
    """A part of the record that a store keeps for every head of every sequence."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one head of one sequence."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class CacheStore(Component):
    """How the keys, or the values, of one attention are kept.

    All lengths count tokens; ``x: [B, H, T, D]``.
    """

    @property
    def block(self) -> int:
        """Tokens that are quantized together."""
        return 1

    @property
    def by_position(self) -> bool:
        """Whether what is kept of a token depends on its position."""
        return False

    def without_sinks(self) -> CacheStore:
        """The same, with no first tokens kept apart."""
        return self

    def fields(self, capacity: int, width: int, dtype: torch.dtype) -> dict[str, Field]:
        """What is kept for one head of one sequence of up to ``capacity`` tokens of ``width`` channels.

        Raises:
            FormatError: codes of this width do not fill whole bytes, or a group does not divide it.
        """
        raise FormatError(f"{type(self).__name__} does not implement fields()")

    def append(self, half: Half, x: Tensor, length: int) -> None:
        """Add ``x`` behind ``length`` tokens."""
        raise FormatError(f"{type(self).__name__} does not implement append()")

    def read(self, half: Half, length: int) -> Tensor:
        """The first ``length`` tokens, all that is kept: ``[B, H, length, D]``."""
        raise FormatError(f"{type(self).__name__} does not implement read()")

    def crop(self, half: Half, length: int, kept: int) -> None:
        """Forget all but the first ``kept`` of ``length`` tokens."""
        raise FormatError(f"{type(self).__name__} does not implement crop()")

    def shift(self, half: Half, length: int, count: int) -> None:
        """Forget the first ``count`` of ``length`` tokens, a multiple of :attr:`block`; the others move up.

        Stores that keep first tokens apart do not shift, see :meth:`without_sinks`.
        """
        raise FormatError(f"{type(self).__name__} does not implement shift()")

    def for_heads(self, name: str, heads: int) -> None:
        """Check tensors of the store against the number of key/value heads.

        Raises:
            FormatError: a tensor is for another number of heads.
        """


@component("cache-exact")
@dataclass(frozen=True, eq=False)
class ExactStore(CacheStore):
    """As they are, in the model's dtype."""

    def fields(self, capacity: int, width: int, dtype: torch.dtype) -> dict[str, Field]:
        """One tensor."""
        return {"exact": Field((capacity, width), dtype)}

    def append(self, half: Half, x: Tensor, length: int) -> None:
        """Copy."""
        half.tensors["exact"][:, :, length : length + x.shape[2]] = x

    def read(self, half: Half, length: int) -> Tensor:
        """Copy."""
        return half.tensors["exact"][:, :, :length].clone()

    def crop(self, half: Half, length: int, kept: int) -> None:
        """Nothing: what lies behind the end is not read."""

    def shift(self, half: Half, length: int, count: int) -> None:
        """Move."""
        exact = half.tensors["exact"]
        exact[:, :, : length - count] = exact[:, :, count:length].clone()

    def describe(self) -> str:
        """E.g. for the report."""
        return "exact"


@dataclass(frozen=True, eq=False)
class BlockStore(CacheStore):
    """Base of quantized stores.

    Args:
        residual: Most recent tokens that stay exact; see :attr:`window` and :attr:`block`.
        sinks: First tokens that stay exact.
        transforms: Applied in order before quantizing, undone in reverse order after.

    Subclasses give :meth:`encoded`, :meth:`encode` and :meth:`decode`.
    """

    residual: int = field(default=0, kw_only=True)
    sinks: int = field(default=0, kw_only=True)
    transforms: tuple[CacheTransform, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for option in ("residual", "sinks"):
            value = getattr(self, option)
            if type(value) is not int or value < 0:
                raise FormatError(f"{type(self).__name__}: {option}={value!r}, expected 0 or more tokens.")

    @property
    def by_position(self) -> bool:
        """Whether a transform depends on positions."""
        return any(transform.by_position for transform in self.transforms)

    def without_sinks(self) -> BlockStore:
        """The same, with no first tokens kept apart."""
        return dataclasses.replace(self, sinks=0) if self.sinks else self

    @property
    def window(self) -> int:
        """Tokens that always stay exact."""
        return self.residual

    @property
    def slots(self) -> int:
        """Most tokens that are exact at once, sinks not counted."""
        return self.window + self.block - 1

    def quantized(self, length: int) -> int:
        """How many of ``length`` tokens (sinks not counted) are kept as codes."""
        return max(0, length - self.window) // self.block * self.block

    def encoded(self, capacity: int, width: int) -> dict[str, Field]:
        """Fields of the codes of ``capacity`` tokens; the first dimension counts tokens or blocks."""
        raise FormatError(f"{type(self).__name__} does not implement encoded()")

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Codes of ``x: [B, H, n, D]`` float32, n a multiple of :attr:`block`; rows as in :meth:`encoded`."""
        raise FormatError(f"{type(self).__name__} does not implement encode()")

    def decode(self, parts: Mapping[str, Tensor], width: int) -> Tensor:
        """``[B, H, n, width]`` float32 from what :meth:`encode` gave."""
        raise FormatError(f"{type(self).__name__} does not implement decode()")

    def fields(self, capacity: int, width: int, dtype: torch.dtype) -> dict[str, Field]:
        """Codes, the ring of exact tokens, and sinks."""
        for transform in self.transforms:
            transform.check(width)
        whole = -(-capacity // self.block) * self.block
        found = self.encoded(whole, width)
        if self.slots:
            found["recent"] = Field((self.slots, width), dtype)
        if self.sinks:
            found["first"] = Field((self.sinks, width), dtype)
        return found

    def append(self, half: Half, x: Tensor, length: int) -> None:
        """Quantize what leaves the window, keep the rest in the ring."""
        early = min(max(0, self.sinks - length), x.shape[2])
        if early:
            half.tensors["first"][:, :, length : length + early] = x[:, :, :early]
            x = x[:, :, early:]
        start = max(0, length - self.sinks)
        end = start + x.shape[2]
        before, after = self.quantized(start), self.quantized(end)
        pending = torch.cat([self._recent(half, before, start, x), x], 2)  # tokens before … end
        if after > before:
            self._write(half, pending[:, :, : after - before], before)
        if self.slots and end > after:
            half.tensors["recent"][:, :, self._places(after, end, x.device)] = pending[:, :, after - before :]

    def read(self, half: Half, length: int) -> Tensor:
        """Sinks, dequantized past, exact recent tokens."""
        rest = max(0, length - self.sinks)
        parts = []
        if self.sinks:
            parts.append(half.tensors["first"][:, :, : min(length, self.sinks)])
        done = self.quantized(rest)
        parts.append(self._dequantized(half, 0, done).to(half.dtype))
        if rest > done:
            parts.append(half.tensors["recent"][:, :, self._places(done, rest, parts[-1].device)])
        return torch.cat(parts, 2)

    def crop(self, half: Half, length: int, kept: int) -> None:
        """Tokens that are recent again are taken out of their codes."""
        rest, left = max(0, length - self.sinks), max(0, kept - self.sinks)
        first, last = self.quantized(left), min(self.quantized(rest), left)
        if last > first:
            whole = self._dequantized(half, first, self.quantized(rest))[:, :, : last - first]
            recent = half.tensors["recent"]
            recent[:, :, self._places(first, last, recent.device)] = whole.to(recent.dtype)

    def shift(self, half: Half, length: int, count: int) -> None:
        """Codes move to the front, the ring turns."""
        done = self.quantized(length)
        for name, part in self.encoded(self.block, half.width).items():
            rows, held = part.shape[0], half.tensors[name]  # rows of one block
            first, last = (place * rows // self.block for place in (count, done))
            if last > first:
                held[:, :, : last - first] = held[:, :, first:last].clone()
        if self.slots:
            recent = half.tensors["recent"]
            recent.copy_(recent.roll(-count, 2))

    def for_heads(self, name: str, heads: int) -> None:
        """Transforms may hold a row per head."""
        for transform in self.transforms:
            transform.for_heads(name, heads)

    def _places(self, first: int, last: int, device: torch.device) -> Tensor:
        return torch.arange(first, last, device=device) % self.slots

    def _recent(self, half: Half, first: int, last: int, like: Tensor) -> Tensor:
        if first == last:
            return like[:, :, :0]
        return half.tensors["recent"][:, :, self._places(first, last, like.device)]

    def _positions(self, half: Half, first: int, last: int, device: torch.device) -> Tensor:
        start = half.origin + self.sinks
        return torch.arange(start + first, start + last, device=device)

    def _write(self, half: Half, x: Tensor, first: int) -> None:
        """Quantize tokens ``first …`` (sinks not counted)."""
        y = x.to(torch.float32)
        positions = self._positions(half, first, first + x.shape[2], x.device)
        for transform in self.transforms:
            y = transform.apply(y, positions)
        for name, part in self.encode(y).items():
            row = first * part.shape[2] // x.shape[2]
            half.tensors[name][:, :, row : row + part.shape[2]] = part

    def _dequantized(self, half: Half, first: int, last: int) -> Tensor:
        """Tokens ``first … last`` (multiples of the block) in float32."""
        parts = {}
        for name, part in self.encoded(self.block, half.width).items():
            rows = part.shape[0]  # of one block
            parts[name] = half.tensors[name][:, :, first * rows // self.block : last * rows // self.block]
        y = self.decode(parts, half.width)
        positions = self._positions(half, first, last, y.device)
        for transform in reversed(self.transforms):
            y = transform.undo(y, positions)
        return y


@component("cache-form")
@dataclass(frozen=True, eq=False)
class CacheForm(Component):
    """How an attention's cache is kept.

    Args:
        key: Its keys, as attention reads them.
        value: Its values.
        heads: Key/value heads.
        key_width: Channels of a key per head.
        value_width: Channels of a value per head.

    Raises:
        FormatError: a store cannot keep heads of this width, or is for another number of heads.
    """

    key: CacheStore
    value: CacheStore
    heads: int
    key_width: int
    value_width: int

    def __post_init__(self) -> None:
        for name, store, width in (
            ("keys", self.key, self.key_width),
            ("values", self.value, self.value_width),
        ):
            try:
                store.fields(1, width, torch.float32)
                store.for_heads(name, self.heads)
            except FormatError as error:
                raise FormatError(f"{name} of an attention: {error}") from error

    @property
    def unit(self) -> int:
        """Tokens that keys or values quantize together."""
        return math.lcm(self.key.block, self.value.block)

    @property
    def by_position(self) -> bool:
        """Whether what is kept of a token depends on its position."""
        return self.key.by_position or self.value.by_position

    def without_sinks(self) -> CacheForm:
        """The same, with no first tokens kept apart."""
        return dataclasses.replace(self, key=self.key.without_sinks(), value=self.value.without_sinks())

    @property
    def exact(self) -> bool:
        """Whether nothing is quantized."""
        return isinstance(self.key, ExactStore) and isinstance(self.value, ExactStore)

    def describe(self) -> str:
        """E.g. ``"cache: keys int4 per channel g64, values int4 per token g64"``."""
        if self.exact:
            return ""
        return f"cache: keys {self.key.describe()}, values {self.value.describe()}"
