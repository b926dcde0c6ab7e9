"""A cache of transformers that keeps keys and values in packed form.

    key, value = cache.update(key, value, layer)   →   fxcompress::update_cache(memory, length, key, value, …)

Uncompiled, the operator gives attention dequantized keys and values; the compiling backends fuse it with the
attention that reads them (:mod:`fxcompress.backends.cpu.cached_attention`).

While a graph is captured, the number of tokens is a tensor and attention sees all places of the cache behind
a mask, so that one graph serves every step; otherwise it sees the tokens there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

import fxcompress.ops  # noqa: F401  (registers the operators)
from fxcompress.cache_record import CacheRecord, to_text
from fxcompress.errors import FxCompressError
from fxcompress.forms import CacheForm, ExactStore

__all__ = ["PackedCache", "PackedLayer"]

_STEP = 256
_UPDATE = torch.ops.fxcompress.update_cache


class PackedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The cache of one attention.

    Args:
        form: How it is kept; None keeps it exact.
        capacity: Tokens there is room for; None grows as needed (outside of compiled code).
        sliding: Whether its attention has a sliding window. All tokens are kept, the mask hides the older
            ones.
    """

    is_croppable = True

    def __init__(self, form: CacheForm | None, capacity: int | None = None, *, sliding: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = sliding
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
        self.capacity = -(-max(tokens, self.capacity * 5 // 4) // _STEP) * _STEP
        if self.record is not None and self.memory is not None:
            self.record, self.memory = self.record.grown(self.memory, self.capacity)

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

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise FxCompressError(
                f"crop({tokens_to_remove}): expected 0 or the negative number of tokens to remove."
            )
        length = int(self.length)
        kept = max(0, length + tokens_to_remove)
        if self.record is not None and self.memory is not None and kept < length:
            self.record.crop(self.memory, length, kept)
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
        return self.record.read(self.memory, int(self.length))

    @property
    def nbytes(self) -> int:
        """Bytes of its memory, all overheads and unused places included."""
        return 0 if self.memory is None else self.memory.numel()


class PackedCache(Cache):
    """A cache whose attention layers keep keys and values in packed form.

    Args:
        config: Of the model.
        forms: By the model's layer number; other attention layers are kept exact, layers that are no
            attention as transformers keeps them.
        capacity: Tokens there is room for; None grows as needed. In compiled code a cache cannot grow:
            :meth:`reserve` before the call.
        offloading: See :class:`transformers.Cache`.

    Raises:
        FxCompressError: the configuration has other layers than ``forms``.

    Example:
        >>> cache = small.new_cache()  # doctest: +SKIP
        >>> small(input_ids, past_key_values=cache, use_cache=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: Any,
        forms: Mapping[int, CacheForm],
        capacity: int | None = None,
        *,
        offloading: bool = False,
    ) -> None:
        layers: list[Any] = list(DynamicCache(config=config).layers)
        unknown = sorted(number for number in forms if number >= len(layers))
        if unknown:
            raise FxCompressError(
                f"forms for the layers {unknown}, the cache of this model has {len(layers)}."
            )
        for number, layer in enumerate(layers):
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                sliding = isinstance(layer, DynamicSlidingWindowLayer)
                layers[number] = PackedLayer(forms.get(number), capacity, sliding=sliding)
            elif number in forms:
                raise FxCompressError(
                    f"layer {number}: its cache is a {type(layer).__name__}, which cannot be packed.",
                    fix="exclude this layer from the cache's quantization.",
                )
        super().__init__(layers=layers, offloading=offloading)

    @property
    def packed(self) -> list[PackedLayer]:
        """The layers of attentions."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in all; compiled code needs it before the call."""
        for layer in self.packed:
            layer.reserve(tokens)

    def allocate(self, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Get memory for ``batch`` sequences now; whether all layers could, which needs their forms."""
        for layer in self.packed:
            if layer.form is not None and not layer.is_initialized:
                layer.allocate(batch, dtype, device)
        return all(isinstance(layer, PackedLayer) and layer.is_initialized for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed layers' memory."""
        return sum(layer.nbytes for layer in self.packed)
