"""Quantized stores of keys and values: integers, 8-bit floating point, codebooks with sparse outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats.floating import FLOAT_DTYPES, encode_float
from fxcompress.formats.packing import pack_codes, packed_width, unpack_codes
from fxcompress.forms.cache import BlockStore, Field
from fxcompress.forms.cache_transforms import check_per_channel
from fxcompress.forms.component import component

__all__ = ["CodebookStore", "FloatStore", "IntStore"]

_PER_BYTES = {2: 4, 4: 2, 6: 4, 8: 1}
_LARGEST = 65504.0


def planes(bits: int) -> int:
    """Codes that fill whole bytes together; see :func:`pack_planes`."""
    return _PER_BYTES.get(bits, 8)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Pack ``[..., D]`` codes so that neighbouring codes of the stream are ``D / planes`` channels apart.

    Unpacking then writes runs of neighbouring channels.
    """
    count = planes(bits)
    return pack_codes(codes.unflatten(-1, (count, -1)).transpose(-1, -2).flatten(-2), bits)


def unpack_planes(packed: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of :func:`pack_planes`."""
    codes: Tensor = unpack_codes(packed, bits, width).unflatten(-1, (-1, planes(bits)))
    return codes.transpose(-1, -2).flatten(-2)


def check_packs(what: str, bits: int, width: int) -> None:
    """Refuse a width whose codes do not fill whole bytes.

    Raises:
        FormatError: with the widths that would.
    """
    if width % planes(bits):
        raise FormatError(
            f"{what}: {width} channels of {bits} bits do not fill whole bytes.",
            fix=f"heads need a multiple of {planes(bits)} channels for {bits} bits; use 8 bits.",
        )


@component("cache-int")
@dataclass(frozen=True, eq=False)
class IntStore(BlockStore):
    """Uniform integer codes: ``x ≈ scale · code + low``.

    ``scale = (max − min) / (2**bits − 1)`` and ``low = min``. Scale and low are float16 and rounded
    before codes are computed (Liu et al., 2024, KIVI,
    arXiv:2402.02750).

    Args:
        bits: Width of a code, 2…8.
        axis: ``"channel"``: the tokens of a group share a scale in every channel, and ``residual`` tokens
            (or a group) are quantized at once when so many have gathered. ``"token"``: the channels of a
            group share a scale in every token, and the last ``residual`` tokens stay exact.
        group_size: Tokens or channels of a group; 0 (``"token"`` only) = all channels of a head.

    Raises:
        FormatError: an option is out of range, or (``"channel"``) the residual is no multiple of the group.
    """

    bits: int = 8
    axis: str = "token"
    group_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise FormatError(f"IntStore: bits={self.bits!r}, expected 2…8.")
        if self.axis not in ("channel", "token"):
            raise FormatError(f"IntStore: axis={self.axis!r}, expected 'channel' or 'token'.")
        least = 1 if self.axis == "channel" else 0
        if type(self.group_size) is not int or self.group_size < least:
            raise FormatError(f"IntStore: group_size={self.group_size!r}, expected at least {least}.")
        if self.axis == "channel" and self.residual % self.group_size:
            raise FormatError(
                f"IntStore: residual={self.residual} is no multiple of group_size={self.group_size}.",
                fix=f"use {-(-self.residual // self.group_size) * self.group_size}.",
            )

    @property
    def block(self) -> int:
        """Whole groups of tokens."""
        return max(self.residual, self.group_size) if self.axis == "channel" else 1

    @property
    def window(self) -> int:
        """Groups of tokens are quantized when they are complete."""
        return 0 if self.axis == "channel" else self.residual

    def _groups(self, width: int) -> int:
        size = self.group_size or width
        if width % size:
            raise FormatError(
                f"IntStore: group_size={size} does not divide {width} channels.",
                fix="use a divisor, or 0 for one scale per token and head.",
            )
        return width // size

    def encoded(self, capacity: int, width: int) -> dict[str, Field]:
        """Codes ``[C, D·bits/8]``; scale and low ``[C/G, D]`` or ``[C, D/G]`` float16."""
        check_packs("IntStore", self.bits, width)
        if self.axis == "channel":
            shape = (-(-capacity // self.group_size), width)
        else:
            shape = (capacity, self._groups(width))
        return {
            "codes": Field((capacity, packed_width(width, self.bits)), torch.uint8),
            "scale": Field(shape, torch.float16),
            "low": Field(shape, torch.float16),
        }

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Group by group."""
        if self.axis == "channel":
            grouped, dim = x.unflatten(2, (-1, self.group_size)), 3  # [B, H, n/G, G, D]
        else:
            grouped, dim = x.unflatten(3, (self._groups(x.shape[3]), -1)), 4  # [B, H, n, D/G, G]
        low = _as_half(grouped.amin(dim, keepdim=True))
        top = grouped.amax(dim, keepdim=True)
        scale = _as_half((top - low.float()) / ((1 << self.bits) - 1))
        scale = torch.where(scale > 0, scale, 1.0)  # a constant group
        codes = ((grouped - low.float()) / scale.float()).round_().clamp_(0, (1 << self.bits) - 1)
        flat = codes.nan_to_num_(0).to(torch.uint8).reshape(x.shape)
        return {"codes": pack_planes(flat, self.bits), "scale": scale.squeeze(dim), "low": low.squeeze(dim)}

    def decode(self, parts: Mapping[str, Tensor], width: int) -> Tensor:
        """``scale · code + low``."""
        codes = unpack_planes(parts["codes"], self.bits, width).float()
        scale, low = parts["scale"].float(), parts["low"].float()
        if self.axis == "channel":
            grouped: Tensor = codes.unflatten(2, (-1, self.group_size))
            return (grouped * scale.unsqueeze(3) + low.unsqueeze(3)).flatten(2, 3)
        grouped = codes.unflatten(3, (self._groups(width), -1))
        return (grouped * scale.unsqueeze(4) + low.unsqueeze(4)).flatten(3)

    def describe(self) -> str:
        """E.g. ``"int4 per channel g64 r64"``."""
        words = [f"int{self.bits} per {self.axis}"]
        words += [f"g{self.group_size}"] if self.group_size else []
        return _described(self, words)


@component("cache-float")
@dataclass(frozen=True, eq=False)
class FloatStore(BlockStore):
    """8-bit floating point, one float32 scale per token and head: ``scale = max|x| / largest code``.

    Args:
        format_kind: ``"e4m3"`` or ``"e5m2"``.

    Raises:
        FormatError: unknown format.
    """

    format_kind: str = "e4m3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format_kind not in FLOAT_DTYPES:
            kinds = " or ".join(map(repr, FLOAT_DTYPES))
            raise FormatError(f"FloatStore: format_kind={self.format_kind!r}, expected {kinds}.")

    def encoded(self, capacity: int, width: int) -> dict[str, Field]:
        """Codes ``[C, D]`` as bytes, scale ``[C, 1]``."""
        return {
            "codes": Field((capacity, width), torch.uint8),
            "scale": Field((capacity, 1), torch.float32),
        }

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Token by token."""
        dtype = FLOAT_DTYPES[self.format_kind]
        scale = x.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
        return {"codes": encode_float(x, scale, dtype).view(torch.uint8), "scale": scale}

    def decode(self, parts: Mapping[str, Tensor], width: int) -> Tensor:
        """``scale · code``."""
        codes = parts["codes"].contiguous().view(FLOAT_DTYPES[self.format_kind])
        return codes.float() * parts["scale"]

    def describe(self) -> str:
        """E.g. ``"fp8-e4m3 per token"``."""
        return _described(self, [f"fp8-{self.format_kind} per token"])


@component("cache-codebook")
@dataclass(frozen=True, eq=False)
class CodebookStore(BlockStore):
    """Codes of a non-uniform codebook on values normalised to −1…1, beside the largest values as they are.

    Hooper et al., 2024 (KVQuant, arXiv:2401.18079): ``x ≈ offset + span · codebook[code]``. Offset and span
    are calibrated per channel (keys) or found for every token (values), the outliers left out.

    Args:
        codebook: ``[2**bits]`` float32, ascending.
        offset, span: ``[H, D]`` float32 per channel; None = per token, at run time.
        outliers: Values per token and head that are kept in float16 instead, the farthest from the middle.

    Raises:
        FormatError: the codebook's size is no power of two from 4 to 256, or shapes differ.
    """

    codebook: Tensor
    offset: Tensor | None = None
    span: Tensor | None = None
    outliers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.codebook.numel()
        if self.codebook.dim() != 1 or self.codebook.dtype != torch.float32 or size not in _SIZES:
            raise FormatError(
                f"CodebookStore: codebook is {tuple(self.codebook.shape)} {self.codebook.dtype}, expected a"
                " float32 vector of 4, 8, … 256 values."
            )
        if type(self.outliers) is not int or self.outliers < 0:
            raise FormatError(f"CodebookStore: outliers={self.outliers!r}, expected 0 or more.")
        if (self.offset is None) != (self.span is None):
            raise FormatError("CodebookStore: offset and span go together.")
        if self.offset is not None and self.span is not None:
            check_per_channel("CodebookStore", offset=self.offset, span=self.span)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.codebook.numel().bit_length() - 1

    def encoded(self, capacity: int, width: int) -> dict[str, Field]:
        """Codes; places and values of outliers ``[C, n]``; per token also offset and span ``[C, 1]``."""
        check_packs("CodebookStore", self.bits, width)
        if self.offset is not None and self.offset.shape[1] != width:
            raise FormatError(f"CodebookStore: for {self.offset.shape[1]} channels, heads have {width}.")
        if self.outliers > width or width > 65536:
            raise FormatError(f"CodebookStore: outliers={self.outliers}, heads have {width} channels.")
        found = {"codes": Field((capacity, packed_width(width, self.bits)), torch.uint8)}
        if self.outliers:
            place = torch.uint8 if width <= 256 else torch.int32
            found["place"] = Field((capacity, self.outliers), place)
            found["outlier"] = Field((capacity, self.outliers), torch.float16)
        if self.offset is None:
            found["offset"] = Field((capacity, 1), torch.float16)
            found["span"] = Field((capacity, 1), torch.float16)
        return found

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """The nearest value of the codebook."""
        found: dict[str, Tensor] = {}
        chosen = torch.zeros_like(x, dtype=torch.bool)
        if self.outliers:
            far = self._distance(x).topk(self.outliers, dim=-1).indices
            chosen.scatter_(-1, far, True)
            found["place"] = far.to(self.encoded(1, x.shape[-1])["place"].dtype)
            found["outlier"] = _as_half(x.gather(-1, far))
        offset, span = self._range(x, chosen)
        if self.offset is None:
            found["offset"], found["span"] = offset, span
        values = self.codebook.to(x.device)
        normal = (x - offset.float()) / span.float()
        found["codes"] = pack_planes(
            torch.bucketize(normal, (values[1:] + values[:-1]) / 2).to(torch.uint8), self.bits
        )
        return found

    def decode(self, parts: Mapping[str, Tensor], width: int) -> Tensor:
        """Look up, then put the outliers in."""
        codes = unpack_planes(parts["codes"], self.bits, width)
        values = self.codebook.to(codes.device)[codes.long()]
        if self.offset is None:
            offset, span = parts["offset"].float(), parts["span"].float()
        else:
            offset, span = self._calibrated(codes.device)
        x = values * span + offset
        if self.outliers:
            x.scatter_(-1, parts["place"].long(), parts["outlier"].float())
        return x

    def for_heads(self, name: str, heads: int) -> None:
        """One row of ranges per head."""
        super().for_heads(name, heads)
        if self.offset is not None and self.offset.shape[0] != heads:
            raise FormatError(f"{name}: CodebookStore for {self.offset.shape[0]} heads, found {heads}.")

    def _calibrated(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``[H, 1, D]`` each."""
        assert self.offset is not None
        assert self.span is not None
        return self.offset.to(device)[:, None], self.span.to(device)[:, None]

    def _distance(self, x: Tensor) -> Tensor:
        if self.offset is None:
            return (x - x.median(-1, keepdim=True).values).abs()
        offset, span = self._calibrated(x.device)
        return ((x - offset) / span).abs()

    def _range(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        if self.offset is not None:
            return self._calibrated(x.device)
        middle = x.median(-1, keepdim=True).values
        inside = torch.where(chosen, middle, x)
        low, top = inside.amin(-1, keepdim=True), inside.amax(-1, keepdim=True)
        span = _as_half((top - low) / 2)
        return _as_half((top + low) / 2), torch.where(span > 0, span, 1.0)

    def describe(self) -> str:
        """E.g. ``"nuq3 per channel, 1 outlier per token"``."""
        words = [f"nuq{self.bits} per {'token' if self.offset is None else 'channel'}"]
        words += [f"{self.outliers} outlier{'s' * (self.outliers > 1)}"] if self.outliers else []
        return _described(self, words)


_SIZES = {1 << bits for bits in range(2, 9)}


def _as_half(x: Tensor) -> Tensor:
    return x.clamp(-_LARGEST, _LARGEST).to(torch.float16)


def _described(store: BlockStore, words: list[str]) -> str:
    words += [f"r{store.residual}"] if store.residual else []
    words += [f"first {store.sinks} exact"] if store.sinks else []
    words += [transform.describe() for transform in store.transforms]
    return " ".join(words)
