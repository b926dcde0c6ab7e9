"""Attention that reads a packed cache in place, fused with the append.

    k, v = update_cache(memory, length, new k, new v, …);  sdpa(q, repeat(k), repeat(v), mask)
      →  attend_cached(q, new k, new v, mask, memory, length, …)

The kernel dequantizes a tile of keys at a time; no dequantized cache exists. Where the pattern is broken
(another op reads the keys, a form without a kernel), the operator gives dequantized tensors and attention
reads those.
"""

from __future__ import annotations

import ctypes
import json
import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from fxcompress.backends.cpu import attention, native
from fxcompress.backends.cpu.arguments import AttentionArguments
from fxcompress.backends.cpu.cached_form import CachedAttentionForm
from fxcompress.backends.cpu.generator import DTYPES, output_dtype
from fxcompress.backends.cpu.isa import Isa
from fxcompress.cache_record import from_text
from fxcompress.errors import FxCompressError
from fxcompress.forms.cache import CacheForm

__all__ = ["Fused", "chain", "find_fused", "form_of"]

logger = logging.getLogger("fxcompress.backends")
aten = torch.ops.aten

_MOST_CONSTANTS = 16
_SCHEMA = (
    "attend_cached(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor(a!) memory,"
    " Tensor(b!) length, Tensor[] constants, SymInt capacity, float scale, int form) -> Tensor"
)


class _Kernel(NamedTuple):
    number: int
    constants: list[int]  # places of its constants among the update's


@dataclass
class Fused:
    """What :func:`find_fused` found in one block.

    Args:
        forms: Attention → (the update it reads, its kernel).
        skipped: Nodes that are computed inside the fused operator: updates, their results, repeated heads.
    """

    forms: dict[fx.Node, tuple[fx.Node, _Kernel]] = field(default_factory=dict)
    skipped: set[fx.Node] = field(default_factory=set)

    def run(self, node: fx.Node, value_of: Callable[[Any], Any]) -> Tensor:
        """The attention ``node``, and the append."""
        update, kernel = self.forms[node]
        memory, length, key, value, given, _, capacity, _ = (value_of(argument) for argument in update.args)
        query, mask = value_of(node.args[0]), value_of(attention.mask_of(node))
        if mask is not None:
            mask = mask if mask.dtype is torch.bool else mask.to(torch.float32)
            mask = mask if mask.dim() == 4 else mask[None, None]
        scale = attention.scale_of(node, query.shape[3])
        constants = [given[place] for place in kernel.constants]
        out: Tensor = torch.ops.fxcompress_cpu.attend_cached(
            query, key, value, mask, memory, length, constants, capacity, scale, kernel.number
        )
        return out


def find_fused(graph: fx.Graph, isa: Isa) -> Fused:
    """Attentions of a block that read a packed cache which nothing else reads."""
    found = Fused()
    for node in graph.nodes:
        links = chain(node)
        if links is None:
            continue
        update, between = links
        kernel = _kernel(update, isa)
        if kernel is not None:
            found.forms[node] = (update, kernel)
            found.skipped |= {update, *between}
    return found


def chain(node: fx.Node, devices: tuple[str, ...] = ("cpu",)) -> tuple[fx.Node, set[fx.Node]] | None:
    """The update whose keys and values are all that ``node`` attends to, and the nodes between."""
    if not attention.is_plain(node, devices) or attention.is_causal(node):
        return None
    between: set[fx.Node] = set()
    updates = []
    for place, argument in enumerate(node.args[1:3]):
        source = attention.before_repeating(argument)
        if source.target is not operator.getitem or source.args[1] != place:
            return None
        updates.append(source.args[0])
        current = cast("fx.Node", argument)
        while current is not source:
            between.add(current)
            current = cast("fx.Node", current.args[0])
        between.add(source)
    update = updates[0]
    if updates[1] is not update or update.target is not torch.ops.fxcompress.update_cache.default:
        return None
    readers = {user for inner in between for user in inner.users} - between - {node}
    if readers or any(user not in between for user in update.users):
        logger.info("%s: its cache is read by other ops too; it is dequantized at every step", node.name)
        return None
    return update, between


def _kernel(update: fx.Node, isa: Isa) -> _Kernel | None:
    key = update.args[2].meta["val"]  # type: ignore[union-attr]
    if key.dtype not in DTYPES or key.device.type != "cpu":
        return None
    form = CachedAttentionForm.of(form_of(update), DTYPES[key.dtype])
    if form is None:
        logger.info("%s: no kernel reads this form; the cache is dequantized at every step", update.name)
        return None
    number = form.number(isa)
    if _TITLES.setdefault(number, form.title) != form.title or native.ensure_kernel(form, isa) is not None:
        return None
    return _Kernel(number, places_of(form, str(update.args[5])))


def form_of(update: fx.Node) -> CacheForm:
    """The form of the cache that ``update`` changes, without the content of its tensors."""
    given = [node.meta["val"] for node in cast("Sequence[fx.Node]", update.args[4])]
    # Dynamo makes sizes symbolic that another model's tables did not have; a kernel is for these ones.
    empty = [torch.empty([int(n) for n in t.shape], dtype=t.dtype, device="meta") for t in given]
    return from_text(str(update.args[5]), empty)


def places_of(form: CachedAttentionForm, text: str) -> list[int]:
    """Where the tensors that a kernel takes lie among those of the cache's form as text."""
    names: list[str] = json.loads(text)["tensors"]
    return [names.index(f".{name}") for name in form.constants]


_TITLES: dict[int, str] = {}  # two forms with one number: the second is not served


class CachedArguments(ctypes.Structure):
    """``fx_cached`` of ``templates/cached_arguments.j2``."""

    _fields_ = [
        ("attention", AttentionArguments),
        *((name, ctypes.c_void_p) for name in ("memory", "length")),
        *((name, ctypes.c_int64) for name in ("capacity", "record")),
        ("constants", ctypes.c_void_p * _MOST_CONSTANTS),
    ]


def _fake(
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,
    value: Tensor,  # [B, H / G, T, V]
    mask: Tensor | None,
    memory: Tensor,
    length: Tensor,
    constants: Sequence[Tensor],
    capacity: int,
    scale: float,
    form: int,
) -> Tensor:
    batch, heads, queries, _ = query.shape
    out = query.new_empty((batch, queries, heads, value.shape[3]), dtype=output_dtype(form))
    return out.transpose(1, 2)


def python_attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    memory: Tensor,
    length: Tensor,
    constants: Sequence[Tensor],
    capacity: int,
    scale: float,
    form: int,
) -> Tensor:
    """``fxcompress_cpu::attend_cached`` through ctypes."""
    if tuple(memory.shape[:2]) != tuple(key.shape[:2]):
        raise FxCompressError(
            f"the cache holds {memory.shape[0]} sequences, keys of {key.shape[0]} were given.",
            fix="use a new cache for another batch.",
        )
    if int(length) + key.shape[2] > capacity:
        raise FxCompressError(f"{int(length) + key.shape[2]} tokens do not fit a cache of {capacity}.")
    arguments, out, kept = native.attention_arguments(query, key, value, mask, False, scale, form)
    tensors = [constant.contiguous() for constant in constants]
    pointers = (ctypes.c_void_p * _MOST_CONSTANTS)(*(tensor.data_ptr() for tensor in tensors))
    record = memory.shape[2]
    cached = CachedArguments(arguments, memory.data_ptr(), length.data_ptr(), capacity, record, pointers)
    native.library_of(form).fx_run(ctypes.byref(cached))
    del kept, tensors
    return out


native.define(_SCHEMA, _fake, python_attend_cached)
