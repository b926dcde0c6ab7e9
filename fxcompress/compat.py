"""The one place that knows differences between the supported torch versions (2.11–2.13)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


def placeholder_source(node: fx.Node) -> str | None:
    """Dynamo's source path of a placeholder (``L['self']._modules['a']…``), or None when it has none."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None) or getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return str(name() if callable(name) else name)


def fake_mode_of(values: list[Any]) -> FakeTensorMode | None:
    """The fake mode of the first fake tensor among ``values``."""
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def trace_pre_dispatch(function: Any, fakes: list[Any], mode: FakeTensorMode | None) -> fx.GraphModule:
    """Trace ``function`` to pre-dispatch ATen on fake values, inside the mode they belong to."""
    traced = make_fx(function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)
    if mode is None:
        return traced(*fakes)
    with mode:
        return traced(*fakes)


@contextmanager
def no_dynamo_cache_limit(limit: int) -> Iterator[None]:
    """Raise Dynamo's per-function recompile limit within the block."""
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    old = getattr(config, name)
    setattr(config, name, max(old, limit))
    try:
        yield
    finally:
        setattr(config, name, old)
