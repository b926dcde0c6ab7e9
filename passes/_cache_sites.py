"""Which attentions of a block have a cache to quantize, and the edit that says how it is kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxcompress.analysis.attention import AttentionSite, find_attention
from fxcompress.edits import Edit, Refuse, SetCache
from fxcompress.errors import CalibrationError, RecipeError
from fxcompress.forms import CacheForm, CacheStore, ExactStore
from fxcompress.pass_base import BlockContext
from fxcompress.passes._selection import SelectivePass


@dataclass(frozen=True, eq=False)
class CachedAttention:
    """One attention whose keys and values are cached.

    Args:
        name: The weight its values come from last; the form's key.
        site: The attention.
        heads: Key/value heads.
        key_width, value_width: Channels per head.
    """

    name: str
    site: AttentionSite
    heads: int
    key_width: int
    value_width: int

    def keys(self, value: Tensor) -> Tensor:
        """``[T, H, D]`` float32: all keys in ``value``, what the attention was given in one batch."""
        turned = value.transpose(-1, -2) if self.site.key_transposed else value
        return self._tokens(turned)

    def values(self, value: Tensor) -> Tensor:
        """``[T, H, D]`` float32."""
        return self._tokens(value)

    def _tokens(self, x: Tensor) -> Tensor:
        groups = x.shape[1] // self.heads if x.dim() == 4 else 1  # heads repeated for their queries
        own = x[:, ::groups].float()
        return own.transpose(1, 2).flatten(0, 1)  # [B·S, H, D], sequence by sequence


@dataclass(frozen=True)
class CachePass(SelectivePass):
    """A pass that gives caches their form; subclasses give :meth:`stores`."""

    provides: ClassVar[frozenset[str]] = frozenset({"quantized-cache"})

    @abstractmethod
    def stores(self, block: BlockContext, attention: CachedAttention) -> tuple[CacheStore, CacheStore, str]:
        """How keys and values of one attention are kept, and words for the report.

        Raises:
            FormatError: heads of this width cannot be kept like that.
        """

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetCache` for every attention of the block; an exact one for those left out."""
        self.check_patterns(block.program)
        for attention in attentions(block):
            if isinstance(attention, Refuse):
                yield attention
                continue
            held = block.state.form(attention.name).cache
            sizes = (attention.heads, attention.key_width, attention.value_width)
            left_out = self.unselected(block.program, attention.name)
            if left_out is None:
                key, value, reason = self.stores(block, attention)
                yield SetCache(attention.name, CacheForm(key, value, *sizes), reason)
            elif held is None:
                yield SetCache(attention.name, CacheForm(ExactStore(), ExactStore(), *sizes), left_out)


def attentions(block: BlockContext) -> Iterator[CachedAttention | Refuse]:
    """The attentions whose op lies in this block, or why one cannot be handled.

    Raises:
        RecipeError: the whole model has no attention over its own tokens.
    """
    everywhere = find_attention(block.program)
    if not everywhere:
        raise RecipeError(
            "the model has no attention, hence no cache of keys and values.",
            fix="leave passes for caches out of the recipe.",
        )
    order = {node: index for index, node in enumerate(block.program.graph.nodes)}
    mine = {order[site.node] for site in block.sites}
    if not mine:
        return
    inside = range(min(mine), max(mine) + 1)
    weights = [name for site in everywhere for name in site.value_weights]
    for site in everywhere:
        if order[site.node] not in inside:
            continue
        if not site.value_weights:
            continue  # values that come from no weight are no cache of the model's own tokens
        name = site.value_weights[-1]
        widths = _width(site.key, transposed=site.key_transposed), _width(site.value)
        if site.kv_heads is None or None in widths:
            yield Refuse(name, "the number of its attention's heads or channels is not fixed")
        elif weights.count(name) > 1:
            yield Refuse(name, "it gives values to several attentions, whose caches no name tells apart")
        else:
            key_width, value_width = widths
            assert key_width is not None
            assert value_width is not None
            yield CachedAttention(name, site, site.kv_heads, key_width, value_width)


def finite(x: Tensor, what: str) -> Tensor:
    """``x``, checked.

    Raises:
        CalibrationError: NaN or inf.
    """
    if not bool(torch.isfinite(x).all()):
        raise CalibrationError(f"{what}: NaN or inf on the calibration data.")
    return x


def _width(node: fx.Node, *, transposed: bool = False) -> int | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    size: int | torch.SymInt = value.shape[-2 if transposed else -1]
    return size if isinstance(size, int) else None
