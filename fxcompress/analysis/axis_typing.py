"""Give every dimension of every value in a graph its axes, in one pass over the ops.

Rules (:mod:`fxcompress.analysis.axis_rules` and its siblings) say how an op's dimensions belong together;
what an op *does* along an axis (contracts it, sums over it, mixes it) they record here, to be judged once
all axes are
known: an axis may turn out to be part of another one many ops later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx

from fxcompress.analysis.axes import Axes, Axis, Dim, Size, size_value
from fxcompress.analysis.axis_labels import follow_labels
from fxcompress.analysis.op_arguments import arguments, describe, op_name
from fxcompress.capture.program import Program

__all__ = ["AxisTyping", "Choice", "Effect", "Product", "Rule", "SizeLiteral", "type_axes"]


@dataclass(frozen=True, eq=False)
class SizeLiteral:
    """A size written into the graph that shrinks with its axes.

    Args:
        node: The call.
        argument: Schema name of the argument.
        index: Place in the argument when it is a list.
        terms: Dimensions whose sizes add up to the value.
        offset: Added to them: −1 for the number of the last unit.
    """

    node: fx.Node
    argument: str
    index: int | None
    terms: tuple[Dim, ...]
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Product:
    """A contraction: which dimension of which operand each label names.

    Args:
        node: The op.
        operands: The values multiplied, each with its dimensions by label.
        kept: Labels of the result.
        biases: Values added to the result, with their dimensions.
    """

    node: fx.Node
    operands: tuple[tuple[fx.Node, dict[Any, Dim]], ...]
    kept: frozenset[Any]
    biases: tuple[tuple[fx.Node, tuple[Dim, ...]], ...] = ()

    def contracted(self, operand: int) -> list[Dim]:
        """Dimensions of an operand that the result has not."""
        return [dim for label, dim in self.operands[operand][1].items() if label not in self.kept]

    def batch(self) -> list[Dim]:
        """Dimensions in which every operand has a slice of its own for every slice of the result."""
        shared = self.kept.intersection(*(dims for _, dims in self.operands))
        return [self.operands[0][1][label] for label in shared]


@dataclass(frozen=True)
class Effect:
    """When a unit of the result is zero, in terms of the operands.

    ``"any"``: when it is in any operand and in every bias; ``"all"``: when it is in every operand
    (``part``: in every operand that has it, as in a concatenation); ``"masked"``: whenever it is masked.
    It says so about every dimension, or about those ``within`` alone, and about none of ``without``.
    """

    kind: Literal["any", "all", "part", "masked"]
    operands: tuple[fx.Node, ...]
    biases: tuple[fx.Node, ...] = ()
    role: Literal["adds", "scales", "moves"] = "moves"
    within: tuple[Dim, ...] | None = None
    without: tuple[Dim, ...] = ()


@dataclass(frozen=True, eq=False)
class Choice:
    """An op in which the units of a dimension compete: a softmax, the largest, the best k.

    A unit whose score is minus infinity there does not take part, as if it were cut.

    Args:
        node: The op.
        source: The scores.
        place: Their dimension along which they compete.
        dim: That dimension.
        count: How many units the op needs.
        reason: Why units that are masked by zeros still count.
    """

    node: fx.Node
    source: fx.Node
    place: int
    dim: Dim
    count: int
    reason: str


Dims: TypeAlias = "list[Dim]"
Rule: TypeAlias = "Callable[[AxisTyping, fx.Node, dict[str, Any]], Any]"


@dataclass(eq=False)
class AxisTyping:
    """The axes of a program, and what its ops do along them."""

    program: Program
    axes: Axes = field(default_factory=Axes)
    dims: dict[fx.Node, Any] = field(default_factory=dict)
    weights: dict[str, Dims] = field(default_factory=dict)
    literals: list[SizeLiteral] = field(default_factory=list)
    pieces: dict[fx.Node, list[Dim]] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    sums: list[tuple[fx.Node, fx.Node, Dim]] = field(default_factory=list)
    poles: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    """Ops whose result is not finite where an operand is zero."""
    heads: list[Dim] = field(default_factory=list)
    experts: list[Dim] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    labels: dict[fx.Node, Any] = field(default_factory=dict)
    """Values that are numbers of units: the dimension they number (by item, of ops with several results)."""
    understood: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)
    """``(op, operand)``: what the op does with these numbers holds for any numbering."""
    taken: list[Dim] = field(default_factory=list)
    """Dimensions from which chosen units are taken out, so that others are chosen next."""
    numbered: dict[fx.Node, Dim] = field(default_factory=dict)
    """Vectors of fixed values along an axis; cutting the axis picks from them."""
    effects: dict[fx.Node, Effect] = field(default_factory=dict)
    mutated: set[fx.Node] = field(default_factory=set)
    constant: set[fx.Node] = field(default_factory=set)
    """Values that depend on no input of the model."""
    _atoms: dict[Dim, frozenset[Axis]] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Dims:
        """The dimensions of a tensor."""
        found: Dims = self.dims[node]
        return found

    def atoms(self, dim: Dim) -> frozenset[Axis]:
        """The variables inside a dimension, once every op is typed."""
        found = self._atoms.get(dim)
        if found is None:
            found = self._atoms[dim] = frozenset(self.axes.variables(dim))
        return found

    def numbers(self, node: fx.Node, operand: Any) -> Dim | None:
        """The dimension whose units ``operand`` holds numbers of, for an op that any numbering suits."""
        held = self.labels.get(operand) if isinstance(operand, fx.Node) else None
        if held is None:
            return None
        self.understood.add((node, operand))
        found: Dim = held
        return found

    def shape(self, node: fx.Node) -> list[Size]:
        """Sizes of a tensor."""
        return [size_value(size) for size in node.meta["val"].shape]

    def literal(
        self, node: fx.Node, argument: str, index: int | None, value: Any, *terms: Dim, offset: int = 0
    ) -> None:
        """Note a size in the arguments; values other than sizes (-1, inferred) are left alone."""
        if isinstance(value, int) and value == -1:
            return
        if isinstance(value, int) and sum(self.axes.size(dim) for dim in terms) + offset != value:
            for dim in terms:
                self.axes.freeze(dim, f"the {argument} {value} of {describe(node)} is not understood")
            return
        self.literals.append(SizeLiteral(node, argument, index, terms, offset))

    def fresh(self, node: fx.Node, reason: str) -> Any:
        """New dimensions that may not be cut, for every tensor the node yields."""
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return [self.axes.new_frozen(size_value(size), reason) for size in value.shape]
        if isinstance(value, list | tuple):
            return [
                [self.axes.new_frozen(size_value(size), reason) for size in item.shape]
                if isinstance(item, Tensor)
                else None
                for item in value
            ]
        return None

    def freeze_all(self, node: fx.Node, reason: str) -> None:
        """No axis of the node's value may be cut."""
        held = self.dims.get(node)
        if held is None:
            return
        for entry in held:
            for dim in entry if isinstance(entry, list) else [entry]:
                if dim is not None:
                    self.axes.freeze(dim, reason)


