"""What a program would cost with fewer units, without cutting it.

Sizes are those of the cut program, as the axes of its values say: dimensions that several groups share, and
weights that lose units along two dimensions, are counted exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from fxcompress.analysis.axes import Axis, Dim
from fxcompress.analysis.blocks import Block
from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.capture.program import Program
from fxcompress.structure.cost import Cost, Sizes, captured_sizes, cost_of, flops_of, is_grouped

__all__ = ["CutCost"]


class CutCost:
    """The manager's :class:`fxcompress.pass_base.CutModel`.

    Args:
        program: The program before the cut.
        blocks: Its blocks.
        groups: Its channel groups.
    """

    def __init__(self, program: Program, blocks: Sequence[Block], groups: ChannelGroups) -> None:
        self._program, self._groups = program, groups
        self._whole = cost_of(program, blocks)
        atoms = set(groups.axes.values())
        cuttable = {groups.axes[group.name] for group in groups} & atoms
        self._block_of = {node: block.index for block in blocks for node in block.nodes}
        self._products = [node for node in self._block_of if flops_of(node)]
        self._moving = [node for node in self._products if self._reads(node, cuttable)]
        self._owner = _first_blocks(program, blocks)
        self._dims = {
            name: dims
            for name, dims in groups.typing.weights.items()
            if name in program.parameters and any(self._has(dim, cuttable) for dim in dims)
        }
        self._weight_bytes = {node: self._bytes_read(node) for node in self._products}

    def of(self, kept: Mapping[str, int]) -> Cost:
        """Exact parameters and operations.

        Args:
            kept: Group name → number of units that stay; groups not named stay whole.
        """
        counts = {self._groups.axes[name]: count for name, count in kept.items()}
        rows = [list(row) for row in self._whole.blocks]
        parameters, flops, size = self._whole.parameters, self._whole.flops, self._whole.bytes
        for name, dims in self._dims.items():
            tensor = self._program.weights[name]
            less = tensor.numel() - math.prod(self._groups.static_size(dim, counts) for dim in dims)
            parameters -= less
            size -= less * tensor.element_size()
            if name in self._owner:
                rows[self._owner[name]][0] -= less
        sizes = self._sizes(counts)
        for node in self._moving:
            fewer = flops_of(node) - flops_of(node, sizes)
            flops -= fewer
            rows[self._block_of[node]][1] -= fewer
        blocks = tuple((row[0], row[1]) for row in rows)
        return dataclasses.replace(self._whole, parameters=parameters, flops=flops, bytes=size, blocks=blocks)

    def latency(self, kept: Mapping[str, int], tokens: int, balance: float) -> float:
        """A roofline: every product takes as long as its operations, or as reading its weights.

            Σ over products of max(operations · tokens / captured tokens, balance · bytes of weights)

        Of the experts of a layer, as many are read as tokens were dealt to them, at most. It counts no
        dispatch, no caches and no other ops, so it tells how times compare, not what they are.

        Args:
            kept: Group name → number of units that stay.
            tokens: Tokens of one call: 1 for decoding, the length of the prompt for prefill.
            balance: Operations the machine does in the time it reads one byte.

        Returns:
            The time in operations.
        """
        sizes = self._sizes({self._groups.axes[name]: count for name, count in kept.items()})
        scale = tokens / max(1, self._whole.tokens)
        moving = set(self._moving)
        total = 0.0
        for node in self._products:
            before = flops_of(node)
            now = flops_of(node, sizes) if node in moving else before
            read = self._weight_bytes[node] * (now / before) * _part_read(node, sizes, scale)
            total += max(now * scale, balance * read)
        return total

    def _sizes(self, counts: Mapping[Axis, int]) -> Sizes:
        """Sizes of values when some axes have another number of units."""
        known: dict[fx.Node, list[int]] = {}

        def sizes(node: fx.Node) -> list[int]:
            if node not in known:
                old, dims = captured_sizes(node), self._dims_of(node)
                if dims is not None and len(dims) == len(old):
                    static = self._groups.static_size
                    old = [
                        size * static(dim, counts) // max(1, static(dim, {}))
                        for size, dim in zip(old, dims, strict=True)
                    ]
                known[node] = old
            return known[node]

        return sizes

    def _dims_of(self, node: fx.Node) -> list[Dim] | None:
        dims = self._groups.typing.dims.get(node)
        return dims[0] if dims and isinstance(dims[0], list) else dims

    def _reads(self, node: fx.Node, cuttable: set[Axis]) -> bool:
        return any(
            self._has(dim, cuttable)
            for value in (node, *node.all_input_nodes)
            for dim in self._dims_of(value) or ()
        )

    def _has(self, dim: Dim, cuttable: set[Axis]) -> bool:
        return not cuttable.isdisjoint(self._groups.typing.axes.variables(dim))

    def _bytes_read(self, node: fx.Node) -> int:
        """Bytes of the constant operands of a product."""
        constant = self._groups.typing.constant
        values = [source.meta.get("val") for source in node.all_input_nodes if source in constant]
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor) and v.dim() > 1)


def _part_read(node: fx.Node, sizes: Sizes, scale: float) -> float:
    """Of a stack of matrices, at most as many are read as there are rows; 1 for all other products."""
    if not is_grouped(node):
        return 1.0
    (whole, *_), (now, *_), (rows, *_) = captured_sizes(node.args[1]), sizes(node.args[1]), sizes(node)
    return min(now, max(1.0, rows * scale)) / whole


def _first_blocks(program: Program, blocks: Sequence[Block]) -> dict[str, int]:
    """Parameter → the block that :func:`cost_of` counts it in."""
    found: dict[str, int] = {}
    for block in blocks:
        for node in block.inputs:
            name = program.weight_of.get(node.name)
            if name is not None and name in program.parameters:
                found.setdefault(name, block.index)
    return found
