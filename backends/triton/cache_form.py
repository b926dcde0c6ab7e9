"""Kernel forms of quantized key/value caches: attention that reads codes, and what writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fxcompress.backends.cpu.cached_form import HalfForm
from fxcompress.backends.triton.generator import Argument, interpreted
from fxcompress.backends.triton.linear_form import DTYPES
from fxcompress.errors import BackendError
from fxcompress.forms.cache import CacheForm

__all__ = ["AttendForm", "HalfSource", "WriteForm"]

BITS = (2, 4, 8)
_TILE = 64
MASKS = (None, "bool", "float")


@dataclass(frozen=True)
class HalfSource:
    """What templates read of the keys, or of the values.

    Args:
        form: How they are kept.
        width: Channels of a head.
    """

    form: HalfForm
    width: int

    @property
    def planes(self) -> int:
        """Runs of neighbouring channels whose codes share bytes."""
        return 8 // self.form.bits

    @property
    def bytes(self) -> int:
        """Bytes of a token; also the channels of a plane."""
        return self.width // self.planes

    @property
    def padded(self) -> int:
        """Channels of a plane, as a power of two that matrix instructions take."""
        return max(16, 1 << (self.bytes - 1).bit_length())

    @property
    def width_padded(self) -> int:
        """Channels, as a power of two."""
        return 1 << (self.width - 1).bit_length()

    @property
    def groups(self) -> int:
        """Scales of a token."""
        return self.width // (self.form.group_size or self.width)

    @property
    def by_channel(self) -> bool:
        """Whether a tile of tokens has one scale per channel, which queries can take over."""
        return self.form.axis == "channel"

    @property
    def by_token(self) -> bool:
        """Whether every token has one scale, which its weight in the sum can take over."""
        return self.form.axis == "token" and self.groups == 1

    def parameter_at(self, plane: int, places: str) -> str:
        """Source text: where scale and minimum of ``[tokens, channels of a plane]`` lie."""
        channel = f"({plane * self.bytes} + {places})[None, :]"
        if self.form.axis == "channel":
            return f"t[:, None] // {self.form.group_size} * {self.width} + {channel}"
        return f"t[:, None] * {self.groups} + {channel} // {self.form.group_size or self.width}"


def refused(key: HalfForm | None, value: HalfForm | None, widths: tuple[int, int], input: str) -> str | None:
    """Why no kernel reads or writes a cache, or None."""
    if key is None or value is None or not (key.integers and value.integers):
        return "the cache is kept in another form than integers, maybe rotated"
    for name, half, width in (("keys", key, widths[0]), ("values", value, widths[1])):
        if half.bits not in BITS:
            return f"{name} have {half.bits} bits, none of {BITS}"
        if width % (8 // half.bits) or width > 256:
            return f"heads of {width} channels of {half.bits} bits"
        if half.axis == "channel" and half.group_size % 16:
            return f"{name} have groups of {half.group_size} tokens, no multiple of 16"
    if key.sinks != value.sinks:
        return "keys and values keep different numbers of first tokens"
    return None if input in DTYPES else f"activations are {input}"


@dataclass(frozen=True)
class AttendForm:
    """Attention over a cache of integers.

    Args:
        key, value: How they are kept.
        key_width, value_width: Channels of a head.
        input: ``"float16"`` or ``"bfloat16"``.
        mask: None, ``"bool"`` or ``"float"`` (added to the scores).

    Raises:
        BackendError: no kernel reads the form.
    """

    key: HalfForm
    value: HalfForm
    key_width: int
    value_width: int
    input: str
    mask: str | None
    family: ClassVar[str] = "attend"
    entry: ClassVar[str] = "attend"

    def __post_init__(self) -> None:
        problem = refused(self.key, self.value, (self.key_width, self.value_width), self.input)
        if problem is None and self.mask not in MASKS:
            problem = f"mask={self.mask!r}"
        if problem is not None:
            raise BackendError(f"AttendForm: {problem}.")

    @classmethod
    def of(cls, form: CacheForm, input: str, mask: str | None) -> tuple[AttendForm | None, str]:
        """The kernel form of a cache, or None and why there is none."""
        key, value = HalfForm.of(form.key), HalfForm.of(form.value)
        problem = refused(key, value, (form.key_width, form.value_width), input)
        if problem is not None or key is None or value is None:
            return None, problem or ""
        return cls(key, value, form.key_width, form.value_width, input, mask), ""

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        widths = f"{self.key_width}x{self.value_width}"
        return f"attend-k{self.key.text}-v{self.value.text}-{widths}-{self.input}-mask{self.mask}"

    @property
    def tile(self) -> int:
        """Tokens read at once: within one group of keys whose scales are per channel."""
        halves = (self.key, self.value)
        sizes = [half.group_size for half in halves if half.axis == "channel"]
        # Every plane, and everything kept twice because it is rotated, takes registers.
        planes = sum(8 // half.bits + half.rotated for half in halves)
        largest = _TILE if planes <= 4 else _TILE // 2
        return next(size for size in (largest, 32, 16) if all(group % size == 0 for group in sizes))

    def arguments(self) -> list[Argument]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        value = f"*{DTYPES[self.input]}"
        found = [Argument("q_ptr", value, "[B, H, queries, D]; rotated like the keys")]
        found += [Argument("plain_ptr", value, "[B, H, queries, D], as they are")] if self.key.rotated else []
        found += [
            Argument("key_ptr", value, "[B, key_heads, new, D]"),
            Argument("value_ptr", value, "[B, key_heads, new, V]"),
            Argument("memory_ptr", "*u8", "[B, key_heads, record]"),
            Argument("length_ptr", "*i64", "[1], tokens in the cache"),
        ]
        if self.mask:
            kind = "*u8" if self.mask == "bool" else "*fp32"
            found.append(Argument("mask_ptr", kind, "any strides"))
        found.append(Argument("part_ptr", "*fp32", "[B · key_heads, SPLITS + 1, ROWS, V]"))
        found.append(Argument("sums_ptr", "*fp32", "[B · key_heads, SPLITS + 1, ROWS, 2]"))
        if self.value.rotated:
            found.append(Argument("exact_ptr", "*fp32", "[B · key_heads, ROWS, V]"))
        found.append(Argument("record", "i64", "bytes of one head"))
        found += field_arguments(self.key, self.value)
        if self.mask:
            names = ("mask_batch", "mask_head", "mask_query", "mask_key")
            found += [Argument(name, "i64", "elements") for name in names]
        found += [Argument(name, "i32", "") for name in ("key_heads", "group", "queries", "new")]
        return [*found, Argument("scale", "fp32", "of the scores")]

    def context(self) -> dict[str, Any]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        return {
            "key": HalfSource(self.key, self.key_width),
            "value": HalfSource(self.value, self.value_width),
            "type": f"tl.{self.input}",
            "operand": ".to(tl.float32)" if interpreted() and self.input == "bfloat16" else "",
            "magic": None if interpreted() else 0x6400 if self.input == "float16" else 0x4300,
        }


def merge_arguments(form: AttendForm) -> list[Argument]:
    """Run-time arguments of the kernel that merges the parts of the sequence."""
    parts = [Argument("part_ptr", "*fp32", ""), Argument("sums_ptr", "*fp32", "")]
    out = f"*{DTYPES[form.input]}"
    exact = [Argument("exact_ptr", "*fp32", "")] if form.value.rotated else []
    plain = [Argument("plain_ptr", out, "")] if form.value.rotated else []
    return [*parts, *exact, Argument("out_ptr", out, ""), *plain, Argument("rows", "i32", "")]


def field_names(half: HalfForm) -> list[str]:
    """Fields of the record that a half has."""
    names = ["codes", "scale", "low"]
    names += ["recent"] if half.window + half.block > 1 else []
    return names + (["first"] if half.sinks else [])


def field_arguments(key: HalfForm, value: HalfForm) -> list[Argument]:
    """Arguments that say where the fields of keys and values lie in a record."""
    sides = (("key", key), ("value", value))
    return [
        Argument(f"{side}_{name}", "i64", "byte offset in the record")
        for side, half in sides
        for name in field_names(half)
    ]


def field_offsets(key: HalfForm, value: HalfForm, offsets: Any) -> list[int]:
    """Values of :func:`field_arguments`, from :meth:`~fxcompress.cache_record.CacheRecord.offsets`."""
    sides: Sequence[tuple[str, HalfForm]] = (("key", key), ("value", value))
    return [offsets[f"{side}.{name}"] for side, half in sides for name in field_names(half)]


@dataclass(frozen=True)
class WriteForm:
    """What appends tokens to one half of a cache: codes of complete blocks, then the ring and first tokens.

    Args:
        half: How they are kept.
        width: Channels of a head.
        input: ``"float16"`` or ``"bfloat16"``.

    Raises:
        BackendError: no kernel writes the form.
    """

    half: HalfForm
    width: int
    input: str
    family: ClassVar[str] = "cache_write"
    entry: ClassVar[str] = "encode"

    def __post_init__(self) -> None:
        problem = refused(self.half, self.half, (self.width, self.width), self.input)
        if problem is not None:
            raise BackendError(f"WriteForm: {problem}.")

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        return f"cache-write-{self.half.text}-{self.width}-{self.input}"

    @property
    def unit(self) -> int:
        """Tokens a program encodes."""
        return self.half.group_size if self.half.axis == "channel" else 16

    @property
    def unit_padded(self) -> int:
        """Those, as a power of two."""
        return 1 << (self.unit - 1).bit_length()

    @property
    def slots(self) -> int:
        """Places of the ring."""
        return self.half.window + self.half.block - 1

    def arguments(self) -> list[Argument]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        found = [
            Argument("x_ptr", f"*{DTYPES[self.input]}", "[B · heads, new, width]"),
            Argument("memory_ptr", "*u8", "[B · heads, record]"),
            Argument("length_ptr", "*i64", "[1], tokens in the cache before"),
            *([Argument("rotation_ptr", "*fp32", "[width, width]")] if self.half.rotated else []),
            Argument("record", "i64", "bytes of one head"),
        ]
        found += [
            Argument(f"{name}_at", "i64", "byte offset in the record") for name in field_names(self.half)
        ]
        return [*found, Argument("new", "i32", "")]

    def context(self) -> dict[str, Any]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        return {"source": HalfSource(self.half, self.width), "type": f"tl.{self.input}"}
