"""What all rewriting of a graph for ONNX shares: its constants, names, and weights laid out in blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.backends.onnx.graph_constants import Constants
from fxcompress.backends.onnx.weights import Packed, blocks_of, container
from fxcompress.errors import BackendError
from fxcompress.forms import WeightLayout

__all__ = ["Lowered", "Rewriting"]

aten = torch.ops.aten
fxc = torch.ops.fxcompress


@dataclass
class Lowered:
    """A graph ready for translation.

    Args:
        module: The graph.
        constants: The tensors its placeholders take, other than the user's inputs.
        inputs: Placeholder names of the user inputs, in flat call order.
        representation: Compressed parameter → the ONNX operators that compute with it.
    """

    module: fx.GraphModule
    constants: Constants
    inputs: tuple[str, ...]
    representation: dict[str, str] = field(default_factory=dict)


class Rewriting:
    """Replaces nodes of a graph.

    Args:
        lowered: The graph.
        names: Parameter name by ``dequantize_…`` node.
        portable: Only operators of the ONNX standard.
    """

    def __init__(self, lowered: Lowered, names: dict[fx.Node, str], portable: bool) -> None:
        self.lowered, self.names, self.portable = lowered, names, portable
        self.graph, self.constants = lowered.module.graph, lowered.constants

    def each(self, handlers: dict[Any, Callable[[fx.Node], None]]) -> None:
        """Call the handler of every node that has one."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in handlers:
                handlers[node.target](node)

    def note(self, node: fx.Node, text: str) -> str:
        """Record what computes with the weight of ``node``; returns the parameter's name."""
        name = self.names.get(node, node.name)
        known = self.lowered.representation.get(name)
        if known is None:
            self.lowered.representation[name] = text
        elif text not in known.split(" + "):
            self.lowered.representation[name] = f"{known} + {text}"
        return name

    def packed_of(self, node: Any) -> Packed | None:
        """The weight that a ``dequantize_weight`` node decodes, or None for any other node."""
        if not isinstance(node, fx.Node) or node.target is not fxc.dequantize_weight.default:
            return None
        arguments: tuple[Any, ...] = node.args
        codes, scale, zero, bits, group_size, shape, perm, batch_dims, row_dims, dtype = arguments
        check_dtype(self.names.get(node, node.name), dtype)
        layout = WeightLayout(tuple(shape), tuple(perm), batch_dims, row_dims)
        value = self.constants.value
        return Packed(value(codes), value(scale), value(zero), bits, group_size, layout)

    def blocks(self, name: str, codes: fx.Node, packed: Packed, block: int, dtype: Any) -> tuple[Any, ...]:
        """``(data, scales, zeros or None, bits)`` of the weight in blocks."""
        laid_out: list[Any] = []

        def part(get: Callable[[Any], Any]) -> Tensor:
            if not laid_out:
                laid_out.append(blocks_of(packed, block))
            value: Tensor = get(laid_out[0])
            return value

        b = self.constants.add((codes, "blocks"), f"{name}.blocks", lambda: part(lambda w: w.data))
        scales = self.constants.add(
            (codes, "block scales", dtype), f"{name}.scales", lambda: part(lambda w: w.scales).to(dtype)
        )
        width = container(packed.bits)
        if packed.zero is None and width == packed.bits:
            return b, scales, None, width
        zeros = self.constants.add((codes, "block zeros"), f"{name}.zeros", lambda: part(lambda w: w.zeros))
        return b, scales, zeros, width

    def from_matrix(self, value: fx.Node, layout: WeightLayout) -> fx.Node:
        """``[B, N, K]`` → the parameter's shape."""
        inverse = sorted(range(len(layout.perm)), key=layout.perm.__getitem__)
        value = self.graph.call_function(aten.view.default, (value, list(layout.permuted_shape)))
        if inverse != list(range(len(inverse))):
            value = self.graph.call_function(aten.permute.default, (value, inverse))
        return value

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Let all users of ``node`` read ``new``."""
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)


def check_dtype(name: str, dtype: Any) -> None:
    """Refuse dtypes without kernels."""
    if dtype not in (torch.float32, torch.float16):
        raise BackendError(
            f"{name}: computes in {dtype}, for which ONNX Runtime has no CPU kernels of quantized weights.",
            fix="compress the model in float32 (model.float()) and export that.",
        )
