"""One attention's cache as one tensor ``[B, H, bytes]``: a record per head of every sequence.

    key fields … | value fields …        each a multiple of 16 bytes

So a cache is one argument of an operator, a step changes it in place, beams are reordered by one
``index_select``, and what one head reads lies together.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxcompress.errors import FxCompressError
from fxcompress.forms.cache import CacheForm, CacheStore, Field, Half
from fxcompress.forms.component import from_spec

__all__ = ["CacheRecord", "from_text", "to_text"]

_ALIGNMENT = 16
_HALVES = ("key", "value")


def to_text(form: CacheForm) -> tuple[str, list[Tensor]]:
    """A form as an operator takes it: its structure as text, and its tensors in order."""
    tensors: dict[str, Tensor] = {}
    spec = form.to_spec("", tensors)
    return json.dumps({"spec": spec, "tensors": list(tensors)}, sort_keys=True), list(tensors.values())


def from_text(text: str, tensors: Sequence[Tensor]) -> CacheForm:
    """Inverse of :func:`to_text`."""
    if not tensors:
        return _without_tensors(text)
    content = json.loads(text)
    form = from_spec(content["spec"], dict(zip(content["tensors"], tensors, strict=True)))
    assert isinstance(form, CacheForm)
    return form


@functools.lru_cache(maxsize=256)
def _without_tensors(text: str) -> CacheForm:
    form = from_spec(json.loads(text)["spec"], {})
    assert isinstance(form, CacheForm)
    return form


class CacheRecord:
    """Where everything lies in the record of one head, and what can be done with records.

    Args:
        form: How keys and values are kept.
        capacity: Tokens there is room for.
        dtype: Of the model.

    Example:
        >>> record = CacheRecord(CacheForm(IntStore(bits=4), IntStore(bits=4), 3, 64, 64), 256, torch.float32)
        >>> memory = record.allocate(2, torch.device("cpu"))
        >>> record.append(memory, 0, key, value)
    """

    def __init__(self, form: CacheForm, capacity: int, dtype: torch.dtype) -> None:
        self.form, self.capacity, self.dtype = form, capacity, dtype
        self.widths = (form.key_width, form.value_width)
        self._fields: list[dict[str, tuple[int, Field]]] = []
        offset = 0
        for name, width in zip(_HALVES, self.widths, strict=True):
            placed = {}
            for key, field in self._store(name).fields(capacity, width, dtype).items():
                placed[key] = (offset, field)
                offset += -(-field.nbytes // _ALIGNMENT) * _ALIGNMENT
            self._fields.append(placed)
        self.nbytes = max(offset, _ALIGNMENT)
        """Bytes of one head of one sequence."""

    def _store(self, name: str) -> CacheStore:
        store: CacheStore = getattr(self.form, name)
        return store

    def allocate(self, batch: int, device: torch.device) -> Tensor:
        """Zeroed memory."""
        return torch.zeros(batch, self.form.heads, self.nbytes, dtype=torch.uint8, device=device)

    def halves(self, memory: Tensor, origin: int = 0) -> tuple[Half, Half]:
        """Typed views of keys and values in ``memory: [B, H, nbytes]``; the first token is at ``origin``."""
        found = []
        for placed, width in zip(self._fields, self.widths, strict=True):
            tensors = {key: _view(memory, offset, field) for key, (offset, field) in placed.items()}
            found.append(Half(tensors, width, self.dtype, origin))
        return found[0], found[1]

    def append(self, memory: Tensor, length: int, key: Tensor, value: Tensor, origin: int = 0) -> None:
        """Add ``[B, H, T, D]`` behind ``length`` tokens, in place.

        Raises:
            FxCompressError: the cache is full, or was made for other sequences.
        """
        self.check(memory, length, key)
        for name, half, x in zip(_HALVES, self.halves(memory, origin), (key, value), strict=True):
            self._store(name).append(half, x, length)

    def read(self, memory: Tensor, length: int, origin: int = 0) -> tuple[Tensor, Tensor]:
        """Dequantized keys and values ``[B, H, length, D]``."""
        key, value = (
            self._store(name).read(half, length)
            for name, half in zip(_HALVES, self.halves(memory, origin), strict=True)
        )
        return key, value

    def crop(self, memory: Tensor, length: int, kept: int, origin: int = 0) -> None:
        """Keep the first ``kept`` of ``length`` tokens, in place."""
        for name, half in zip(_HALVES, self.halves(memory, origin), strict=True):
            self._store(name).crop(half, length, kept)

    def shift(self, memory: Tensor, length: int, count: int) -> None:
        """Forget the first ``count`` of ``length`` tokens, a multiple of the form's unit, in place."""
        for name, half in zip(_HALVES, self.halves(memory), strict=True):
            self._store(name).shift(half, length, count)

    def grown(self, memory: Tensor, capacity: int) -> tuple[CacheRecord, Tensor]:
        """The record for more tokens, and memory of that size with the same content."""
        record = CacheRecord(self.form, capacity, self.dtype)
        new = torch.zeros(*memory.shape[:2], record.nbytes, dtype=torch.uint8, device=memory.device)
        for old_half, new_half in zip(self.halves(memory), record.halves(new), strict=True):
            for key, old in old_half.tensors.items():
                new_half.tensors[key][:, :, : old.shape[2]] = old
        return record, new

    def offsets(self) -> Mapping[str, int]:
        """Byte offsets by ``key.codes`` and the like."""
        return {
            f"{name}.{key}": offset
            for name, placed in zip(_HALVES, self._fields, strict=True)
            for key, (offset, _) in placed.items()
        }

    def check(self, memory: Tensor, length: int, key: Tensor) -> None:
        """Refuse new keys that do not belong to the cache, or do not fit.

        Raises:
            FxCompressError: the cache is full, or was made for other sequences.
        """
        if tuple(memory.shape[:2]) != tuple(key.shape[:2]) or key.shape[3] != self.form.key_width:
            raise FxCompressError(
                f"the cache holds {memory.shape[0]} sequences of {memory.shape[1]} heads of"
                f" {self.form.key_width} channels; keys of shape {tuple(key.shape)} were given.",
                fix="use a new cache for another batch or another model.",
            )
        if length + key.shape[2] > self.capacity:
            raise FxCompressError(
                f"{length + key.shape[2]} tokens do not fit a cache of {self.capacity}.",
                fix="make the cache with a larger capacity, or reserve() more before the call.",
            )


def _view(memory: Tensor, offset: int, field: Field) -> Tensor:
    part = memory[:, :, offset : offset + field.nbytes]
    if math.prod(field.shape) == 0:
        return part.new_empty(*memory.shape[:2], *field.shape, dtype=field.dtype)
    typed: Tensor = part.view(field.dtype).unflatten(-1, field.shape)
    return typed
