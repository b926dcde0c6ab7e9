"""One attention's cache as transformers uses it, in packed form: of all tokens, or of a sliding window's.

    key, value = layer.update(key, value)   →   fxcompress::update_cache(memory, length, key, value, …)

Uncompiled, the operator gives attention dequantized keys and values; the compiling backends fuse it with the
attention that reads them (:mod:`fxcompress.backends.cpu.cached_attention`).

While a graph is captured, the number of tokens is a tensor and attention sees all places of the cache behind
a mask, so that one graph serves every step; otherwise it sees the tokens there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

import fxcompress.ops  # noqa: F401  (registers the operators)
from fxcompress.cache_record import CacheRecord, to_text
from fxcompress.errors import FxCompressError
from fxcompress.forms import CacheForm, ExactStore

__all__ = ["PackedLayer", "SlidingLayer", "Window"]

_STEP = 256
_SPARE = 64
"""Tokens that a sliding layer keeps beyond its window, so that as many can be taken back; and as many places
for new ones, before older ones are dropped again."""
_UPDATE = torch.ops.fxcompress.update_cache
_SLIDE = torch.ops.fxcompress.slide_cache
_UPDATE_WINDOW = torch.ops.fxcompress.update_window


class PackedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The cache of one attention.

    Args:
        form: How it is kept; None keeps it exact.
        capacity: Tokens there is room for; None grows as needed (outside of compiled code).
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, form: CacheForm | None, capacity: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.form = form
        self.grows = capacity is None
        self.capacity = _STEP if capacity is None else capacity
        self.memory: Tensor | None = None  # [B, H, bytes]
        self.length = torch.zeros((), dtype=torch.int64)
        self.record: CacheRecord | None = None
        self.text = ""
        self.constants: list[Tensor] = []

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Masks have the size of the cache in captured graphs, and of its content otherwise."""
        return torch.compiler.is_compiling()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values like these."""
        if self.form is None:
            heads, widths = key_states.shape[1], (key_states.shape[3], value_states.shape[3])
            self.form = CacheForm(ExactStore(), ExactStore(), heads, *widths)
        self.allocate(key_states.shape[0], key_states.dtype, key_states.device)

    def allocate(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Get memory for ``batch`` sequences."""
        assert self.form is not None
        self.dtype, self.device = dtype, device
        self.record = CacheRecord(self.form, self.capacity, dtype)
        self.text, constants = to_text(self.form)
        self.constants = [tensor.to(device) for tensor in constants]
        self.memory = self.record.allocate(batch, device)
        self.length = self.length.to(device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.memory)
            torch._dynamo.mark_static_address(self.length)
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        """Sequences, −1 before the first update."""
        return -1 if self.memory is None else self.memory.shape[0]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, H, T, D]``; what attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = self.capacity
        if not torch.compiler.is_compiling():
            keys = int(self.length) + key_states.shape[2]
            self.reserve(keys)
        key, value = _UPDATE(
            self.memory,
            self.length,
            key_states,
            value_states,
            self.constants,
            self.text,
            self.capacity,
            keys,
        )
        return key, value

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in all, when the layer may grow."""
        if not self.grows or tokens <= self.capacity:
            return
        self.capacity = self._larger(tokens)
        if self.record is not None and self.memory is not None:
            self.record, self.memory = self.record.grown(self.memory, self.capacity)

    def _larger(self, tokens: int) -> int:
        return -(-max(tokens, self.capacity * 5 // 4) // _STEP) * _STEP

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and the position of the first."""
        if torch.compiler.is_compiling():
            return self.capacity, 0
        return int(self.length) + query_length, 0

    def get_seq_length(self) -> Any:
        """Tokens in the cache; a tensor while a graph is captured."""
        return self.length if torch.compiler.is_compiling() else int(self.length)

    def get_max_length(self) -> int:
        """Tokens it can ever hold, −1 when it grows."""
        return -1 if self.grows else self.capacity

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        self.length.zero_()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what cannot be forgotten; the layers of a cache are asked before any of them is cropped."""
        if tokens_to_remove > 0:
            raise FxCompressError(
                f"crop({tokens_to_remove}): expected 0 or the negative number of tokens to remove."
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        self.check_crop(tokens_to_remove)
        length = int(self.length)
        kept = max(0, length + tokens_to_remove)
        if self.record is not None and self.memory is not None and kept < length:
            self.record.crop(self.memory, length, kept, self._origin())
            self.length.fill_(kept)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i continue sequence ``beam_idx[i]``."""
        if self.memory is not None:
            self.memory.copy_(self.memory.index_select(0, beam_idx.to(self.memory.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.memory is not None:
            self.memory = self.memory.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        if self.memory is not None:
            self.memory = self.memory[indices, ...].contiguous()

    def offload(self) -> None:
        """Move to the host."""
        if self.memory is not None:
            self.memory = self.memory.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Move back."""
        if self.memory is not None and self.memory.device != self.device:
            self.memory = self.memory.to(self.device, non_blocking=True)

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, length, D]`` as later steps see them."""
        if self.record is None or self.memory is None:
            raise FxCompressError("the cache is empty.", fix="call the model with it first.")
        return self.record.read(self.memory, int(self.length), self._origin())

    def _origin(self) -> int:
        """Position of the first token it holds."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of its memory, all overheads and unused places included."""
        return 0 if self.memory is None else self.memory.numel()


@dataclass(frozen=True)
class Window:
    """What the sliding layers of one cache have in common, so that one mask serves all.

    Args:
        size: Tokens that attention sees, the newest included.
        unit: Tokens are dropped in multiples of this: what one of the layers quantizes together.
        by_position: Whether a layer's codes depend on positions, which kernels do not know.
    """

    size: int
    unit: int = 1
    by_position: bool = False

    @classmethod
    def of(cls, size: int, forms: Iterable[CacheForm | None]) -> Window:
        """For layers with these forms."""
        found = [form for form in forms if form is not None]
        unit = math.lcm(*(form.unit for form in found))
        return cls(size, unit, any(form.by_position for form in found))

    @property
    def capacity(self) -> int:
        """Tokens of a record: those that stay, the rest of a block, and places for new ones."""
        return -(-(self.kept + self.unit + _SPARE) // _SPARE) * _SPARE

    @property
    def kept(self) -> int:
        """Last tokens that stay when others are dropped."""
        return self.size - 1 + _SPARE

    @property
    def spare(self) -> int:
        """New tokens that one call may bring without being cut off."""
        return self.capacity - self.kept - self.unit + 1


class SlidingLayer(PackedLayer):  # type: ignore[no-untyped-call]
    """The cache of an attention with a sliding window: tokens that left the window are dropped.

    Args:
        form: How it is kept; None keeps it exact. First tokens are not kept apart, they leave the window too.
        window: Of its attention.
        capacity: Tokens of all texts it is for; None for any number. It never takes memory for many more than
            a window's.
    """

    is_sliding = True

    def __init__(self, form: CacheForm | None, window: Window, capacity: int | None = None) -> None:
        super().__init__(None if form is None else form.without_sinks(), capacity)
        self.window, self.limit = window, self.capacity
        self.capacity = min(self.capacity, window.capacity)
        self.base = torch.zeros((), dtype=torch.int64)

    @property
    def slides(self) -> bool:
        """Whether tokens are dropped; else all there can be fit in."""
        return self.capacity >= self.window.capacity

    def allocate(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Get memory for ``batch`` sequences."""
        super().allocate(batch, dtype, device)
        self.base = self.base.to(device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.base)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in all, or for the window."""
        super().reserve(min(tokens, self.window.capacity))

    def _larger(self, tokens: int) -> int:
        return min(super()._larger(tokens), self.window.capacity)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, H, T, D]``; what attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        if torch.compiler.is_compiling() and self._by_places(tokens):
            if self.slides:
                _SLIDE(
                    *(self.memory, self.length, self.base, tokens, self.constants, self.text, self.capacity),
                    *(self.window.kept, self.window.unit, key_states.dtype),
                )
            return super().update(key_states, value_states)
        if not torch.compiler.is_compiling():
            self.reserve(int(self.base + self.length) + tokens)
            if not self.slides and self.record is not None and self.memory is not None:
                self.record.check(self.memory, int(self.length), key_states)
        keys, _ = self.get_mask_sizes(tokens)
        key, value = _UPDATE_WINDOW(
            *(self.memory, self.length, self.base, key_states, value_states, self.constants, self.text),
            *(self.capacity, self.window.size, self.window.kept, self.window.unit, keys),
        )
        return key, value

    def _by_places(self, tokens: int) -> bool:
        """Whether attention in a captured graph sees the places of the record, one graph for all steps."""
        return not self.slides or (not self.window.by_position and tokens <= self.window.spare)

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Columns of the mask, and the position of the first."""
        past = self.window.size - 1
        if not torch.compiler.is_compiling():
            seen = min(int(self.length), past)
            return seen + query_length, self.get_seq_length() - seen
        if not self.slides:
            return self.capacity, 0
        if not self._by_places(query_length):
            return past + query_length, (self.base + self.length - past).clamp_min(0)
        unit = self.window.unit
        count = (self.length - self.window.kept).clamp_min(0) // unit * unit
        full = self.length + query_length > self.capacity
        return self.capacity, self.base + torch.where(full, count, 0)

    def get_seq_length(self) -> Any:
        """Tokens seen so far; a tensor while a graph is captured."""
        total = self.base + self.length
        return total if torch.compiler.is_compiling() else int(total)

    def get_max_length(self) -> int:
        """Tokens it can ever see, −1 when it grows."""
        return -1 if self.grows else self.limit

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        super().reset()
        self.base.zero_()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse to take back so many tokens that dropped ones would be seen again.

        Raises:
            FxCompressError: saying how many can be taken back.
        """
        super().check_crop(tokens_to_remove)
        left = int(self.length) - self.window.size + 1
        if int(self.base) and tokens_to_remove < -max(left, 0):
            raise FxCompressError(
                f"crop({tokens_to_remove}): a window of {self.window.size} tokens would reach back to dropped"
                f" ones; at most {max(left, 0)} can be taken back now.",
                fix="crop less at a time.",
            )

    def _origin(self) -> int:
        return int(self.base)
