"""What a program costs: parameters it holds and operations it takes, per block and in total.

Operations are those of products (linear layers, convolutions, products of activations, attention), two per
multiplication and addition; everything else is small beside them. Sizes of inputs are those of the capture's
example unless others are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxcompress.analysis.blocks import Block, find_blocks
from fxcompress.analysis.op_arguments import op_name
from fxcompress.capture.program import Program

__all__ = ["Cost", "Sizes", "captured_sizes", "cost_of", "flops_of", "is_grouped"]

aten = torch.ops.aten

Sizes: TypeAlias = Callable[[Any], list[int]]
"""Node → sizes of its (first) value."""


@dataclass(frozen=True)
class Cost:
    """Parameters and operations.

    Args:
        parameters: Elements of all parameters; a tied one counts once.
        flops: Operations of one call on inputs of ``rows`` sequences.
        tokens: Tokens (or samples) of that call.
        blocks: ``(parameters, flops)`` of every block; parameters that several blocks use count in the first.
        repeated: Which blocks are the repeated ones.
        bytes: Bytes of all parameters.
    """

    parameters: int
    flops: int
    tokens: int
    blocks: tuple[tuple[int, int], ...]
    repeated: tuple[bool, ...]
    bytes: int

    @property
    def block_parameters(self) -> int:
        """Parameters of the repeated blocks alone (all of them when nothing repeats)."""
        return self._inside(0) or self.parameters

    @property
    def block_flops(self) -> int:
        """Operations of the repeated blocks alone (all of them when nothing repeats)."""
        return self._inside(1) or self.flops

    def _inside(self, part: int) -> int:
        return sum(block[part] for block, inside in zip(self.blocks, self.repeated, strict=True) if inside)

    def to_dict(self) -> dict[str, int]:
        """The totals as plain data."""
        return {
            "parameters": self.parameters,
            "block_parameters": self.block_parameters,
            "flops": self.flops,
            "block_flops": self.block_flops,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def cost_of(program: Program, blocks: Sequence[Block] | None = None) -> Cost:
    """Count a program.

    Args:
        program: Sizes are read off the types of its values.
        blocks: Its blocks, if they are known.

    Example:
        >>> cost_of(capture_model(nn.Linear(4, 3), (torch.randn(2, 4),))).flops
        48
    """
    blocks = find_blocks(program.graph) if blocks is None else blocks
    counted: set[str] = set()
    rows: list[tuple[int, int]] = []
    for block in blocks:
        names = dict.fromkeys(program.weight_of[n.name] for n in block.inputs if n.name in program.weight_of)
        own = [name for name in names if name in program.parameters and name not in counted]
        counted.update(own)
        rows.append((sum(program.weights[name].numel() for name in own), sum(map(flops_of, block.nodes))))
    held = [program.weights[name] for name in program.parameters if name in program.weights]
    return Cost(
        parameters=sum(tensor.numel() for tensor in held),
        flops=sum(flops for _, flops in rows),
        tokens=_tokens(program),
        blocks=tuple(rows),
        repeated=tuple(block.repeated for block in blocks),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in held),
    )


def captured_sizes(node: Any) -> list[int]:
    """Sizes of a node's (first) value in the capture's example."""
    value = node.meta["val"]
    return _sizes(value[0] if isinstance(value, tuple | list) else value)


def flops_of(node: fx.Node, sizes: Sizes = captured_sizes) -> int:
    """Operations of one node; 0 for what is no product.

    Args:
        node: Any node of the graph.
        sizes: Of the values. Default: those of the capture's example.
    """
    count = _GROUPED if is_grouped(node) else _COUNTS.get(node.target)
    return 0 if count is None else count(node, sizes)


def is_grouped(node: fx.Node) -> bool:
    """Whether a node multiplies rows with a stack of matrices, each row with one of them."""
    return op_name(node) in _GROUPED_NAMES


def _tokens(program: Program) -> int:
    """Elements of the first integer input (token ids), else the first size of the first input."""
    values = [node.meta.get("val") for node in program.placeholders() if node.name not in program.weight_of]
    tensors = [value for value in values if isinstance(value, Tensor)]
    ids = [value for value in tensors if not value.is_floating_point() and value.dtype != torch.bool]
    if ids:
        return math.prod(_sizes(ids[0]))
    return _sizes(tensors[0])[0] if tensors and tensors[0].dim() else 1


def _sizes(value: Any) -> list[int]:
    return [_number(size) for size in value.shape]


def _number(size: int | torch.SymInt) -> int:
    """A size as captured; one that depends on data counts as 1."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size.node.hint
    return 1 if hint is None else int(hint)


def _product(first: int, dim: int) -> Callable[[fx.Node, Sizes], int]:
    """Operations of a product whose operand at ``first`` is contracted along ``dim``."""

    def count(node: fx.Node, sizes: Sizes) -> int:
        return 2 * math.prod(sizes(node)) * sizes(node.args[first])[dim]

    return count


def _convolution(node: fx.Node, sizes: Sizes) -> int:
    return 2 * math.prod(sizes(node)) * math.prod(sizes(node.args[1])[1:])


def _transposed(node: fx.Node, sizes: Sizes) -> int:
    return 2 * math.prod(sizes(node.args[0])) * math.prod(sizes(node.args[1])[1:])


def _attention(node: fx.Node, sizes: Sizes) -> int:
    query, key, value = (sizes(argument) for argument in node.args[:3])
    pairs = math.prod(query[:-1]) * key[-2]
    return 2 * pairs * (query[-1] + value[-1])


def _einsum(node: fx.Node, sizes: Sizes) -> int:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    size: dict[str, int] = {}
    for term, operand in zip(equation.split("->")[0].split(","), operands, strict=True):  # type: ignore[arg-type]
        if "." in term:
            return 2 * math.prod(sizes(node))
        size.update(zip(term, sizes(operand), strict=True))
    return 2 * math.prod(size.values())


_GROUPED = _product(0, -1)
_GROUPED_NAMES = ("aten::_grouped_mm", "transformers::grouped_mm_fallback", "transformers::grouped_mm")
_COUNTS: Mapping[Any, Callable[[fx.Node, Sizes], int]] = {
    aten.linear.default: _product(0, -1),
    aten.matmul.default: _product(0, -1),
    aten.mm.default: _product(0, -1),
    aten.bmm.default: _product(0, -1),
    aten.mv.default: _product(0, -1),
    aten.addmm.default: _product(1, -1),
    aten.baddbmm.default: _product(1, -1),
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
    **{getattr(aten, f"conv{n}d").default: _convolution for n in (1, 2, 3)},
    **{getattr(aten, f"conv{n}d").padding: _convolution for n in (1, 2, 3)},
    aten.convolution.default: _convolution,
    aten.conv_transpose1d.default: _transposed,
    aten.conv_transpose2d.input: _transposed,
    aten.conv_transpose3d.input: _transposed,
}
