"""The memory of a decoding cache: one shape for all layers, or one per layer where layers were cut apart."""

from __future__ import annotations

from typing import Any

import torch

from fxcompress.errors import FxCompressError
from fxcompress.machine import physical_memory

__all__ = ["CacheShapes", "NotCoveredError", "allocate"]

CacheShapes = tuple[tuple[int, int], ...]
"""``(heads, size)`` of the keys of every layer."""


class NotCoveredError(FxCompressError):
    """The loop cannot serve this model, or this call; the message says why."""

    def __init__(self, why: str, *, this_call: bool = False) -> None:
        super().__init__(why)
        self.this_call = this_call


def allocate(
    cache: Any, config: Any, batch: int, dtype: torch.dtype, device: torch.device, shapes: CacheShapes
) -> None:
    """Give the cache its memory now; allocated by its first use, that use would be compiled apart."""
    shapes = shapes or _configured_shapes(config, len(cache.layers))
    if len(shapes) != len(cache.layers):
        raise NotCoveredError(f"its cache has {len(cache.layers)} layers, of which {len(shapes)} are known.")
    heads, sizes = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
    elements = 2 * batch * sum(h * size for h, size in shapes)
    needed = elements * cache.layers[0].max_cache_len * dtype.itemsize
    if device.type == "cpu" and needed > physical_memory() // 4:
        raise NotCoveredError(f"a cache for this length takes {needed / 1e9:.1f} GB at once", this_call=True)
    cache.early_initialization(batch, heads, sizes, dtype, device)


def _configured_shapes(config: Any, layers: int) -> CacheShapes:
    """Equal shapes for all layers, from the configuration."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    size = getattr(text, "head_dim", None)
    if size is None and heads and getattr(text, "hidden_size", None):
        size = text.hidden_size // text.num_attention_heads
    if not isinstance(heads, int) or not isinstance(size, int):
        raise NotCoveredError("its configuration does not tell the shape of its cache.")
    return ((heads, size),) * layers
