"""Producers that can divide their output channels by a scale: gains, and matrices with their biases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.analysis.channel_flow import ABSORBING, product_of
from fxcompress.analysis.channel_labels import ChannelClasses, align
from fxcompress.analysis.op_arguments import arguments, op_name, shape_of
from fxcompress.analysis.parameter_views import ParameterView, parameter_view
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.analysis.smoothing_group import GroupKind, rows_in_parameter
from fxcompress.capture.program import Program


@dataclass(frozen=True, eq=False)
class SourceParameter:
    """A parameter of a producer; ``labels`` broadcasts to its shape."""

    name: str
    labels: Tensor
    role: str
    multiplier: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Source:
    """A candidate producer.

    Args:
        kind: Gain or matrix.
        name: Its parameter, for messages.
        node: The node whose value gets divided.
        labels: Labels of that value, ``0 … count-1``.
        count: Number of channels.
        parameters: What has to be divided to divide the value.
        biases: Values the node adds itself, which must be divided along.
        refusal: Why it cannot be a producer at all; empty if it can.
    """

    kind: GroupKind
    name: str
    node: fx.Node
    labels: Tensor
    count: int
    parameters: tuple[SourceParameter, ...] = ()
    biases: tuple[object, ...] = ()
    refusal: str = ""

    def classes(self) -> ChannelClasses:
        """Fresh channel classes for one flow."""
        return ChannelClasses(self.count)


def find_sources(
    program: Program, sites: Sequence[Site], inside: AbstractSet[fx.Node], *, fold_linear: bool
) -> Iterator[Source]:
    """All candidate producers among ``inside``, in graph order."""
    by_node: dict[fx.Node, list[Site]] = {}
    for site in sites:
        by_node.setdefault(site.node, []).append(site)
    for node in program.graph.nodes:
        if node not in inside or node.op != "call_function":
            continue
        if node in by_node:
            product = product_of(by_node[node])
            if product is not None:
                yield from _matrix(program, product) if fold_linear else ()
                continue
        if op_name(node) == "aten::mul":
            yield from _gain(program, node)
        elif op_name(node) in ("aten::layer_norm", "aten::rms_norm"):
            yield from _norm(program, node)


def _gain(program: Program, node: fx.Node) -> Iterator[Source]:
    """A product with exactly one factor computed from one parameter."""
    args = arguments(node)
    views = [view for key in ("self", "other") if (view := parameter_view(program, args[key])) is not None]
    if len(views) == 1 and views[0].index.numel() > 1:
        yield _from_view(node, views[0], ())


def _norm(program: Program, node: fx.Node) -> Iterator[Source]:
    args = arguments(node)
    gain = args["weight"]
    if gain is None:
        refusal = f"{op_name(node)} ({node.name}) has no gain"
        yield Source(GroupKind.NORM, node.name, node, torch.zeros(1, dtype=torch.int64), 1, refusal=refusal)
        return
    view = parameter_view(program, gain)
    if view is not None:
        bias = args.get("bias")
        yield _from_view(node, view, () if bias is None else (bias,))


def _from_view(node: fx.Node, view: ParameterView, biases: tuple[object, ...]) -> Source:
    count = int(torch.tensor(view.shape).prod())
    own = torch.arange(count).reshape(view.shape)
    parameter = SourceParameter(view.name, own, "gain", view.multiplier, view.offset)
    labels = align(view.index, len(shape_of(node)))
    refusal = f"{view.name} is used elsewhere, too" if view.shared else ""
    return Source(GroupKind.NORM, view.name, node, labels, count, (parameter,), biases, refusal)


def _matrix(program: Program, site: Site) -> Iterator[Source]:
    if site.kind not in ABSORBING or site.layout.row_dims != 1:
        return
    batches, outputs, _ = site.layout.matrix_shape
    rank = len(shape_of(site.node))
    if site.kind is SiteKind.BATCHED and site.layout.batch_dims == 1 and rank >= 3:
        rows = torch.arange(batches * outputs).reshape(batches, outputs)
        labels = align(rows.unsqueeze(1), rank)
    else:
        rows = torch.arange(outputs).reshape(1, outputs)
        labels = align(rows[0], rank)
    parameter = SourceParameter(site.name, rows_in_parameter(site.layout, rows), "rows")
    biases = tuple(node for node in site.node.all_input_nodes if _added(node, site))
    bindings = sum(1 for holder in program.weight_node(site.name) if holder.users)
    single = bindings == 1 and all(len(node.users) == 1 for node in (site.weight, *site.chain))
    refusal = "" if single else f"{site.name} is used elsewhere, too"
    yield Source(GroupKind.LINEAR, site.name, site.node, labels, rows.numel(), (parameter,), biases, refusal)


def _added(node: fx.Node, site: Site) -> bool:
    value = node.meta.get("val")
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return is_float and node is not site.input and node is not site.weight_value
