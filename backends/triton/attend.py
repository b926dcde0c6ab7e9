"""Calls of the kernels that read and append to a quantized cache; nothing waits for the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.backends.triton.cache_form import (
    AttendForm,
    WriteForm,
    field_names,
    field_offsets,
)
from fxcompress.backends.triton.configs import Config
from fxcompress.backends.triton.generator import load_kernel
from fxcompress.backends.triton.launch import launch, run_hadamard
from fxcompress.backends.triton.row_forms import HadamardForm
from fxcompress.cache_record import CacheRecord
from fxcompress.errors import FxCompressError
from fxcompress.forms.cache_transforms import hadamard

__all__ = ["MOST_ROWS", "append", "attend", "splits_for"]

MOST_ROWS = 64
"""Queries × query heads per key head that one program holds."""
_KEEP_TOKENS = 16


def splits_for(heads: int, capacity: int, tile: int, processors: int) -> int:
    """Programs that share the tokens of one head: two per multiprocessor, at least two tiles each."""
    wanted = math.ceil(2 * processors / max(1, heads))
    return max(1, min(wanted, capacity // (2 * tile), 64))


def attend(
    form: AttendForm,
    record: CacheRecord,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, key_heads, T, D], new
    value: Tensor,  # [B, key_heads, T, V], new
    mask: Tensor | None,  # [B or 1, H or 1, Q, keys], bool or float32
    memory: Tensor,  # [B, key_heads, bytes]
    length: Tensor,  # [1] int64
    scale: float,
    splits: int,
) -> Tensor:
    """``softmax(scale · q kᵀ + mask) v`` over all tokens, the new ones included: ``[B, H, Q, V]``.

    Raises:
        FxCompressError: the cache is for other sequences.
    """
    batch, heads, queries, _ = query.shape
    key_heads, new = key.shape[1], key.shape[2]
    check(record, memory, key)
    group = heads // key_heads
    rows = max(16, 1 << (group * queries - 1).bit_length())
    count = batch * key_heads
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    float32: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    part = torch.empty(count, splits + 1, rows, form.value_width, **float32)
    sums = torch.empty(count, splits + 1, rows, 2, **float32)
    exact = [torch.empty(count, rows, form.value_width, **float32)] if form.value.rotated else []
    rotated = _rotated(query) if form.key.rotated else query
    arguments: list[Any] = [rotated, *([query] if form.key.rotated else []), key, value, memory, length]
    strides: list[int] = []
    if mask is not None:
        whole = mask.expand(batch, heads, queries, mask.shape[3])
        strides = list(whole.stride())
        arguments.append(whole.view(torch.uint8) if mask.dtype is torch.bool else whole)
    arguments += [part, sums, *exact, memory.stride(1)]
    arguments += field_offsets(form.key, form.value, record.offsets())
    arguments += [*strides, key_heads, group, queries, new, scale]
    constants = {"ROWS": rows, "SPLITS": splits}
    launch(form, (splits + 1, count), arguments, constants, Config(rows, 0, 0, splits, 4, 2))
    out = torch.empty(batch, heads, queries, form.value_width, dtype=query.dtype, device=query.device)
    plain = [torch.empty_like(out)] if exact else []
    padded = 1 << splits.bit_length()
    merge = load_kernel(form, "merge")
    merge[(count, group * queries)](
        part, sums, *exact, out, *plain, group * queries, **constants, PADDED=padded
    )
    return _rotated(out) + plain[0] if plain else out


def append(
    forms: Sequence[WriteForm], record: CacheRecord, memory: Tensor, length: Tensor, new: Sequence[Tensor]
) -> None:
    """Write the new keys and values behind ``length`` tokens and add their number to it.

    Args:
        forms: Of keys and values.
        record: Where fields lie.
        memory: ``[B, H, bytes]``; changed.
        length: ``[1]`` int64; changed.
        new: Keys and values ``[B, H, T, width]``.
    """
    check(record, memory, new[0])
    offsets = record.offsets()
    tokens = new[0].shape[2]
    heads = memory.shape[0] * memory.shape[1]
    for side, form, x in zip(("key", "value"), forms, new, strict=True):
        half = form.half
        places = [offsets[f"{side}.{name}"] for name in field_names(half)]
        turn = [_matrix(form.width, memory.device)] if half.rotated else []
        arguments = [x.contiguous(), memory, length, *turn, memory.stride(1), *places, tokens]
        # At most: what is pending in the ring, and all new tokens.
        units = -(-(tokens + form.slots) // form.unit)
        launch(form, (units, heads), arguments, {}, Config(1, 0, 0, 1, 4, 1))
        if form.slots or half.sinks:
            load_kernel(form, "keep")[(-(-tokens // _KEEP_TOKENS), heads)](*arguments, TOKENS=_KEEP_TOKENS)
    length.add_(tokens)


def check(record: CacheRecord, memory: Tensor, key: Tensor) -> None:
    """Refuse a cache of other sequences; how full it is, only the device knows.

    Raises:
        FxCompressError: naming both.
    """
    if tuple(memory.shape[:2]) != tuple(key.shape[:2]) or memory.shape[2] != record.nbytes:
        raise FxCompressError(
            f"the cache is {tuple(memory.shape)}, keys of shape {tuple(key.shape)} need"
            f" {(*key.shape[:2], record.nbytes)}.",
            fix="use a new cache for another batch.",
        )


def _rotated(x: Tensor) -> Tensor:
    """Heads turned by the Hadamard transform, over parts as long as the largest power of two in them."""
    size = x.shape[-1] & -x.shape[-1]
    if size == 1:
        return x
    name = str(x.dtype).removeprefix("torch.")
    return run_hadamard(HadamardForm(size, name), x)


@functools.lru_cache(maxsize=16)
def _matrix(width: int, device: torch.device) -> Tensor:
    """``[width, width]``: the rotation of a head as one matrix."""
    size = width & -width
    whole: Tensor = torch.block_diag(*[hadamard(size)] * (width // size))
    return whole.contiguous().to(device)
