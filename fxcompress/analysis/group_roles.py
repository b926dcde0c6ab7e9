"""What a parameter does for the units of an axis, and what a unit is: read off the products."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fxcompress.analysis.axes import Axis, Dim
from fxcompress.analysis.axis_typing import AxisTyping, Effect, Product
from fxcompress.analysis.channel_group import Kind, Role
from fxcompress.analysis.op_arguments import op_name
from fxcompress.analysis.unit_masking import Judgement

__all__ = ["find_kinds", "find_roles"]

_RANK: dict[Role, int] = {"scales": 0, "consumes": 1, "produces": 2}


class _Roles:
    def __init__(self, typing: AxisTyping, judgement: Judgement) -> None:
        self.typing = typing
        self.judgement = judgement
        self.found: dict[tuple[str, int, Axis], Role] = {}
        self.names = _weights_in(typing)

    def note(self, node: fx.Node, dims: Iterable[Dim], role: Role) -> None:
        """Every weight that ``node`` is computed from has this role for the axes of ``dims``."""
        names = self.names.get(node, ())
        axes = {axis for dim in dims for axis in self.judgement.atoms(dim)} if names else set()
        for name in names:
            for place, own in enumerate(self.typing.weights[name]):
                for axis in axes & self.judgement.atoms(own):
                    old = self.found.get((name, place, axis))
                    if old is None or _RANK[role] > _RANK[old]:
                        self.found[name, place, axis] = role

    def product(self, made: Product) -> None:
        batch = made.batch()
        for index, (operand, dims) in enumerate(made.operands):
            if operand not in self.typing.constant:
                continue
            self.note(operand, made.contracted(index), "consumes")
            kept = [dim for label, dim in dims.items() if label in made.kept]
            alone = len(dims) > len(batch)
            self.note(operand, kept, "produces" if alone else "scales")
        for bias, own in made.biases:
            if bias in self.typing.constant:
                self.note(bias, own, "produces")

    def sum(self, effect: Effect, products: set[fx.Node]) -> None:
        """A vector added to a product is its bias; rows looked up are computed by the table."""
        if len(effect.operands) == 1:
            table = effect.operands[0]
            self.note(table, self.typing.of(table)[1:], "produces")
            return
        for one, other in (effect.operands, reversed(effect.operands)):
            if one in self.typing.constant and other in products:
                self.note(one, self.typing.of(one), "produces")


def find_roles(typing: AxisTyping, judgement: Judgement) -> dict[tuple[str, int, Axis], Role]:
    """``(weight, dimension, axis)`` → role; what is missing scales.

    A weight that computes units at one use and reads them at another (a tied one) counts as producing them.
    """
    roles = _Roles(typing, judgement)
    products = {made.node for made in typing.products}
    for made in typing.products:
        roles.product(made)
    for effect in typing.effects.values():
        if effect.role == "adds":
            roles.sum(effect, products)
    return roles.found


def find_kinds(typing: AxisTyping) -> dict[Axis, Kind]:
    """Axes whose units are attention heads or experts.

    Products of two activations weigh every head by itself; a product with a weight for each slice of the
    activation has experts.
    """
    kinds: dict[Axis, Kind] = {}
    for made in typing.products:
        constant = [operand in typing.constant for operand, _ in made.operands]
        if "conv" in op_name(made.node) or not made.kept:
            continue
        for alone, (_, dims) in zip(constant, made.operands, strict=True):
            if alone and len(dims) > 2:  # a stack of matrices
                stack = next(iter(dims.values()))
                for axis in typing.atoms(stack):
                    kinds.setdefault(axis, "experts")
        kind: Kind = "experts" if any(constant) else "heads"
        for dim in made.batch() if not all(constant) else ():
            for axis in typing.atoms(dim):
                if isinstance(axis.size, int) and kinds.get(axis) != "heads":
                    kinds[axis] = kind
    for dim in typing.experts:
        for axis in typing.atoms(dim):
            kinds.setdefault(axis, "experts")
    for dim in typing.heads:
        for axis in typing.atoms(dim):
            kinds[axis] = "heads"
    return kinds


def _weights_in(typing: AxisTyping) -> dict[fx.Node, frozenset[str]]:
    """Weights from which every value without data is computed."""
    names: dict[fx.Node, frozenset[str]] = {}
    for node in typing.program.graph.nodes:
        if node not in typing.constant:
            continue
        own = typing.program.weight_of.get(node.name) if node.op == "placeholder" else None
        sources = [names[source] for source in node.all_input_nodes]
        names[node] = frozenset([own]) if own is not None else frozenset().union(*sources)
    return names