def type_axes(program: Program) -> AxisTyping:
    """Type every dimension of every value of ``program``."""
    typing = AxisTyping(program)
    for node in program.graph.nodes:
        _type_node(typing, node)
        follow_labels(typing, node)
    return typing


def _type_node(typing: AxisTyping, node: fx.Node) -> None:
    if node.op == "placeholder":
        _placeholder(typing, node)
    elif node.op == "output":
        for source in node.all_input_nodes:
            typing.freeze_all(source, "it is an output of the model")
    elif node.op == "get_attr":
        typing.dims[node] = typing.fresh(node, f"{node.target} is no weight but an attribute of the graph")
        typing.constant.add(node)
    else:
        if all(source in typing.constant for source in node.all_input_nodes):
            typing.constant.add(node)
        typing.dims[node] = _call(typing, node)


def _placeholder(typing: AxisTyping, node: fx.Node) -> None:
    name = typing.program.weight_of.get(node.name)
    if name is None:
        typing.dims[node] = typing.fresh(node, f"it is a dimension of the input {node.name!r}")
        return
    typing.constant.add(node)
    if name not in typing.weights:
        shape = typing.program.weights[name].shape
        typing.weights[name] = [typing.axes.new(int(size)) for size in shape]
    typing.dims[node] = typing.weights[name]


def _call(typing: AxisTyping, node: fx.Node) -> Any:
    from fxcompress.analysis.axis_rules import rule_of

    if node.target is operator.getitem:
        source, index = node.args
        held = typing.dims.get(source) if isinstance(source, fx.Node) else None
        return held[index] if held is not None and isinstance(index, int) else typing.fresh(node, "unknown")
    name = op_name(node)
    if not isinstance(node.meta.get("val"), Tensor | list | tuple):
        _size_read(typing, node, name)
        return None
    mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    rule = rule_of(name, mutable=mutable)
    if rule is None:
        return _unknown(typing, node)
    if mutable:
        _mutates(typing, node)
    result = rule(typing, node, arguments(node))
    return _unknown(typing, node) if result is None else result


def _unknown(typing: AxisTyping, node: fx.Node) -> Any:
    """An op without a rule may do anything along any axis."""
    reason = f"{describe(node)} has no rule for channels"
    for source in node.all_input_nodes:
        typing.freeze_all(source, reason)
    return typing.fresh(node, reason)


def _size_read(typing: AxisTyping, node: fx.Node, name: str) -> None:
    """A size read at run time shrinks by itself, but what is computed from it may not know."""
    if name != "aten::sym_size":
        for source in node.all_input_nodes:
            typing.freeze_all(source, f"{describe(node)} reads it")
        return
    args: tuple[Any, ...] = node.args
    dim = typing.of(args[0])[args[1]]
    typing.axes.freeze(dim, f"{describe(node)} reads its size")


def _mutates(typing: AxisTyping, node: fx.Node) -> None:
    """What is written in place, and every value it is a view of, is no longer what was computed."""
    target: Any = node.args[0] if node.args else None
    while isinstance(target, fx.Node) and target not in typing.mutated:
        typing.mutated.add(target)
        effect = typing.effects.get(target)
        if target.target is operator.getitem:
            target = target.args[0]
        else:
            target = effect.operands[0] if effect is not None and len(effect.operands) == 1 else None


def tensors(*values: Any) -> Sequence[fx.Node]:
    """Those of ``values`` that are nodes with a tensor value."""
    return [v for v in values if isinstance(v, fx.Node) and isinstance(v.meta.get("val"), Tensor)]
