"""Which kernel computes every quantized linear, embedding and batched product of a block."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from fxcompress.backends.cpu.embeddings import EmbeddingKernel
from fxcompress.backends.cpu.epilogues import FusedProduct, find_epilogues
from fxcompress.backends.cpu.experts import ExpertsPlan, plan_experts, weight_of_experts
from fxcompress.backends.cpu.kernel_types import EpilogueKernel, Kernel, LinearSpec, SinglePlan
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.cpu.selection import choose_embedding, choose_kernel, this_machine

logger = logging.getLogger("fxcompress.backends")
aten = torch.ops.aten
ops = torch.ops.fxcompress
DEQUANTIZE = (ops.dequantize_weight.default, ops.dequantize_codebook.default)
EMBEDDINGS = (ops.quantized_embedding.default, ops.codebook_embedding.default)
"""Operators whose packed weights kernels read."""


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
        fused: Node whose value a product gives together with what follows it → that product.
        layouts: First linear → how its weight lies.
        absorbed: Nodes that fused products make superfluous.
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
    fused: dict[fx.Node, FusedProduct] = field(default_factory=dict)
    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    absorbed: set[fx.Node] = field(default_factory=set)


def make_plan(
    nodes: Sequence[fx.Node],
    position: Mapping[fx.Node, int],
    siblings: Sequence[Sequence[fx.Node]],
    term: Callable[[fx.Node], object],
    outputs: Sequence[fx.Node],
    choose: Callable[[LinearSpec], tuple[Kernel | None, str]] | None = None,
) -> Plan:
    """Choose a kernel for every quantized linear of a block.

    Args:
        nodes: The block's nodes.
        position: Inputs of the block that hold codes of the state's forms → their place among all.
        siblings: Groups of linears that share one product.
        term: Which weight the codes that an input takes belong to, for messages.
        outputs: What is read of the block elsewhere.
        choose: What chooses the kernel of a linear on another device than the CPU, where embeddings and
            experts are left to the graph. Default: the CPU's kernels.
    """
    plan = Plan()
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
                logger.info("%s: dequantized at run time (%s)", term(dequantize_of(node).codes), reason)
        if kernel is None or spec is None:
            continue
        plan.kernels[first], plan.specs[first], plan.groups[first] = kernel, spec, tuple(group)
        for index, node in enumerate(group):
            plan.members[node] = (first, index)
            plan.codes[node] = position[dequantize_of(node).codes]
    _plan_epilogues(plan, outputs)
    if choose is None:
        _plan_embeddings(plan, nodes, position)
        _plan_experts(plan, nodes, position)
    return plan


def _plan_epilogues(plan: Plan, outputs: Sequence[fx.Node]) -> None:
    """Let kernels that can do what follows a product themselves."""
    plan.layouts = {first: kernel.layout for first, kernel in plan.kernels.items()}
    able = {first: kernel for first, kernel in plan.kernels.items() if isinstance(kernel, EpilogueKernel)}
    groups = {first: plan.groups[first] for first in able}
    found = find_epilogues(groups, set(outputs), this_machine().isa.lanes)
    for last, product in found.products.items():
        layout = able[product.first].layout_with(product.epilogue)
        if layout is None:
            continue
        plan.fused[last], plan.layouts[product.first] = product, layout
        plan.absorbed |= found.absorbed[last]
        for node in plan.groups[product.first]:
            plan.choices[node] += f", {product.epilogue.text}"


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


def dequantize_of(linear: fx.Node) -> _Dequantize:
    """How the weight of a quantized linear is dequantized."""
    weight = weight_of_linear(linear)
    assert weight is not None
    return _Dequantize(*cast("tuple[Any, ...]", weight.args))


def _group_spec(group: Sequence[fx.Node]) -> LinearSpec | None:
    rows = 0
    spec = None
    for node in group:
        weight = dequantize_of(node)
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
QUANTIZERS: dict[Any, tuple[str, int]] = {
    ops.quantize_per_token.default: ("dynamic", 1),
    ops.quantize_outlier_split.default: ("dynamic", 1),
    ops.quantize_per_tensor.default: ("static", 3),
}


def quantize_of(dequantize: fx.Node) -> fx.Node:
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
    quantize = quantize_of(x)
    if quantize.target not in QUANTIZERS:
        return None, 8  # no kernel takes its codes: the values they stand for are multiplied
    mode, position = QUANTIZERS[quantize.target]
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


def needed_layouts(plan: Plan) -> list[tuple[Layout, tuple[int, ...]]]:
    """Which packed weights a plan reads: (layout, positions of the siblings' codes)."""
    needed = [
        (layout, tuple(plan.codes[member] for member in plan.groups[first]))
        for first, layout in plan.layouts.items()
    ]
    needed += [(embedding.kernel.layout, (embedding.position,)) for embedding in plan.embeddings.values()]
    others: list[ExpertsPlan | SinglePlan] = [*plan.experts.values(), *plan.singles.values()]
    needed += [(other.layout, (other.position,)) for other in others]
    return list(dict.fromkeys(needed))
