"""Activation edges: values that an op reads which is no weight site, by names that other graphs share.

Matrix products of two activations, attention and residual sums read values that belong to no weight. A node's
name or place is an accident of one capture: the prefill and decode graphs of a model differ in both. What
they share is which *weights* a value was computed from. The *frontier* of a value are the weight sites met
first on every way back from it. An edge is named by the op, the argument, and the frontiers of all arguments
of the op; its *anchor*, the last weight of the argument's frontier, is the parameter whose form holds the
quantizer. A cache between a projection and attention, of any kind, does not change frontiers.

Two ops that read the same frontiers in the same way cannot be told apart; such edges carry a reason and are
refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from fxcompress.analysis.op_arguments import arguments, op_name, shape_of
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.analysis.sites import find_sites
from fxcompress.capture.program import Program

__all__ = ["Edge", "find_edges"]

_PRODUCTS = {"aten::matmul": ("self", "other"), "aten::bmm": ("self", "mat2"), "aten::mm": ("self", "mat2")}
_ATTENTION = "aten::scaled_dot_product_attention"


@dataclass(frozen=True, eq=False)
class Edge:
    """One argument of one op.

    Args:
        node: The op.
        argument: Name of the argument in the op's schema.
        value: The node it reads.
        role: ``"attention"``, ``"product"`` or ``"sum"``.
        anchor: Canonical name of the parameter that the edge is keyed by.
        signature: Equal in every graph of the model; differs between edges of one graph unless ``reason``.
        reason: Why the edge cannot be named; empty when it can.
    """

    node: fx.Node
    argument: str
    value: fx.Node
    role: str
    anchor: str
    signature: str
    reason: str = ""


def find_edges(program: Program, sites: Sequence[Site] | None = None) -> list[Edge]:
    """All activation edges of a program, in graph order.

    Args:
        program: The program.
        sites: Its weight sites, when they are known.

    Example:
        >>> [(edge.role, edge.argument, edge.anchor) for edge in find_edges(program)][:3]
    """
    products: dict[fx.Node, list[str]] = {}
    order: dict[str, int] = {}
    for place, site in enumerate(find_sites(program) if sites is None else sites):
        if site.kind is not SiteKind.OTHER:
            products.setdefault(site.node, []).append(site.name)
            order.setdefault(site.name, place)
    frontier: dict[fx.Node, frozenset[str]] = {}
    found: list[Edge] = []
    for node in program.graph.nodes:
        if node in products:
            frontier[node] = frozenset(products[node])
            continue
        frontier[node] = frozenset().union(
            *(frontier.get(source, frozenset()) for source in node.all_input_nodes)
        )
        found += _edges_of(node, frontier, order)
    seen: dict[str, int] = {}
    for edge in found:
        seen[edge.signature] = seen.get(edge.signature, 0) + 1
    return [edge if seen[edge.signature] == 1 else _ambiguous(edge, seen[edge.signature]) for edge in found]


def _edges_of(
    node: fx.Node, frontier: dict[fx.Node, frozenset[str]], order: dict[str, int]
) -> Iterator[Edge]:
    role, names = _role(node, frontier)
    if not names:
        return
    args = arguments(node)
    origins = [f"{name}={','.join(sorted(frontier[args[name]]))}" for name in names]
    for name in names:
        value = args[name]
        if frontier[value]:
            anchor = max(frontier[value], key=order.__getitem__)
            text = "|".join((op_name(node), name, *origins))
            signature = hashlib.sha256(text.encode()).hexdigest()[:24]
            yield Edge(node, name, value, role, anchor, signature)


def _role(node: fx.Node, frontier: dict[fx.Node, frozenset[str]]) -> tuple[str, tuple[str, ...]]:
    name = op_name(node)
    if name == _ATTENTION:
        return "attention", ("query", "key", "value")
    if name in _PRODUCTS:
        args = arguments(node)
        names = _PRODUCTS[name]
        if all(_is_activation(args[key]) and frontier[args[key]] for key in names):
            return "product", names
    if name == "aten::add":
        args = arguments(node)
        one, two = args["self"], args["other"]
        alike = _is_activation(one) and _is_activation(two) and _same_width(one, two)
        # Parts of one value (a rotary embedding) are no sum of two.
        if alike and frontier[one] and frontier[two] and frontier[one] != frontier[two]:
            return "sum", ("self", "other")
    return "", ()


def _is_activation(value: object) -> bool:
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    example = value.meta.get("val")
    return isinstance(example, Tensor) and example.is_floating_point() and example.dim() >= 2


def _same_width(one: fx.Node, two: fx.Node) -> bool:
    a, b = shape_of(one), shape_of(two)
    return len(a) == len(b) and isinstance(a[-1], int) and a[-1] == b[-1]


def _ambiguous(edge: Edge, count: int) -> Edge:
    reason = (
        f"{count} ops read {edge.argument!r} of a {edge.role} computed from the same weights, so that no name"
        " tells them apart in every graph"
    )
    return Edge(edge.node, edge.argument, edge.value, edge.role, edge.anchor, edge.signature, reason)
