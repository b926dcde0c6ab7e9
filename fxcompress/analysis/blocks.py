"""Blocks: the repeated segments of a deep model, found by graph structure.

A graph is a sequence of nodes in program order. Every node gets a *signature* (op, constants, result type);
a model with L equal layers of p nodes shows the signature sequence repeating with period p. The period that
explains the longest stretch is taken, the phase is chosen where the fewest values cross from one segment to
the next, and segments are kept only as far as they are exactly isomorphic, argument by argument.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

_LABEL = "fxcompress_block"
_MIN_REPEATS = 2
_MIN_NODES = 4
_WEIGHT_CROSSING = 100  # more than the activations that ever cross between two layers


@dataclass(frozen=True, eq=False)
class Block:
    """A consecutive segment of a graph.

    Args:
        index: 0-based position.
        name: For messages, e.g. ``"block 3/30"`` or ``"prologue"``.
        nodes: Its nodes in graph order.
        inputs: External nodes its nodes read (placeholders, attributes and values of earlier blocks), ordered
            by first use, so that isomorphic blocks list corresponding inputs at equal positions.
        outputs: Values read by later blocks or by the graph output, in graph order.
        structure: Hash; equal for blocks that compute the same function of their inputs.
    """

    index: int
    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    structure: str

    @property
    def repeated(self) -> bool:
        """Whether it is one of the repeated segments, rather than what lies before or behind them."""
        return self.name.startswith("block ")


def find_blocks(graph: fx.Graph) -> list[Block]:
    """Split a graph into consecutive blocks that together cover every node but placeholders and the output.

    Without repetition the whole graph is one block. Attribute reads (``get_attr``) belong to no block: they
    are inputs of the blocks that use them. A graph whose nodes say which block they are of (its layers were
    alike before they were cut, see :func:`label_blocks`) is split so.
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    if not nodes:
        return []
    if all(_LABEL in node.meta for node in nodes):
        runs = [list(run) for _, run in itertools.groupby(nodes, key=lambda node: node.meta[_LABEL])]
        return [make_block(index, run[0].meta[_LABEL], run) for index, run in enumerate(runs)]
    start, period, repeats = _repetition(nodes)
    cuts = [0]
    if repeats >= _MIN_REPEATS:
        cuts += [start + k * period for k in range(repeats + 1)]
    cuts.append(len(nodes))
    bounds = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    first_repeat = bounds.index((start, start + period)) if repeats >= _MIN_REPEATS else -1
    blocks = []
    for index, (a, b) in enumerate(bounds):
        position = index - first_repeat
        if repeats < _MIN_REPEATS:
            name = "whole graph"
        elif position < 0:
            name = "prologue"
        elif position < repeats:
            name = f"block {position + 1}/{repeats}"
        else:
            name = "epilogue"
        blocks.append(make_block(index, name, nodes[a:b]))
    return blocks


def label_blocks(graph: fx.Graph, blocks: Sequence[Block]) -> None:
    """Let the nodes of a graph say which block they are of, as the nodes of ``blocks`` of equal names are.

    Args:
        graph: A changed copy of the graph that the blocks are of; only its nodes' ``meta`` is changed.
        blocks: Those of the original; some may be missing from ``graph``.
    """
    present = {node.name for node in graph.nodes}
    remaining = [block for block in blocks if any(node.name in present for node in block.nodes)]
    repeats = [block for block in remaining if block.repeated]
    label = {}
    for block in remaining:
        name = f"block {repeats.index(block) + 1}/{len(repeats)}" if block.repeated else block.name
        label.update({node.name: name for node in block.nodes})
    for node in graph.nodes:
        if node.name in label:
            node.meta[_LABEL] = label[node.name]


def make_block(index: int, name: str, nodes: Sequence[fx.Node]) -> Block:
    """Build a :class:`Block` from consecutive nodes."""
    members = set(nodes)
    inputs: dict[fx.Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in members:
                inputs.setdefault(source)
    outputs = tuple(node for node in nodes if any(user not in members for user in node.users))
    return Block(
        index, name, tuple(nodes), tuple(inputs), outputs, structure_of(nodes, tuple(inputs), outputs)
    )


def structure_of(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> str:
    """Hash of what a segment computes: ops, constants, wiring, types of its inputs and which values leave.

    Symbolic sizes are numbered by first appearance, so that layers whose caches carry symbols of their own
    compare equal; whoever reuses code for such a block must make sure that the sizes are equal.
    """
    number: dict[fx.Node, str] = {node: f"i{k}" for k, node in enumerate(inputs)}
    number.update({node: f"n{k}" for k, node in enumerate(nodes)})
    symbols: dict[str, str] = {}
    digest = hashlib.sha256()
    for node in inputs:
        kind = "" if node.op != "get_attr" else str(node.target)
        digest.update(f"{kind}{_describe(node.meta.get('val'), symbols)};".encode())
    for node in nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda source: _Name(number[source]))
        digest.update(
            f"{node.op}:{node.target}:{arguments!r}:{_describe(node.meta.get('val'), symbols)};".encode()
        )
    digest.update(",".join(number[node] for node in outputs).encode())
    return digest.hexdigest()


class _Name(str):
    """A node number inside printed arguments, told apart from string constants."""

    def __repr__(self) -> str:
        return f"%{self!s}"


def _describe(value: Any, symbols: dict[str, str]) -> Any:
    """Type of a value: dtype, sizes and strides, symbols renamed through ``symbols``."""
    if isinstance(value, Tensor):
        sizes = tuple(_size(s, symbols) for s in value.shape)
        return ("T", str(value.dtype), sizes, tuple(_size(s, symbols) for s in value.stride()))
    if isinstance(value, list | tuple):
        return tuple(_describe(item, symbols) for item in value)
    if isinstance(value, torch.SymInt):
        return ("S", _size(value, symbols))
    return type(value).__name__


def _size(size: int | torch.SymInt, symbols: dict[str, str]) -> str:
    if not isinstance(size, torch.SymInt):
        return str(size)
    text, names = _printed(size.node.expr)
    for name in names:
        symbols.setdefault(name, f"d{len(symbols)}")
    if text in symbols:
        return symbols[text]
    return re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match.group(), match.group()), text)


