"""Buffers that hold an attention's keys and values between calls, found by dataflow.

    k_cache: [B, H, capacity, D]      written at the positions of the new tokens, then read by attention

Recognised are all spellings of such a write: ``index_copy``, ``index_put`` (``k[:, :, pos] = new``),
``slice_scatter``, a copy into a slice (``k[:, :, p : p + T] = new``), each in place or as a new value that is
copied back. Whatever reads the buffer afterwards, reads keys or values ``[B, H, capacity, D]``.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.analysis.attention import AttentionSite
from fxcompress.analysis.op_arguments import arguments, aten_names, op_name
from fxcompress.capture.program import Program

__all__ = ["BufferWrite", "CacheBuffers", "mutated_buffers", "same_value", "writes_of_attention"]

_TOKENS = 2
"""The dimension of a cache that counts tokens."""
_INTEGERS = (torch.int64, torch.int32)
_IN_PLACE = aten_names("index_copy_ index_put_")
_FUNCTIONAL = aten_names("index_copy index_put slice_scatter")
_SIZES = aten_names("sym_size sym_numel sym_stride size")


@dataclass(eq=False)
class BufferWrite:
    """How a buffer takes up new tokens.

    Args:
        name: The buffer.
        placeholder: Its input of the graph.
        write: The op that writes, in place or as a new value.
        new: What is written ``[B, H, T, D]``.
        position: Where: a tensor of T positions, or the first one as a number or a symbolic number.
        contents: Nodes whose value is the whole buffer after the write.
        gone: Nodes that only serve the write: itself, views it writes through, the copy back.
    """

    name: str
    placeholder: fx.Node
    write: fx.Node
    new: fx.Node
    position: Any
    contents: list[fx.Node] = field(default_factory=list)
    gone: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class CacheBuffers:
    """The buffers of one attention.

    Args:
        key, value: Its keys and values.
    """

    key: BufferWrite
    value: BufferWrite


def mutated_buffers(program: Program) -> set[fx.Node]:
    """Placeholders of buffers that some op of the graph writes into, also through views."""
    bases: dict[fx.Node, fx.Node] = {node: node for node in program.placeholders()}
    found = set()
    for node in program.graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        base = bases.get(source) if source is not None else None
        if base is None or node.op != "call_function":
            continue
        if _mutates(node):
            found.add(base)
            bases[node] = base
        elif _is_view(node):
            bases[node] = base
    return {node for node in found if node.name in program.weight_of}


def writes_of_attention(
    program: Program, site: AttentionSite, buffers: Collection[fx.Node], stop: Collection[fx.Node]
) -> CacheBuffers | str:
    """The buffers in which an attention keeps its keys and values, or why there are none to replace.

    Args:
        program: The program.
        site: The attention.
        buffers: See :func:`mutated_buffers`.
        stop: Weight sites' ops: what lies before them is another activation.
    """
    found = []
    for what, start in (("keys", site.key), ("values", site.value)):
        held = [node for node in _ancestors(start, stop) if node in buffers and _is_cache(node)]
        if len(held) != 1:
            several = f"{len(held)} buffers" if held else "no buffer [batch, heads, capacity, channels]"
            return f"its {what} are kept in {several} that the graph writes into"
        write = _write(program, held[0])
        if isinstance(write, str):
            return f"{write} (buffer {program.weight_of[held[0].name]!r} of its {what})"
        found.append(write)
    key, value = found
    if key.placeholder is value.placeholder:
        return "keys and values share one buffer"
    if not same_value(key.position, value.position):
        return "keys and values are written at different positions"
    return CacheBuffers(key, value)


def _ancestors(start: fx.Node, stop: Collection[fx.Node]) -> Iterator[fx.Node]:
    pending, seen = [start], {start}
    for node in pending:
        yield node
        if node in stop:
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)


def _is_cache(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.dim() == 4
        and value.is_floating_point()
        and all(isinstance(size, int) for size in value.shape)
    )


def _write(program: Program, placeholder: fx.Node) -> BufferWrite | str:
    """The one write into a buffer, or what it does instead."""
    reader = _Reader(program.weight_of[placeholder.name], placeholder)
    for node in program.graph.nodes:
        if node.op == "call_function" and any(source in reader.held for source in node.all_input_nodes):
            reason = reader.visit(node)
            if reason is not None:
                return reason
    if reader.found is None or (reader.pending and not reader.copied):
        return "no new tokens are written into it"
    return reader.found


class _Reader:
    """Follows a buffer through the graph.

    ``whole`` holds nodes whose value is the buffer now, ``views`` slices that a later copy may write into,
    ``held`` both and new values of the buffer that are not copied back yet.
    """

    def __init__(self, name: str, placeholder: fx.Node) -> None:
        self.name, self.placeholder = name, placeholder
        self.shape = tuple(placeholder.meta["val"].shape)
        self.whole: set[fx.Node] = {placeholder}
        self.views: dict[fx.Node, Any] = {}  # slice -> its first position
        self.found: BufferWrite | None = None
        self.pending: set[fx.Node] = set()
        self.serving: list[fx.Node] = []  # views of the whole that are written through
        self.copied = False

    @property
    def held(self) -> set[fx.Node]:
        return self.whole | set(self.views) | self.pending

    def visit(self, node: fx.Node) -> str | None:
        """Take notice of a node that reads the buffer; a reason when it cannot be replaced."""
        name = op_name(node)
        base = node.args[0] if node.args else None
        if name in _SIZES or (name not in _IN_PLACE and not _mutates(node) and self._is_size(node)):
            return None
        if base in self.whole and self.found is None and name == "aten::slice":
            return self._slice(node)
        if base in self.whole and (name in _IN_PLACE or name in _FUNCTIONAL):
            return self._at_positions(node, name)
        if name == "aten::copy_" and base in self.views:
            return self._into_slice(node)
        if name == "aten::copy" and base in self.views:  # what it held does not count
            return None
        if name == "aten::copy_" and base is self.placeholder and node.args[1] in self.pending:
            return self._copy_back(node)
        if self.pending and not self.copied and self.whole & set(node.all_input_nodes):
            return f"{name} reads what it held before the new tokens were written"
        if _mutates(node) and base in self.held:
            return f"it is changed by {name}, which is no write of new tokens at positions"
        if self.found is None:
            return f"{name} reads it before the new tokens are written (a cache that is shifted?)"
        return None

    def _is_size(self, node: fx.Node) -> bool:
        return not isinstance(node.meta.get("val"), Tensor | list | tuple)

    def _slice(self, node: fx.Node) -> str | None:
        given = arguments(node)
        start, end = given["start"] or 0, given["end"]
        dim = given["dim"] % 4
        everything = end is None or (isinstance(end, int) and end >= min(self.shape[dim], sys.maxsize))
        if given["step"] == 1 and start == 0 and everything and self._only_written(node):
            self.whole.add(node)
            self.serving.append(node)
            return None
        if given["step"] == 1 and dim == _TOKENS and self._only_written(node):
            self.views[node] = start
            return None
        return "a slice of it is read before the new tokens are written (a cache that is shifted?)"

    def _only_written(self, node: fx.Node) -> bool:
        """Whether a view serves nothing but writing through it."""
        writers = (*_IN_PLACE, "aten::copy_", "aten::copy")
        return all(
            (op_name(user) in writers or op_name(user) == "aten::slice") and user.args[0] is node
            for user in node.users
        )

    def _at_positions(self, node: fx.Node, name: str) -> str | None:
        given = arguments(node)
        if name.startswith("aten::index_copy"):
            dim, position, new = given["dim"] % 4, given["index"], given["source"]
        elif name == "aten::slice_scatter":
            dim, position, new = given["dim"] % 4, given["start"] or 0, given["src"]
            if given["step"] != 1:
                return "it is written with a step"
        else:
            indices = list(given["indices"])
            places = [place for place, index in enumerate(indices) if index is not None]
            if len(places) != 1 or given["accumulate"]:
                return "it is written at positions of several dimensions at once"
            dim, position, new = places[0], indices[places[0]], given["values"]
        if dim != _TOKENS:
            return f"tokens are counted along dimension {dim}, expected [batch, heads, tokens, channels]"
        gone = [node]
        if op_name(new) == "aten::copy" and new.args[0] in self.views:
            gone += [new, new.args[0]]
            new = new.args[1]
        if name in _FUNCTIONAL:
            self.pending.add(node)
        else:
            self.whole.add(node)
            self.copied = True
        return self._note(node, new, position, gone)

    def _into_slice(self, node: fx.Node) -> str | None:
        view = node.args[0]
        assert isinstance(view, fx.Node)
        self.copied = True
        return self._note(node, node.args[1], self.views[view], [node, view])

    def _copy_back(self, node: fx.Node) -> str | None:
        assert self.found is not None
        self.copied = True
        self.whole.add(node)
        self.found.contents.append(node)
        self.found.gone.insert(0, node)
        return None

    def _note(self, write: fx.Node, new: Any, position: Any, gone: list[fx.Node]) -> str | None:
        if self.found is not None:
            return "it is written more than once"
        shape = _shape(new)
        if shape is None or len(shape) != 4 or (*shape[:2], shape[3]) != (*self.shape[:2], self.shape[3]):
            return f"what is written has the shape {shape}, the buffer {self.shape}"
        if isinstance(position, int) and position < 0:
            return "it is written from its end"
        if isinstance(position, fx.Node):
            where = position.meta.get("val")
            if isinstance(where, Tensor) and (where.dim() > 1 or where.dtype not in _INTEGERS):
                return "it is written at positions that are no vector of integers"
        contents = [self.placeholder, *self.serving]
        if op_name(write) != "aten::copy_":
            contents.append(write)
        elif write.users:
            return "the slice that was written is read by itself"
        gone = [*gone, *reversed(self.serving)]
        self.found = BufferWrite(self.name, self.placeholder, write, new, position, contents, gone)
        return None


def same_value(one: Any, two: Any) -> bool:
    """Whether two arguments are equal, or computed alike from the same inputs by ops without side effects."""
    if one is two:
        return True
    if not isinstance(one, fx.Node) or not isinstance(two, fx.Node):
        if isinstance(one, list | tuple) and isinstance(two, list | tuple):
            return len(one) == len(two) and all(map(same_value, one, two))
        return type(one) is type(two) and bool(one == two)
    if one.op != "call_function" or one.target is not two.target or _mutates(one):
        return False
    keys = one.kwargs.keys() == two.kwargs.keys()
    return (
        keys
        and same_value(one.args, two.args)
        and all(same_value(one.kwargs[key], two.kwargs[key]) for key in one.kwargs)
    )


def _shape(node: Any) -> tuple[Any, ...] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments:
        return False
    alias = schema.arguments[0].alias_info
    return alias is not None and not alias.is_write
