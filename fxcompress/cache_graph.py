"""Graphs that keep keys and values in buffers of their own, rewritten to keep them in packed form.

    index_copy_(k_cache, 2, pos, k);  index_copy_(v_cache, 2, pos, v);  attention(q, k_cache, v_cache)
      →  seek_cache(memory, length, pos);  k, v = update_cache(memory, length, k, v);  attention(q, k, v)

What attention reads has the shape of the buffer, so whatever stands between them stays: repeated heads,
masks, soft caps, attention in plain operations.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import fxcompress.ops  # noqa: F401  (registers the operators)
from fxcompress.analysis.attention import AttentionSite, find_attention
from fxcompress.analysis.cache_buffers import (
    BufferWrite,
    CacheBuffers,
    mutated_buffers,
    writes_of_attention,
)
from fxcompress.analysis.sites import SiteKind, find_sites
from fxcompress.apply import AppliedGraph
from fxcompress.cache_record import CacheRecord, to_text
from fxcompress.capture.program import Program
from fxcompress.errors import BackendError
from fxcompress.forms import CacheForm, SiteForm

__all__ = ["GraphCache", "caches_of_program", "pack_caches"]

ops = torch.ops.fxcompress
aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class GraphCache:
    """One attention of a program, with the form its cache gets.

    Args:
        name: Parameter that its values come from last.
        buffers: Where the program keeps them.
        form: How they are to be kept.
        shape: ``(B, H, capacity)``.
        dtype: Of the buffers.
    """

    name: str
    buffers: CacheBuffers
    form: CacheForm
    shape: tuple[int, int, int]
    dtype: torch.dtype


def caches_of_program(program: Program, forms: Mapping[str, SiteForm]) -> list[GraphCache]:
    """The attentions whose cache has a form, with their buffers.

    Args:
        program: The program.
        forms: By parameter; those with a cache that is not exact count.

    Raises:
        BackendError: a cache is not kept in buffers, or in a way that cannot be replaced; the message says
            what was found.
    """
    wanted = {
        name: form.cache for name, form in forms.items() if form.cache is not None and not form.cache.exact
    }
    sites = find_sites(program)
    attentions = {
        site.value_weights[-1]: site for site in find_attention(program, sites) if site.value_weights
    }
    buffers = mutated_buffers(program)
    stop = {site.node for site in sites if site.kind is not SiteKind.OTHER}
    found = []
    for name, form in wanted.items():
        site = attentions.get(name)
        if site is None:
            raise BackendError(
                f"{name}: the program has no attention whose values come from it last.",
                fix="export the model that was compressed, or exclude this layer from the pass for caches.",
            )
        found.append(_graph_cache(program, name, site, form, buffers, stop))
    return found


def _graph_cache(
    program: Program,
    name: str,
    site: AttentionSite,
    form: CacheForm,
    buffers: set[fx.Node],
    stop: set[fx.Node],
) -> GraphCache:
    writes = writes_of_attention(program, site, buffers, stop)
    if isinstance(writes, str):
        raise BackendError(
            f"{name}: {writes}.",
            fix="export the model with a static cache, such as transformers'"
            " TorchExportableModuleWithStaticCache, or exclude this layer from the pass for caches.",
        )
    shapes = []
    for write, width in ((writes.key, form.key_width), (writes.value, form.value_width)):
        held = program.weights[write.name]
        batch, heads, capacity, channels = held.shape
        if (heads, channels) != (form.heads, width):
            raise BackendError(
                f"{name}: the buffer {write.name!r} holds {heads} heads of {channels} channels, expected"
                f" {form.heads} of {width}.",
                fix="export the model that was compressed.",
            )
        shapes.append(((batch, heads, capacity), held.dtype))
    if shapes[0] != shapes[1]:
        raise BackendError(
            f"{name}: keys and values are kept in buffers of different sizes or dtypes: {shapes[0]} and"
            f" {shapes[1]}.",
            fix="exclude this layer from the pass for caches.",
        )
    return GraphCache(name, writes, form, *shapes[0])


def pack_caches(applied: AppliedGraph, caches: list[GraphCache], hold: Any) -> None:
    """Let a rewritten graph keep its caches in packed form; buffers that nothing reads any more are dropped.

    Args:
        applied: The graph; changed in place.
        caches: What :func:`caches_of_program` found in its program.
        hold: Called with a name and a tensor: makes it a buffer and gives the node that reads it.

    Raises:
        BackendError: keys are read before the values are known.
    """
    written = {
        applied.node_of[write.placeholder]
        for cache in caches
        for write in (cache.buffers.key, cache.buffers.value)
    }
    for cache in caches:
        _Packer(applied, cache, written).pack(hold)
    graph = applied.module.graph
    for node in written:
        if not node.users and node.graph is graph:
            graph.erase_node(node)


class _Packer:
    def __init__(self, applied: AppliedGraph, cache: GraphCache, written: set[fx.Node]) -> None:
        self.graph, self.node_of = applied.module.graph, applied.node_of
        self.cache, self.written = cache, written
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}

    def pack(self, hold: Any) -> None:
        cache, key, value = self.cache, self.cache.buffers.key, self.cache.buffers.value
        anchor = min((self.node_of[key.write], self.node_of[value.write]), key=self.order.__getitem__)
        inputs = [self._mapped(item) for item in (key.new, value.new, key.position)]
        for node in inputs:
            self._hoist(node, anchor)
        memory, length, constants, text = self._buffers(hold)
        with self.graph.inserting_before(anchor):
            new = [self._cast(node, write) for node, write in zip(inputs[:2], (key, value), strict=True)]
            position = inputs[2]
            if not isinstance(position, fx.Node) or not isinstance(position.meta.get("val"), Tensor):
                device = self.cache_device(key)
                position = self.graph.call_function(
                    aten.full.default, ([1], position), {"dtype": torch.int64, "device": device}
                )
            place = (text, cache.shape[2])
            self.graph.call_function(
                ops.seek_cache.default, (memory, length, position, constants, *place, cache.dtype)
            )
            update = self.graph.call_function(
                ops.update_cache.default, (memory, length, *new, constants, *place, cache.shape[2])
            )
            parts = [self.graph.call_function(operator.getitem, (update, index)) for index in range(2)]
        for write, part in zip((key, value), parts, strict=True):
            part.meta["val"] = write.placeholder.meta["val"]
            self._redirect(write, part, anchor)

    def cache_device(self, write: BufferWrite) -> torch.device:
        device: torch.device = write.placeholder.meta["val"].device
        return device

    def _mapped(self, value: Any) -> Any:
        return self.node_of[value] if isinstance(value, fx.Node) else value

    def _cast(self, node: fx.Node, write: BufferWrite) -> fx.Node:
        """What is written, in the dtype of the buffer, as ``copy_`` would cast it."""
        if write.new.meta["val"].dtype == self.cache.dtype:
            return node
        return self.graph.call_function(aten.to.dtype, (node, self.cache.dtype))

    def _buffers(self, hold: Any) -> tuple[fx.Node, fx.Node, list[fx.Node], str]:
        """Memory, length, tensors of the form, and the form as text."""
        cache, write = self.cache, self.cache.buffers.key
        device, batch = self.cache_device(write), cache.shape[0]
        record = CacheRecord(cache.form, cache.shape[2], cache.dtype)
        text, tensors = to_text(cache.form)
        stem = write.name
        return (
            hold(f"{stem}_packed", record.allocate(batch, device)),
            hold(f"{stem}_length", torch.zeros((), dtype=torch.int64, device=device)),
            [hold(f"{stem}_form_{index}", tensor.to(device)) for index, tensor in enumerate(tensors)],
            text,
        )

    def _hoist(self, node: Any, anchor: fx.Node) -> None:
        """Move what a value is computed from before ``anchor``.

        Raises:
            BackendError: it reads or writes what is changed in between.
        """
        pending, late = [node], set()
        while pending:
            current = pending.pop()
            if not isinstance(current, fx.Node) or current in late:
                continue
            if self.order.get(current, -1) > self.order[anchor]:
                late.add(current)
                pending += current.all_input_nodes
        for current in sorted(late, key=self.order.__getitem__):
            schema = getattr(current.target, "_schema", None)
            stale = self.written & set(current.all_input_nodes)
            if stale or (schema is not None and schema.is_mutable):
                raise BackendError(
                    f"{self.cache.name}: {current.target} computes its values after its keys were written.",
                    fix="write keys and values into their buffers together, before attention.",
                )
            anchor.prepend(current)

    def _redirect(self, write: BufferWrite, part: fx.Node, anchor: fx.Node) -> None:
        """Let later readers of the buffer read ``part``, and take the write out."""
        gone = [self.node_of[node] for node in write.gone]
        for content in (self.node_of[node] for node in write.contents):
            for user in list(content.users):
                if user not in gone and self.order[user] > self.order[anchor]:
                    user.replace_input_with(content, part)
        for node in gone:
            self.graph.erase_node(node)