@functools.lru_cache(maxsize=4096)
def _printed(expression: Any) -> tuple[str, tuple[str, ...]]:
    """An expression as text, and the names of its symbols; printing is what takes the time."""
    return str(expression), tuple(sorted(str(symbol) for symbol in expression.free_symbols))


def _signature(node: fx.Node) -> str:
    """What must repeat from layer to layer: op, constants, rank, dtype; sizes may carry per-layer symbols."""
    constants = fx.node.map_arg((node.args, node.kwargs), lambda source: None)
    value = node.meta.get("val")
    kind = (str(value.dtype), value.dim()) if isinstance(value, Tensor) else type(value).__name__
    return f"{node.op}:{node.target}:{constants!r}:{kind}"


def _repetition(nodes: Sequence[fx.Node]) -> tuple[int, int, int]:
    """``(start, period, repeats)`` of the best repetition; repeats = 0 when there is none."""
    codes: dict[str, int] = {}
    sequence = np.array([codes.setdefault(_signature(node), len(codes)) for node in nodes])
    best = (0, 0, 0)
    covered = 0
    for period in _candidate_periods(sequence):
        for start, length in _runs(sequence[:-period] == sequence[period:]):
            if length < period:
                continue
            found = _align(nodes, start, period, length)
            if found[2] >= _MIN_REPEATS and found[1] * found[2] > covered:
                best, covered = found, found[1] * found[2]
        if covered and covered + 2 * period >= 0.8 * len(nodes):
            break
    return best


def _candidate_periods(sequence: np.ndarray[Any, Any]) -> list[int]:
    """Distances between equal signatures, smallest first, that repeat over a long enough stretch."""
    n = len(sequence)
    return [
        period
        for period in range(_MIN_NODES, n // 2 + 1)
        if int((sequence[:-period] == sequence[period:]).sum()) >= max(period, n // 4)
    ]


def _runs(mask: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """``(start, length)`` of every maximal run of True, longest first."""
    padded = np.concatenate([[False], mask, [False]]).astype(np.int8)
    edges = np.diff(padded)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    runs = [(int(a), int(b - a)) for a, b in zip(starts, ends, strict=True)]
    return sorted(runs, key=lambda run: -run[1])[:4]


def _align(nodes: Sequence[fx.Node], start: int, period: int, length: int) -> tuple[int, int, int]:
    """Choose the phase with the fewest crossing values, then keep the isomorphic prefix."""
    index = {node: k for k, node in enumerate(nodes)}
    last_use = [
        max((index.get(user, len(nodes)) for user in node.users), default=k) for k, node in enumerate(nodes)
    ]
    cost = _crossing_costs(nodes)
    slack = (length + period) % period
    total = (length + period) // period
    best: tuple[tuple[int, int], tuple[int, int, int]] | None = None
    for shift in range(slack + 1 if total > _MIN_REPEATS else period):
        first = start + shift
        repeats = (start + length + period - first) // period
        if repeats < _MIN_REPEATS:
            continue
        cut = first + period
        crossing = sum(cost[k] for k in range(first, cut) if last_use[k] >= cut)
        key = (crossing, -repeats)
        if best is None or key < best[0]:
            best = (key, (first, period, repeats))
    if best is None:
        return (start, period, 0)
    first, period, repeats = best[1]
    return (first, period, _isomorphic_repeats(nodes, index, first, period, repeats))


def _crossing_costs(nodes: Sequence[fx.Node]) -> list[int]:
    """What it costs to cut between a node and its use.

    Values made from inputs of the graph alone are mostly weights on their way to their use (transposed, cast,
    dequantized): a cut behind one would hold a dense weight between blocks and hide from the next block what
    it multiplies with.
    """
    from_inputs: dict[fx.Node, bool] = {}
    for node in nodes:
        sources = node.all_input_nodes
        given = all(s.op in ("placeholder", "get_attr") or from_inputs.get(s, False) for s in sources)
        from_inputs[node] = bool(sources) and given
    return [_WEIGHT_CROSSING if from_inputs[node] else 1 for node in nodes]


def _isomorphic_repeats(
    nodes: Sequence[fx.Node], index: dict[fx.Node, int], first: int, period: int, repeats: int
) -> int:
    """How many consecutive segments are wired exactly alike."""
    for k in range(1, repeats):
        a, b = first + (k - 1) * period, first + k * period
        if not all(_same_wiring(nodes[a + j], nodes[b + j], index, a, b) for j in range(period)):
            return k
    return repeats


def _same_wiring(left: fx.Node, right: fx.Node, index: dict[fx.Node, int], a: int, b: int) -> bool:
    sources = zip(left.all_input_nodes, right.all_input_nodes, strict=False)
    if len(left.all_input_nodes) != len(right.all_input_nodes):
        return False
    for one, two in sources:
        p, q = index.get(one), index.get(two)
        inside = p is not None and p >= a
        if inside != (q is not None and q >= b):
            return False
        if inside and p is not None and q is not None and p - a != q - b:
            return False
    return True
