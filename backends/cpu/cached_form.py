"""Kernel forms of attention over a packed cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

from fxcompress.backends.cpu.generator import form_number, render_template
from fxcompress.backends.cpu.isa import Isa
from fxcompress.forms.cache import BlockStore, CacheForm, CacheStore, ExactStore
from fxcompress.forms.cache_stores import CodebookStore, FloatStore, IntStore, planes
from fxcompress.forms.cache_transforms import ChannelAffine, HeadRotation, PositionRotation

__all__ = ["CachedAttentionForm", "HalfForm"]

_DIGEST_BITS = (4, 1, 1, 2, 4)
_BASES = {HeadRotation: "rotated", ChannelAffine: "affine", PositionRotation: "rotary"}
_INTEGERS, _BOOK, _EXACT = "int", "book", "exact"


class RecordField(NamedTuple):
    """A part of the record: its name and C++ type, and how many there are, in ``tokens`` and ``width``."""

    name: str
    type: str
    amount: str


class Constant(NamedTuple):
    """A calibrated tensor: its path in the store, its name and type in C++, whether heads have a row each."""

    path: str
    name: str
    type: str
    per_head: bool


@dataclass(frozen=True)
class HalfForm:
    """What the source depends on of the keys, or of the values.

    Args:
        bits: Width of a code.
        axis: ``"channel"`` or ``"token"``, see :class:`~fxcompress.forms.IntStore`; for a codebook, whether
            ranges are calibrated per channel or found for every token.
        group_size: See :class:`~fxcompress.forms.IntStore`.
        window, block, sinks: See :class:`~fxcompress.forms.cache.BlockStore`.
        rotated: Codes lie in the basis of a :class:`~fxcompress.forms.HeadRotation`.
        codes: ``"int"``, ``"book"``, a kind of 8-bit floating point, or ``"exact"`` (values as they are).
        outliers: Values per token that are kept apart.
        affine: Codes lie in the basis of a :class:`~fxcompress.forms.ChannelAffine`.
        rotary: Codes lie in the basis of a :class:`~fxcompress.forms.PositionRotation`.
    """

    bits: int
    axis: str
    group_size: int
    window: int
    block: int
    sinks: int
    rotated: bool
    codes: str = _INTEGERS
    outliers: int = 0
    affine: bool = False
    rotary: bool = False

    @classmethod
    def of(cls, store: CacheStore) -> HalfForm | None:
        """The form of a store, None when no kernel reads it."""
        if isinstance(store, ExactStore):
            return cls(8, "token", 0, 0, 1, 0, False, codes=_EXACT)
        if not isinstance(store, BlockStore):
            return None
        bases = [_BASES.get(type(transform)) for transform in store.transforms]
        if None in bases or len(bases) > 1:
            return None
        form = cls._codes_of(store, (store.window, store.block, store.sinks, "rotated" in bases))
        return form and replace(form, affine="affine" in bases, rotary="rotary" in bases)

    @classmethod
    def _codes_of(cls, store: BlockStore, kept: tuple[int, int, int, bool]) -> HalfForm | None:
        if isinstance(store, IntStore):
            return cls(store.bits, store.axis, store.group_size, *kept)
        if isinstance(store, FloatStore):
            return cls(8, "token", 0, *kept, codes=store.format_kind)
        if isinstance(store, CodebookStore):
            axis = "token" if store.offset is None else "channel"
            return cls(store.bits, axis, 0, *kept, codes=_BOOK, outliers=store.outliers)
        return None

    @property
    def integers(self) -> bool:
        """Whether codes are uniform integers of the values, rotated or not, and nothing is calibrated."""
        return self.codes == _INTEGERS and not (self.affine or self.rotary)

    @property
    def turned(self) -> bool:
        """Whether codes lie in another basis than the values."""
        return self.rotated or self.affine or self.rotary

    @property
    def planes(self) -> int:
        """Codes that fill whole bytes."""
        return planes(self.bits)

    @property
    def step(self) -> str:
        """Tokens that are encoded at once, in C++."""
        return "GROUP" if self.codes == _INTEGERS and self.axis == "channel" else "1"

    @property
    def fields(self) -> tuple[RecordField, ...]:
        """The codes' part of the record, in order; see ``encoded`` of the stores."""
        if self.codes == _EXACT:
            return (RecordField("codes", "input_t", "width * tokens"),)
        found = [RecordField("codes", "uint8_t", "code_bytes(width) * tokens")]
        if self.codes == _INTEGERS:
            amount = "(tokens + GROUP - 1) / GROUP * width"
            if self.axis == "token":
                amount = "tokens * (width / in_group(width))"
            return (*found, *(RecordField(name, "uint16_t", amount) for name in ("scale", "low")))
        if self.codes != _BOOK:
            return (*found, RecordField("scale", "float", "tokens"))
        if self.outliers:
            found.append(RecordField("place", "uint8_t", "place_bytes(width) * OUTLIERS * tokens"))
            found.append(RecordField("outlier", "uint16_t", "OUTLIERS * tokens"))
        if self.axis == "token":
            found += [RecordField(name, "uint16_t", "tokens") for name in ("offset", "span")]
        return tuple(found)

    @property
    def constants(self) -> tuple[Constant, ...]:
        """Calibrated tensors that the kernel reads, in the order in which it takes them."""
        found = []
        if self.affine:
            found.append(Constant("transforms.0.shift", "shift", "float", True))
            found.append(Constant("transforms.0.scale", "factor", "float", True))
        if self.rotary:
            found.append(Constant("transforms.0.partner", "partner", "int64_t", False))
            found.append(Constant("transforms.0.frequency", "frequency", "double", False))
        if self.codes == _BOOK:
            found.append(Constant("codebook", "book", "float", False))
            if self.axis == "channel":
                found += [Constant(name, name, "float", True) for name in ("offset", "span")]
        return tuple(found)

    @property
    def text(self) -> str:
        """E.g. ``"4-c64-w0-b64-s0"``."""
        codes = {_INTEGERS: f"{self.bits}", _BOOK: f"book{self.bits}"}.get(self.codes, self.codes)
        apart = f"-o{self.outliers}" if self.outliers else ""
        basis = ("-h" * self.rotated) + ("-a" * self.affine) + ("-p" * self.rotary)
        span = f"{self.axis[0]}{self.group_size}"
        return f"{codes}-{span}{apart}-w{self.window}-b{self.block}-s{self.sinks}{basis}"


