"""Parts of a form that exist in training only: quantizers that gradients pass, and the rounded cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.forms import (
    ActivationQuantizer,
    BlockStore,
    CacheStore,
    Emit,
    StaticPerTensor,
    Within,
)
from fxcompress.ops.straight_through import straight_through

__all__ = ["LearnedStep", "StraightThrough", "round_as_cached"]


@dataclass(frozen=True, eq=False)
class StraightThrough(ActivationQuantizer):
    """Computes what ``inner`` computes; gradients pass it as if it did nothing."""

    inner: ActivationQuantizer

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """The inner quantizer's value."""
        value = self.inner.emit(x, dtype, Within(emit, "inner"))
        return emit.call(torch.ops.fxcompress.straight_through.default, x, value)


@dataclass(frozen=True, eq=False)
class LearnedStep(ActivationQuantizer):
    """Computes what a static quantizer computes; its scale is trained with LSQ's gradient."""

    inner: StaticPerTensor

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """One operator."""
        scale, zero = emit.tensor("inner.scale"), emit.tensor("inner.zero")
        return emit.call(torch.ops.fxcompress.learned_step.default, x, scale, zero, self.inner.bits)


@dataclass(frozen=True, eq=False)
class round_as_cached:  # noqa: N801  (called like a function, by name in graphs)
    """Keys or values as a quantized cache gives them back; gradients pass straight through.

    A call over a whole sequence cannot show each query its own window of exact recent tokens, so all tokens
    but the sinks are rounded, which is the harder case (LLM-QAT rounds all). Tokens that do not fill a block
    of the store stay exact, as they do in the cache.

    Args:
        store: How the cache keeps them.
        heads: Key/value heads before they are repeated for their query group.
        transposed: Whether they come as ``[..., D, T]``.
    """

    store: CacheStore
    heads: int
    transposed: bool
    __name__ = "round_as_cached"

    def __call__(self, x: Tensor) -> Tensor:
        """``x: [B, H, T, D]`` (or ``[B, H, D, T]``) rounded."""
        if not isinstance(self.store, BlockStore):
            return x
        whole = x.detach().transpose(-1, -2) if self.transposed else x.detach()
        if whole.dim() != 4 or whole.shape[1] % self.heads:
            raise FormatError(
                f"a cache of {self.heads} heads is to be trained with, but attention reads {tuple(x.shape)}."
            )
        repeats = whole.shape[1] // self.heads
        rounded = self._rounded(whole[:, ::repeats])
        if repeats > 1:
            rounded = rounded.repeat_interleave(repeats, 1)
        return straight_through(x, rounded.transpose(-1, -2) if self.transposed else rounded)

    def _rounded(self, x: Tensor) -> Tensor:
        store = self.store
        assert isinstance(store, BlockStore)
        first = min(store.sinks, x.shape[2])
        count = (x.shape[2] - first) // store.block * store.block
        if not count:
            return x
        y = x[:, :, first : first + count].to(torch.float32)
        places = torch.arange(first, first + count, device=x.device)
        for transform in store.transforms:
            y = transform.apply(y, places)
        y = store.decode(store.encode(y), x.shape[-1])
        for transform in reversed(store.transforms):
            y = transform.undo(y, places)
        return torch.cat([x[:, :, :first], y.to(x.dtype), x[:, :, first + count :]], 2)
