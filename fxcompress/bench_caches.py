"""Caches of transformers as measurements need them: which kind a model takes, and one of fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fxcompress.errors import FxCompressError
from fxcompress.evaluate import parameter_names


def cache_kind(kind: str, model: Any) -> str:
    """The cache to measure ``model`` with, where ``kind`` leaves it open (``"auto"``)."""
    if kind != "auto":
        return kind
    if "past_key_values" not in parameter_names(model):
        return "none"
    module = module_of(model)
    able = getattr(module, "can_generate", None)
    if callable(able) and not able():
        return "none"
    wrapped = module is not model or hasattr(model, "_orig_mod")
    compiled = wrapped or getattr(module, "_compiled_call_impl", None) is not None
    if not compiled:
        return "dynamic"
    return "static" if getattr(module, "_can_compile_fullgraph", False) else "dynamic"


def empty_entries(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer of a used cache, cut to length 0; nothing for caches of another kind."""
    entries = [
        (getattr(layer, "keys", None), getattr(layer, "values", None))
        for layer in getattr(cache, "layers", ())
    ]
    return [(k[:, :, :0], v[:, :, :0]) for k, v in entries if isinstance(k, Tensor) and isinstance(v, Tensor)]


def static_cache(model: Any, length: int, shapes: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A static cache, its memory allocated where an earlier variant has shown the shapes.

    A cache that allocates on first use works too, but has its first use compiled apart.
    """
    from transformers import StaticCache

    config: Any = config_of(model)
    if config is None:
        raise FxCompressError("bench: a static cache needs the model's config.", fix="use cache='dynamic'.")
    cache: Any = StaticCache(config=config, max_cache_len=length)
    module = module_of(model)
    weights = [] if module is None else [p for p in module.parameters() if p.is_floating_point()]
    if weights and len(shapes) == len(cache.layers):
        for layer, (keys, values) in zip(cache.layers, shapes, strict=True):
            layer.lazy_initialization(keys.to(weights[0]), values.to(weights[0]))
    return cache


def cache_of(output: Any, name: str) -> Any:
    """The cache a call returned.

    Raises:
        FxCompressError: it returned none.
    """
    found = getattr(output, "past_key_values", None)
    if found is None:
        raise FxCompressError(f"bench: {name} returned no cache to decode with.", fix="use cache='none'.")
    return found


def module_of(model: Any) -> nn.Module | None:
    """The module behind a compiled or compressed model."""
    if isinstance(model, nn.Module):
        inner = getattr(model, "_orig_mod", model)
    else:
        inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else None


def config_of(model: Any) -> Any:
    """The module's configuration, or None."""
    return getattr(module_of(model), "config", None)
