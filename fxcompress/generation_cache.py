"""The caches of a compressed model: which layer an attention's form belongs to, and making caches."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxcompress.decoding_cache import CacheShapes, NotCoveredError, allocate
from fxcompress.errors import BindingError, FxCompressError, RecipeError
from fxcompress.forms import CacheForm, SiteForm
from fxcompress.registry import PACKED_CACHE

__all__ = ["CacheMaker", "capacity_for", "check_has_cache", "fixed_cache"]

_LEAST = 256
_CANDIDATES = 64
"""Tokens an assistant may propose beyond the end of the text."""


def capacity_for(length: int, limit: int | None = None) -> int:
    """Places for ``length`` tokens: a power of two or the ``limit``, so that few graphs serve all."""
    capacity = max(_LEAST, 1 << (length - 1).bit_length())
    return min(capacity, limit) if limit is not None and length <= limit else capacity


def check_has_cache(model: nn.Module) -> None:
    """Refuse a model without a key/value cache that can be replaced.

    Raises:
        RecipeError: saying what it lacks.
    """
    config = getattr(model, "config", None)
    able = getattr(model, "can_generate", None)
    fix = "leave passes for caches out of the recipe."
    if config is None or able is None or not able():
        raise RecipeError(f"{type(model).__name__} does not generate text: it keeps no cache.", fix=fix)
    if getattr(config, "is_encoder_decoder", False):
        raise RecipeError(
            f"{type(model).__name__} is an encoder-decoder; its caches cannot be replaced.", fix=fix
        )


class CacheMaker:
    """Makes the caches of one model.

    Args:
        module: The model.
        forms: Forms by parameter; those with a cache count.

    Raises:
        BindingError: a form belongs to no numbered layer of the module.
    """

    def __init__(self, module: Any, forms: Mapping[str, SiteForm]) -> None:
        self._module = module
        self.layers: dict[int, CacheForm] = {}
        for name, form in forms.items():
            if form.cache is not None:
                self.layers[_layer_number(module, name)] = form.cache

    def new(self, capacity: int | None = None) -> Any:
        """An empty packed cache.

        Raises:
            FxCompressError: the recipe quantized no cache.
        """
        if not self.layers:
            raise FxCompressError(
                "the cache of this model is not quantized.",
                fix="compress it with a recipe such as 'kv8', or add quantize-kv-cache to the recipe.",
            )
        module, _, name = PACKED_CACHE.partition(":")
        packed: Any = getattr(importlib.import_module(module), name)
        return packed(self._module.config, self.layers, capacity)

    def for_generate(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any | None:
        """A cache for one call of transformers' ``generate``, or None when it needs none of ours."""
        given = {"past_key_values", "cache_implementation"} & {k for k, v in kwargs.items() if v is not None}
        if not self.layers or given or kwargs.get("use_cache") is False:
            return None
        config = kwargs.get("generation_config") or self._module.generation_config

        def option(name: str, default: Any) -> Any:
            found = kwargs.get(name, getattr(config, name, None))
            return default if found is None else found

        if config.use_cache is False or option("cache_implementation", None) is not None:
            return None
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if ids is None:
            return self.new()
        length = option("max_length", 20)
        if option("max_new_tokens", None) is not None:
            length = ids.shape[1] + option("max_new_tokens", None)
        cache = self.new(capacity_for(max(length, ids.shape[1]) + _CANDIDATES))
        copies = max(option("num_beams", 1), option("num_return_sequences", 1))
        cache.allocate(ids.shape[0] * copies, self._module.dtype, ids.device)
        return cache

    def before_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Make room in a cache given to a call: compiled code cannot."""
        cache: Any = kwargs.get("past_key_values")
        if not self.layers or not hasattr(cache, "reserve"):
            return
        ids = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        if ids is not None:
            cache.reserve(cache.get_seq_length() + ids.shape[1])
            cache.allocate(ids.shape[0], self._module.dtype, ids.device)


def fixed_cache(
    module: Any,
    caches: CacheMaker | None,
    batch: int,
    capacity: int,
    device: torch.device,
    shapes: CacheShapes = (),
) -> Any:
    """A cache that has its memory, which never moves.

    Allocated by its first use, that use would be compiled apart.

    Raises:
        NotCoveredError: its sizes are unknown, or it would not fit.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if caches is not None:
        packed = caches.new(capacity)
        if not packed.allocate(batch, dtype, device):
            raise NotCoveredError("layers of its cache are not packed.")
        return packed
    from transformers import StaticCache

    cache: Any = StaticCache(config=module.config, max_cache_len=capacity)
    allocate(cache, module.config, batch, dtype, device, shapes)
    return cache


def _layer_number(module: nn.Module, name: str) -> int:
    """The number under which the module that owns a weight keeps its cache."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        number = getattr(module.get_submodule(".".join(parts[:end])), "layer_idx", None)
        if type(number) is int:
            return number
    raise BindingError(
        f"{name}: no module around it says which layer of the cache it uses (layer_idx).",
        fix="exclude this weight from the passes for caches.",
    )
