"""Lower one block: retrace it with every recognised linear replaced by its kernel.

    linear(dequantize(quantize(x)), dequantize_weight(codes, …))  →  kernel(x codes, packed weight)

Sibling sites become one product whose result is split; what follows a product happens inside its kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxcompress.backends.cpu import attention, cached_attention, sparse
from fxcompress.backends.cpu.epilogues import PLAIN, FusedProduct, apply_gate
from fxcompress.backends.cpu.experts import run_experts
from fxcompress.backends.cpu.kernel_types import EpilogueKernel, QuantizedInput
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.cpu.planning import (
    DEQUANTIZE,
    QUANTIZERS,
    PackedInput,
    Plan,
    dequantize_of,
    quantize_of,
)
from fxcompress.backends.cpu.selection import this_machine
from fxcompress.backends.cpu.tiled import TiledLayout

aten = torch.ops.aten
ops = torch.ops.fxcompress
_REARRANGE = (aten.t.default, aten.transpose.int, aten.mT.default)


class LoweringInterpreter(fx.Interpreter):
    """Run a block module, computing planned nodes through their kernels. Traced by make_fx."""

    def __init__(self, module: fx.GraphModule, plan: Plan, packed: Mapping[PackedInput, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.plan = plan
        self.packed = packed
        self.results: dict[fx.Node, tuple[Tensor, ...]] = {}
        self.isa = this_machine().isa
        self.cached = cached_attention.find_fused(module.graph, self.isa)

    def run_node(self, n: fx.Node) -> Any:
        """Kernels for planned nodes, the original op for others; planned weights are never dequantized."""
        if n in self.plan.fused:
            return self._fused(self.plan.fused[n])
        if n in self.plan.absorbed:
            return None
        if n in self.plan.members:
            return self._linear(n)
        if n in self.plan.experts:
            plan, x = self.plan.experts[n], cast("fx.Node", n.args[0])
            packed = self._packed(plan.layout, (plan.position,))
            return run_experts(plan, n, self._value(x), self._quantized(x), packed, self._argument)
        if n in self.plan.embeddings:
            return self._embedding(n)
        if n in self.cached.forms:
            return self.cached.run(n, self._argument)
        if n in self.cached.skipped or sparse.only_products(n):
            return None
        for other in (attention, sparse):
            lowered = other.lower(n, self._argument, self.isa)
            if lowered is not None:
                return lowered
        if _is_weight(n) and n.users and all(self._only_planned(user) for user in n.users):
            return None
        return super().run_node(n)

    def _argument(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: self.env[node])

    def _only_planned(self, user: fx.Node) -> bool:
        if user in self.plan.members or user in self.plan.experts:
            return True
        return user.target in _REARRANGE and bool(user.users) and all(map(self._only_planned, user.users))

    def _linear(self, node: fx.Node) -> Tensor:
        first, index = self.plan.members[node]
        if first not in self.results:
            kernel, spec, group = self.plan.kernels[first], self.plan.specs[first], self.plan.groups[first]
            positions = tuple(self.plan.codes[member] for member in group)
            packed = self._packed(kernel.layout, positions)
            x_node = node.args[0]
            assert isinstance(x_node, fx.Node)
            bias = self._bias(node) if len(group) == 1 else None
            y = kernel.run(self._value(x_node), self._quantized(x_node), packed, spec, bias)
            sizes = [_rows(member) for member in group]
            self.results[first] = tuple(y.split(sizes, dim=-1)) if len(sizes) > 1 else (y,)
        y = self.results[first][index]
        bias = self._bias(node) if len(self.plan.groups[first]) > 1 else None
        return y if bias is None else y + bias

    def _fused(self, product: FusedProduct) -> Tensor:
        first, epilogue, residual = product
        kernel, spec, group = self.plan.kernels[first], self.plan.specs[first], self.plan.groups[first]
        assert isinstance(kernel, EpilogueKernel)
        layout = self.plan.layouts[first]
        packed = self._packed(layout, tuple(self.plan.codes[member] for member in group))
        x_node = cast("fx.Node", first.args[0])
        operands = self._value(x_node), self._quantized(x_node), packed, spec, self._group_bias(group, layout)
        added = None if residual is None else self._value(residual)
        if not epilogue.gated or spec.many_rows:
            return kernel.run_with(epilogue, *operands, added)
        # Few tokens: a block's sums take less time than the steps of a gate, which depend on each other.
        y = apply_gate(kernel.run_with(PLAIN, *operands, None), epilogue.function, self.isa.lanes)
        return y if added is None else y + added

    def _group_bias(self, group: Sequence[fx.Node], layout: Layout) -> Tensor | None:
        """Biases of all siblings as the layout orders rows; None when nobody has one."""
        biases = [self._bias(member) for member in group]
        given = [bias for bias in biases if bias is not None]
        if not given:
            return None
        parts = [
            given[0].new_zeros(_rows(member)) if bias is None else bias
            for member, bias in zip(group, biases, strict=True)
        ]
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        return layout.arrange(together) if isinstance(layout, TiledLayout) else together

    def _bias(self, node: fx.Node) -> Tensor | None:
        bias = node.args[2] if len(node.args) > 2 else None
        return self._value(bias) if isinstance(bias, fx.Node) else None

    def _embedding(self, node: fx.Node) -> Tensor:
        kernel, spec, position = self.plan.embeddings[node]
        packed = self._packed(kernel.layout, (position,))
        return kernel.run(self._value(cast("fx.Node", node.args[0])), packed, spec)

    def _packed(self, layout: Layout, positions: tuple[int, ...]) -> dict[str, Tensor]:
        return {
            key.tensor: value
            for key, value in self.packed.items()
            if key.layout is layout and key.positions == positions
        }

    def _quantized(self, x: fx.Node) -> QuantizedInput | None:
        if x.target is not ops.dequantize_activation.default:
            return None
        quantize = quantize_of(x)
        if quantize.target not in QUANTIZERS:
            return None
        codes, scale, zero = (None if a is None else self._value(a) for a in x.args[:3])  # type: ignore[arg-type]
        assert codes is not None
        assert scale is not None
        source = self._value(cast("fx.Node", quantize.args[0]))
        if quantize.target is ops.quantize_outlier_split.default:
            outliers: Tensor = self.env[quantize][2]
            source = torch.where(outliers != 0, 0, source)  # what is left for the codes; NaN is an outlier
        return QuantizedInput(codes, scale, zero, source)

    def _value(self, node: fx.Node) -> Tensor:
        value = self.env[node]
        assert isinstance(value, Tensor)
        return value


def _is_weight(node: fx.Node) -> bool:
    """Whether a node dequantizes a weight, or only turns one; activations are turned, too."""
    while node.target in _REARRANGE and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.target in DEQUANTIZE


def _rows(node: fx.Node) -> int:
    weight = dequantize_of(node)
    return int(weight.shape[weight.perm[0]])
