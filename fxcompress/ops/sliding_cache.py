"""A packed cache that forgets what its attention's sliding window has left behind.

    absolute positions   0 … base | base … base + length
    memory               forgotten | a record like any other, places 0 … length

Tokens are dropped by moving the others to the front, whole blocks at a time, so that what is quantized
together does not depend on it; kernels that read a record need not know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.cache_record import CacheRecord, from_text
from fxcompress.ops._library import opaque

__all__ = ["dropped"]


def dropped(length: int, kept: int, unit: int) -> int:
    """How many of ``length`` tokens go in a full record, a multiple of ``unit``; ``kept`` stay."""
    return max(0, length - kept) // unit * unit


def _fake_slide(
    memory: Tensor,
    length: Tensor,
    base: Tensor,
    tokens: int | torch.SymInt,
    constants: Sequence[Tensor],
    form: str,
    capacity: int | torch.SymInt,
    kept: int,
    unit: int,
    dtype: torch.dtype,
) -> None:
    return None


@opaque(
    "slide_cache(Tensor(a!) memory, Tensor(b!) length, Tensor(c!) base, SymInt tokens, Tensor[] constants,"
    " str form, SymInt capacity, int kept, int unit, ScalarType dtype) -> ()",
    fake=_fake_slide,
)
def _slide_cache(
    memory: Tensor,  # [B, H, bytes] uint8
    length: Tensor,  # int64, one element
    base: Tensor,  # int64, one element
    tokens: int,
    constants: Sequence[Tensor],
    form: str,
    capacity: int,
    kept: int,
    unit: int,
    dtype: torch.dtype,
) -> None:
    """Make place for ``tokens`` new ones, which must fit behind those that stay.

    Args:
        memory: Records, see :class:`~fxcompress.cache_record.CacheRecord`; changed.
        length: Tokens in the record; becomes smaller.
        base: Position of its first one; becomes larger.
        tokens: New tokens.
        constants: Tensors of the form.
        form: See :func:`~fxcompress.cache_record.to_text`.
        capacity: Of the records.
        kept: Last tokens that stay.
        unit: Tokens are dropped in multiples of this.
        dtype: Of keys and values.
    """
    count = dropped(int(length), kept, unit) if int(length) + tokens > capacity else 0
    if count:
        record = CacheRecord(from_text(form, constants), capacity, dtype)
        record.shift(memory, int(length), count)
        length.sub_(count)
        base.add_(count)


def _fake_update(
    memory: Tensor,
    length: Tensor,
    base: Tensor,
    key: Tensor,
    value: Tensor,
    constants: Sequence[Tensor],
    form: str,
    capacity: int | torch.SymInt,
    window: int,
    kept: int,
    unit: int,
    keys: int | torch.SymInt,
) -> tuple[Tensor, Tensor]:
    shapes = [(*x.shape[:2], keys, x.shape[3]) for x in (key, value)]
    return key.new_empty(shapes[0]), value.new_empty(shapes[1])


@opaque(
    "update_window(Tensor(a!) memory, Tensor(b!) length, Tensor(c!) base, Tensor key, Tensor value,"
    " Tensor[] constants, str form, SymInt capacity, int window, int kept, int unit, SymInt keys)"
    " -> (Tensor, Tensor)",
    fake=_fake_update,
)
def _update_window(
    memory: Tensor,  # [B, H, bytes] uint8
    length: Tensor,  # int64, one element
    base: Tensor,  # int64, one element
    key: Tensor,  # [B, H, T, D]
    value: Tensor,  # [B, H, T, V]
    constants: Sequence[Tensor],
    form: str,
    capacity: int,
    window: int,
    kept: int,
    unit: int,
    keys: int,
) -> tuple[Tensor, Tensor]:
    """The last ``window − 1`` tokens (or all there are), the new ones, zeros; then the new ones are appended.

    There may be more new tokens than the records hold: the last ones stay.

    Args:
        memory: Records; changed.
        length: Tokens in them; changed.
        base: Position of the first one; changed.
        key: New tokens.
        value: New tokens.
        constants: Tensors of the form.
        form: See :func:`~fxcompress.cache_record.to_text`.
        capacity: Of the records.
        window: Tokens that attention sees, the newest included.
        kept: Last tokens that stay when the records are full, at least ``window − 1``.
        unit: Tokens are dropped in multiples of this.
        keys: Tokens to return, at least those that are seen.
    """
    record = CacheRecord(from_text(form, constants), capacity, key.dtype)
    record.check(memory, 0, key[:, :, :0])
    done, first, new = int(length), int(base), key.shape[2]
    seen = min(done, window - 1)
    found = []
    for past, x in zip(record.read(memory, done, first), (key, value), strict=True):
        whole = x.new_zeros((*x.shape[:2], keys, x.shape[3]))
        whole[:, :, :seen] = past[:, :, done - seen :]
        whole[:, :, seen : seen + new] = x
        found.append(whole)
    if done + new > capacity:
        count = dropped(done + new, kept, unit)
        if count >= done:
            key, value = key[:, :, count - done :], value[:, :, count - done :]
            done = 0
        elif count:
            record.shift(memory, done, count)
            done -= count
        first += count
    record.append(memory, done, key, value, first)
    length.fill_(done + key.shape[2])
    base.fill_(first)
    return found[0], found[1]
