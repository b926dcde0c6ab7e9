"""Kernel forms of attention over a packed cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fxcompress.backends.cpu.generator import form_number, render_template
from fxcompress.backends.cpu.isa import Isa
from fxcompress.forms.cache import CacheForm, CacheStore
from fxcompress.forms.cache_stores import IntStore, planes
from fxcompress.forms.cache_transforms import HeadRotation

__all__ = ["CachedAttentionForm", "HalfForm"]

_DIGEST_BITS = (4, 1, 1, 2, 4)


@dataclass(frozen=True)
class HalfForm:
    """What the source depends on of the keys, or of the values; see :class:`~fxcompress.forms.IntStore`."""

    bits: int
    axis: str
    group_size: int
    window: int
    block: int
    sinks: int
    rotated: bool

    @classmethod
    def of(cls, store: CacheStore) -> HalfForm | None:
        """The form of a store, None when no kernel reads it."""
        if not isinstance(store, IntStore):
            return None
        rotated = [isinstance(transform, HeadRotation) for transform in store.transforms]
        if not all(rotated) or len(rotated) > 1:
            return None
        return cls(
            *(store.bits, store.axis, store.group_size, store.window, store.block, store.sinks, bool(rotated))
        )

    @property
    def planes(self) -> int:
        """Codes that fill whole bytes."""
        return planes(self.bits)

    @property
    def text(self) -> str:
        """E.g. ``"4-c64-w0-b64-s0"``."""
        turned = "-h" if self.rotated else ""
        return (
            f"{self.bits}-{self.axis[0]}{self.group_size}-w{self.window}-b{self.block}-s{self.sinks}{turned}"
        )


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
        return None if key is None or value is None else cls(key, value, dtype)

    @property
    def output(self) -> str:
        """Dtype of the result."""
        return self.input

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
        """Compiler flags for the source of this form on ``isa``."""
        return isa.flags

    def render(self, isa: Isa) -> str:
        """The kernel's C++ source."""
        return render_template("cached_attention.cpp.j2", form=self, isa=isa, nibble_table=False)