@dataclass(frozen=True)
class CachedAttentionForm:
    """What the source of a kernel depends on besides the instruction set.

    Args:
        key, value: How they are kept.
        input: Dtype of queries, new keys and values, and the result.
    """

    key: HalfForm
    value: HalfForm
    input: str
    kind = "cached"
    activation = None

    @classmethod
    def of(cls, form: CacheForm, dtype: str) -> CachedAttentionForm | None:
        """The kernel form of a cache, None when there is none."""
        key, value = HalfForm.of(form.key), HalfForm.of(form.value)
        if key is None or value is None or value.rotary:  # positions turn queries in place of keys
            return None
        return cls(key, value, dtype)

    @property
    def output(self) -> str:
        """Dtype of the result."""
        return self.input

    @property
    def constants(self) -> list[str]:
        """Paths of the form's tensors in the order in which the kernel takes them."""
        halves = (("key", self.key), ("value", self.value))
        return [f"{name}.{constant.path}" for name, half in halves for constant in half.constants]

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        return f"cached-k{self.key.text}-v{self.value.text}-{self.input}"

    def number(self, isa: Isa) -> int:
        """See :meth:`KernelForm.number`; twelve bits of a digest stand for the two halves."""
        digest = int.from_bytes(hashlib.sha256(self.title.encode()).digest()[:4], "little")
        fields = []
        for width in _DIGEST_BITS:
            fields.append(digest & ((1 << width) - 1))
            digest >>= width
        return form_number(self.kind, fields, self.input, self.output, isa)

    def flags(self, isa: Isa) -> tuple[str, ...]:
        """Compiler flags for the source of this form on ``isa``.

        Keys before their rotary embedding get the codes of the reference, which rounds every product.
        """
        return (*isa.flags, "-ffp-contract=off") if self.key.rotary else isa.flags

    def render(self, isa: Isa) -> str:
        """The kernel's C++ source."""
        values = {"form": self, "isa": isa, "nibble_table": False}
        books = [half.bits for half in (self.key, self.value) if half.codes == _BOOK]
        if books:
            values["lookup_bits"] = max(books)
        return render_template("cached_attention.cpp.j2", **values)
