"""Lower one block: retrace it with every recognised linear replaced by its kernel.

    linear(dequantize(quantize(x)), dequantize_weight(codes, …))  →  kernel(x codes, packed weight)

Sibling sites become one product whose result is split.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from fxcompress.backends.cpu import attention, cached_attention, sparse
from fxcompress.backends.cpu.embeddings import EmbeddingKernel
from fxcompress.backends.cpu.experts import ExpertsPlan, plan_experts, run_experts, weight_of_experts
from fxcompress.backends.cpu.kernel_types import Kernel, LinearSpec, QuantizedInput, SinglePlan
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.cpu.selection import choose_embedding, choose_kernel, this_machine

logger = logging.getLogger("fxcompress.backends")
aten = torch.ops.aten
ops = torch.ops.fxcompress
DEQUANTIZE = (ops.dequantize_weight.default, ops.dequantize_codebook.default)
EMBEDDINGS = (ops.quantized_embedding.default, ops.codebook_embedding.default)
"""Operators whose packed weights kernels read."""
_REARRANGE = (aten.t.default, aten.transpose.int, aten.mT.default)


@dataclass(frozen=True)
class PackedInput:
    """A packed tensor a lowered block takes: ``layout`` of the weights at the given block inputs.

    Args:
        layout: How they are packed.
        positions: Index (in the block's inputs) of the ``codes`` of every sibling, in order.
        tensor: Key of the packed dictionary.
    """

    layout: Layout
    positions: tuple[int, ...]
    tensor: str


class EmbeddingPlan(NamedTuple):
    """How one embedding is computed."""

    kernel: EmbeddingKernel
    spec: LinearSpec
    position: int


@dataclass
class Plan:
    """How the linears of one block are computed.

    Args:
        kernels: First linear of every sibling group → its kernel.
        members: Every planned linear → (first linear of its group, position in it).
        groups: First linear → all linears of the group.
        codes: Linear → position of its codes among the block inputs.
        specs: First linear → spec.
        embeddings: Embedding node → its kernel, the table, and the position of its codes.
        experts: Product with several matrices → its plan.
        singles: Product of another kind of weight (sparse, 8-bit floats) → its kernel.
        choices: Text per linear or such product, for explanations.
    """

    kernels: dict[fx.Node, Kernel] = field(default_factory=dict)
    members: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)
    groups: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    codes: dict[fx.Node, int] = field(default_factory=dict)
    specs: dict[fx.Node, LinearSpec] = field(default_factory=dict)
    embeddings: dict[fx.Node, EmbeddingPlan] = field(default_factory=dict)
    experts: dict[fx.Node, ExpertsPlan] = field(default_factory=dict)
    singles: dict[fx.Node, SinglePlan] = field(default_factory=dict)
    choices: dict[fx.Node, str] = field(default_factory=dict)


def make_plan(
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    siblings: Sequence[Sequence[fx.Node]],
    term: Callable[[fx.Node], object],
    choose: Callable[[LinearSpec], tuple[Kernel | None, str]] | None = None,
) -> Plan:
    """Choose a kernel for every quantized linear of a block.

    Args:
        nodes: The block's nodes.
        inputs: The block's inputs, in order.
        siblings: Groups of linears that share one product.
        term: Which weight the codes that an input takes belong to, for messages.
        choose: What chooses the kernel of a linear on another device than the CPU, where embeddings and
            experts are left to the graph. Default: the CPU's kernels.
    """
    plan = Plan()
    position = {node: index for index, node in enumerate(inputs)}
    leader = {node: group[0] for group in siblings for node in group}
    wanted: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        dequantize = weight_of_linear(node)
        if dequantize is not None and dequantize.args[0] in position:
            wanted.setdefault(leader.get(node, node), []).append(node)
    for first, group in wanted.items():
        spec = _group_spec(group)
        kernel, reason = (
            (choose or choose_kernel)(spec) if spec is not None else (None, "more than one matrix per weight")
        )
        for node in group:
            plan.choices[node] = reason
            if kernel is None:
                logger.info("%s: dequantized at run time (%s)", term(_dequantize_of(node).codes), reason)
        if kernel is None or spec is None:
            continue
        plan.kernels[first], plan.specs[first], plan.groups[first] = kernel, spec, tuple(group)
        for index, node in enumerate(group):
            plan.members[node] = (first, index)
            plan.codes[node] = position[_dequantize_of(node).codes]
    if choose is None:
        _plan_embeddings(plan, nodes, position)
        _plan_experts(plan, nodes, position)
    return plan


def weight_of_linear(node: fx.Node) -> fx.Node | None:
    """The node that dequantizes the weight a linear multiplies with (maybe through ``t``), or None."""
    if node.target is not aten.linear.default or not isinstance(node.args[1], fx.Node):
        return None
    weight = node.args[1]
    if weight.target is aten.t.default and isinstance(weight.args[0], fx.Node):
        weight = weight.args[0]
    return weight if weight.target in DEQUANTIZE else None


class _Dequantize(NamedTuple):
    """The arguments of a dequantizing node, in the order of the operators' schemas."""

    codes: fx.Node
    second: fx.Node  # scale, or table
    third: fx.Node | None  # zero-point, or scale
    bits: int
    group_size: int
    shape: Sequence[int | torch.SymInt]
    perm: Sequence[int]
    batch_dims: int
    row_dims: int
    dtype: torch.dtype


def _dequantize_of(linear: fx.Node) -> _Dequantize:
    """How the weight of a quantized linear is dequantized."""
    weight = weight_of_linear(linear)
    assert weight is not None
    return _Dequantize(*cast("tuple[Any, ...]", weight.args))


def _group_spec(group: Sequence[fx.Node]) -> LinearSpec | None:
    rows = 0
    spec = None
    for node in group:
        weight = _dequantize_of(node)
        if weight.batch_dims != 0 or len(weight.shape) != 2:
            return None
        rows += int(weight.shape[weight.perm[0]])
        dequantize = weight_of_linear(node)
        assert dequantize is not None
        spec = replace(_spec_of(dequantize, cast("fx.Node", node.args[0]), _tokens(node)), rows=rows)
    return spec


def _spec_of(dequantize: fx.Node, x: fx.Node, tokens: int | None) -> LinearSpec:
    """The spec of a product of ``x`` with what a node dequantizes, or with one of its matrices."""
    weight = _Dequantize(*cast("tuple[Any, ...]", dequantize.args))
    activation, activation_bits = _activation(x)
    table = _table_kind(dequantize.target, weight.second)
    return LinearSpec(
        bits=weight.bits,
        symmetric=table is not None or weight.third is None,
        group_size=weight.group_size,
        rows=int(weight.shape[weight.perm[-2]]),
        columns=int(weight.shape[weight.perm[-1]]),
        activation=activation,
        activation_bits=activation_bits,
        tokens=tokens,
        dtype=weight.dtype,
        table=table,
        scaled=table is None or weight.third is not None,
    )


def _table_kind(target: Any, second: fx.Node) -> str | None:
    """``LinearSpec.table`` of an operator on codes, whose second tensor is the scale or the table."""
    if target not in (ops.dequantize_codebook.default, ops.codebook_embedding.default):
        return None
    return "rows" if second.meta["val"].dtype == torch.bfloat16 else "shared"


# Operator → how it quantizes, position of the width among its arguments.
_QUANTIZERS: dict[Any, tuple[str, int]] = {
    ops.quantize_per_token.default: ("dynamic", 1),
    ops.quantize_outlier_split.default: ("dynamic", 1),
    ops.quantize_per_tensor.default: ("static", 3),
}


def _quantize_of(dequantize: fx.Node) -> fx.Node:
    """The ``quantize_*`` node behind a ``dequantize_activation`` node."""
    node = dequantize.args[0]
    assert isinstance(node, fx.Node)
    if node.target is operator.getitem:
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def _activation(x: fx.Node) -> tuple[str | None, int]:
    """How an input is quantized, and to how many bits."""
    if x.target is not ops.dequantize_activation.default:
        return None, 8
    quantize = _quantize_of(x)
    if quantize.target not in _QUANTIZERS:
        return None, 8  # no kernel takes its codes: the values they stand for are multiplied
    mode, position = _QUANTIZERS[quantize.target]
    return mode, int(cast("int", quantize.args[position]))


def _tokens(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    total = 1
    for size in cast("Sequence[int | torch.SymInt]", value.shape[:-1]):
        if not isinstance(size, int):
            return None
        total *= size
    return total


def _plan_embeddings(plan: Plan, nodes: Sequence[fx.Node], position: Mapping[fx.Node, int]) -> None:
    for node in nodes:
        if node.target not in EMBEDDINGS or node.args[1] not in position:
            continue
        _, codes, second, third, bits, group_size, columns, dtype = cast("tuple[Any, ...]", node.args)
        table = _table_kind(node.target, second)
        spec = LinearSpec(
            *(bits, table is not None or third is None, group_size, _table_rows(codes), columns, None),
            *(_tokens(node), dtype),
            table=table,
        )
        kernel = choose_embedding(spec)
        if kernel is not None:
            plan.embeddings[node] = EmbeddingPlan(kernel, spec, position[codes])


def _plan_experts(plan: Plan, nodes: Sequence[fx.Node], position: Mapping[fx.Node, int]) -> None:
    for node in nodes:
        dequantize = weight_of_experts(node, DEQUANTIZE)
        if dequantize is None or dequantize.args[0] not in position:
            continue
        weight = _Dequantize(*cast("tuple[Any, ...]", dequantize.args))
        found, plan.choices[node] = plan_experts(
            _spec_of(dequantize, cast("fx.Node", node.args[0]), None),
            position[weight.codes],
            this_machine().isa,
        )
        if found is not None:
            plan.experts[node] = found


def _table_rows(codes: fx.Node) -> int:
    return int(codes.meta["val"].shape[1])


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
        quantize = _quantize_of(x)
        if quantize.target not in _QUANTIZERS:
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
    weight = _dequantize_of(node)
    return int(weight.shape[weight.perm[0]])


def needed_layouts(plan: Plan) -> list[tuple[Layout, tuple[int, ...]]]:
    """Which packed weights a plan reads: (layout, positions of the siblings' codes)."""
    needed = [
        (kernel.layout, tuple(plan.codes[member] for member in plan.groups[first]))
        for first, kernel in plan.kernels.items()
    ]
    needed += [(embedding.kernel.layout, (embedding.position,)) for embedding in plan.embeddings.values()]
    others: list[ExpertsPlan | SinglePlan] = [*plan.experts.values(), *plan.singles.values()]
    needed += [(other.layout, (other.position,)) for other in others]
    return list(dict.fromkeys(needed))
