"""Read a packed key/value cache and append to it: one operator, so that nothing can come between.

Attention sees past tokens as they are kept and the new ones as they are; then these are appended. Opaque:
how many tokens there are is known at run time only. Graphs that say at which positions they write have an
operator before it that brings the cache to that length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.cache_record import CacheRecord, from_text
from fxcompress.errors import FxCompressError
from fxcompress.ops._library import opaque

__all__: list[str] = []


def _fake(
    memory: Tensor,
    length: Tensor,
    key: Tensor,
    value: Tensor,
    constants: Sequence[Tensor],
    form: str,
    capacity: int | torch.SymInt,
    keys: int | torch.SymInt,
) -> tuple[Tensor, Tensor]:
    shapes = [(*x.shape[:2], keys, x.shape[3]) for x in (key, value)]
    return key.new_empty(shapes[0]), value.new_empty(shapes[1])


@opaque(
    "update_cache(Tensor(a!) memory, Tensor(b!) length, Tensor key, Tensor value, Tensor[] constants,"
    " str form, SymInt capacity, SymInt keys) -> (Tensor, Tensor)",
    fake=_fake,
)
def _update_cache(
    memory: Tensor,  # [B, H, bytes] uint8
    length: Tensor,  # int64, one element
    key: Tensor,  # [B, H, T, D]
    value: Tensor,  # [B, H, T, V]
    constants: Sequence[Tensor],
    form: str,
    capacity: int,
    keys: int,
) -> tuple[Tensor, Tensor]:
    """Keys ``[B, H, keys, D]`` and values of all tokens, zeros behind them; then the new ones are appended.

    Args:
        memory: Records, see :class:`~fxcompress.cache_record.CacheRecord`; changed.
        length: Tokens in the cache; increased by T.
        key: New tokens.
        value: New tokens.
        constants: Tensors of the form.
        form: See :func:`~fxcompress.cache_record.to_text`.
        capacity: Of the records.
        keys: Tokens to return, at least those there are.
    """
    record = CacheRecord(from_text(form, constants), capacity, key.dtype)
    done, new = int(length), key.shape[2]
    record.check(memory, done, key)
    found = []
    for past, x in zip(record.read(memory, done), (key, value), strict=True):
        whole = x.new_zeros((*x.shape[:2], keys, x.shape[3]))
        whole[:, :, :done] = past[:, :, :keys]
        whole[:, :, done : done + new] = x[:, :, : max(0, keys - done)]
        found.append(whole)
    record.append(memory, done, key, value)
    length.add_(new)
    return found[0], found[1]


def _fake_seek(
    memory: Tensor,
    length: Tensor,
    position: Tensor,
    constants: Sequence[Tensor],
    form: str,
    capacity: int | torch.SymInt,
    dtype: torch.dtype,
) -> None:
    return None


@opaque(
    "seek_cache(Tensor(a!) memory, Tensor(b!) length, Tensor position, Tensor[] constants, str form,"
    " SymInt capacity, ScalarType dtype) -> ()",
    fake=_fake_seek,
)
def _seek_cache(
    memory: Tensor,  # [B, H, bytes] uint8
    length: Tensor,  # int64, one element
    position: Tensor,  # [T] or one element
    constants: Sequence[Tensor],
    form: str,
    capacity: int,
    dtype: torch.dtype,
) -> None:
    """Forget the tokens from the first position on, where new ones will be written.

    Args:
        memory: Records; changed where tokens are taken out of their codes.
        length: Tokens in the cache; becomes the first position.
        position: Where the next tokens are written: consecutive places, the first not behind the end.
        constants: Tensors of the form.
        form: See :func:`~fxcompress.cache_record.to_text`.
        capacity: Of the records.
        dtype: Of keys and values.

    Raises:
        FxCompressError: positions are not consecutive, or leave a gap behind the tokens there are.
    """
    places = position.reshape(-1)
    first, done = int(places[0]), int(length)
    if places.numel() > 1 and not torch.equal(
        places - first, torch.arange(len(places), device=places.device)
    ):
        raise FxCompressError(
            f"new tokens are written at the places {places.tolist()}; a packed cache takes consecutive ones.",
            fix="write a text's tokens in order.",
        )
    if not 0 <= first <= done:
        raise FxCompressError(
            f"new tokens are written from place {first} on, and the cache holds {done} tokens.",
            fix="write a text's tokens in order, from place 0 on.",
        )
    if first < done:
        CacheRecord(from_text(form, constants), capacity, dtype).crop(memory, done, first)
        length.fill_(first)
