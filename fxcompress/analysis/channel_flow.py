"""Follow scaled channels forward: if channel j of a value is divided by s_j, which elements downstream are?

A flow starts with labels on one value and walks the graph forward. Ops that commute with a positive scale per
channel pass labels on; weight sites absorb them (their columns can be multiplied by s_j); everything else
*freezes* the channels it reads (s_j must stay 1) and says why. What is left at the end can be scaled by any
s > 0 without changing any output of the graph, because every reader of every labelled value was visited.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxcompress.analysis.channel_labels import NO_CHANNEL, ChannelClasses, align
from fxcompress.analysis.channel_moves import MOVES, BlockedError
from fxcompress.analysis.op_arguments import arguments, aten_names, describe, op_name, shape_of
from fxcompress.analysis.parameter_views import ParameterView, parameter_view
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.capture.program import Program

_SHAPE_ONLY = aten_names(
    """
    sym_size sym_stride sym_numel sym_storage_offset zeros_like ones_like empty_like full_like rand_like
    new_zeros new_ones new_full new_empty
    """
)
_BY_SHAPE_OF_OTHER = aten_names("to type_as expand_as view_as reshape_as")
ABSORBING = (SiteKind.LINEAR, SiteKind.BATCHED, SiteKind.EXPERTS)
"""Kinds of sites whose columns can take a scale."""


def product_of(sites: Sequence[Site]) -> Site | None:
    """The site whose matrix a node multiplies with, if there is exactly one; what it adds does not count."""
    products = [site for site in sites if site.kind is not SiteKind.OTHER]
    return products[0] if len(products) == 1 else None


def _does_not_commute(node: fx.Node) -> BlockedError:
    return BlockedError(f"{describe(node)} does not commute with a scale per channel")


@dataclass(frozen=True, eq=False)
class Absorbed:
    """Labels that arrived at a site: ``columns`` is ``[B, K]``, or ``[1, K]`` if all matrices share them."""

    site: Site
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Companion:
    """A parameter added to a labelled value, to be divided along; ``labels`` has its shape."""

    view: ParameterView
    labels: Tensor


@dataclass
class Flow:
    """One walk.

    Args:
        program: The program.
        order: Position of every node in the graph.
        inside: Nodes that may be labelled; a reader elsewhere freezes what it reads.
        sites: Sites by their node.
        classes: The channels.
        seed: The node the labels start on.
    """

    program: Program
    order: Mapping[fx.Node, int]
    inside: AbstractSet[fx.Node]
    sites: Mapping[fx.Node, Sequence[Site]]
    classes: ChannelClasses
    seed: fx.Node
    labels: dict[fx.Node, Tensor | list[Tensor]] = field(default_factory=dict)
    absorbed: list[Absorbed] = field(default_factory=list)
    companions: list[Companion] = field(default_factory=list)
    blockers: dict[fx.Node, str] = field(default_factory=dict)

    def run(self, labels: Tensor) -> None:
        """Walk from the seed, whose elements carry ``labels``."""
        self._check_in_place(self.seed, labels)
        self.labels[self.seed] = labels
        queue = [(self._place(user), user) for user in self.seed.users]
        heapq.heapify(queue)
        done: set[fx.Node] = set()
        while queue:
            _, node = heapq.heappop(queue)
            if node in done:
                continue
            done.add(node)
            result = self._visit(node)
            if result is not None and self._any_live(result):
                self.labels[node] = result
                for user in node.users:
                    heapq.heappush(queue, (self._place(user), user))

    def live(self, value: object) -> Tensor | None:
        """Live labels of an argument, aligned with its shape; None when it carries none."""
        if not isinstance(value, fx.Node):
            return None
        labels = self.labels.get(value)
        if not isinstance(labels, Tensor):
            return None
        labels = self.classes.live(labels)
        return labels if bool((labels >= 0).any()) else None

    def freeze(self, node: fx.Node, labels: Tensor | None, reason: str) -> None:
        """Give up these channels because of ``node``."""
        if labels is not None and bool((self.classes.live(labels) >= 0).any()):
            self.blockers.setdefault(node, reason)
            self.classes.freeze(labels, reason)

    def merge(self, node: fx.Node, one: Tensor, two: Tensor, reason: str) -> Tensor:
        """Demand equal scales; see :meth:`ChannelClasses.merge`."""
        before = len(self.classes.reasons)
        merged = self.classes.merge(one, two, reason)
        if len(self.classes.reasons) > before:
            self.blockers.setdefault(node, reason)
        return merged

    def _place(self, node: fx.Node) -> int:
        return self.order[node]

    def _any_live(self, result: Tensor | list[Tensor]) -> bool:
        parts = result if isinstance(result, list) else [result]
        return any(bool((self.classes.live(part) >= 0).any()) for part in parts)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [
            source
            for source in node.all_input_nodes
            if source in self.labels and self._any_live(self.labels[source])
        ]

    def _freeze_all(self, node: fx.Node, reason: str) -> None:
        for source in self._inputs(node):
            held = self.labels[source]
            for part in held if isinstance(held, list) else [held]:
                self.freeze(node, part, reason)

    def _check_in_place(self, node: fx.Node, labels: Tensor) -> None:
        """A seed must be a fresh tensor, or its aliases would be scaled unseen."""
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            self.freeze(node, labels, f"{describe(node)} works in place")

    def _visit(self, node: fx.Node) -> Tensor | list[Tensor] | None:
        inputs = self._inputs(node)
        if not inputs:
            return None
        if node.op != "call_function":
            self._freeze_all(node, f"it is read by {describe(node)}")
            return None
        if node.target is operator.getitem:
            held = self.labels[inputs[0]]
            index = node.args[1]
            if isinstance(held, list) and isinstance(index, int):
                return held[index]
            self._freeze_all(node, str(_does_not_commute(node)))
            return None
        if op_name(node) in _SHAPE_ONLY:
            return None
        if node not in self.inside:
            self._freeze_all(node, f"it is also read outside its block, by {describe(node)}")
            return None
        if node in self.sites:
            self._absorb(node, self.sites[node])
            return None
        try:
            return self._apply(node, inputs)
        except BlockedError as blocked:
            self._freeze_all(node, str(blocked))
            return None

    def _apply(self, node: fx.Node, inputs: Sequence[fx.Node]) -> Tensor | list[Tensor] | None:
        from fxcompress.analysis.channel_rules import RULES

        name = op_name(node)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise _does_not_commute(node)
        if name in RULES:
            result = RULES[name](self, node, arguments(node))
            return None if result is None else self._check_rank(node, result)
        if name not in MOVES:
            raise _does_not_commute(node)
        args = arguments(node)
        source = args.get("self", args.get("input"))
        others = [other for other in inputs if other is not source]
        if others and name not in _BY_SHAPE_OF_OTHER:
            raise _does_not_commute(node)
        labels = self.live(source)
        return None if labels is None else self._check_rank(node, MOVES[name](node, labels, args))

    def _check_rank(self, node: fx.Node, result: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Labels must fit the value; a mismatch would be a wrong rule, and is treated as an unknown op."""
        if isinstance(result, list):
            return result
        shape = shape_of(node)
        fits = result.dim() == len(shape) and all(
            a in (1, b) for a, b in zip(result.shape, shape, strict=True)
        )
        if not fits:
            raise BlockedError(f"{describe(node)}: labels {tuple(result.shape)} do not fit its shape {shape}")
        return result

    def _absorb(self, node: fx.Node, sites: Sequence[Site]) -> None:
        site = product_of(sites)
        if site is None or site.kind not in ABSORBING or site.input is None:
            what = sites[0] if site is None else site
            self._freeze_all(
                node, f"{describe(node)} uses {what.name} ({what.kind.value}), which cannot take a scale"
            )
            return
        if node not in self.inside:
            self._freeze_all(node, f"{site.name} lies in another block")
            return
        for source in self._inputs(node):
            if source is not site.input:
                self._freeze_all(node, f"{describe(node)} adds it to its product")
                return
        labels = self.live(site.input)
        if labels is None:
            return
        columns = self._columns(node, site, labels)
        if columns is not None and self._any_live(columns):
            self.absorbed.append(Absorbed(site, columns))

    def _columns(self, node: fx.Node, site: Site, labels: Tensor) -> Tensor | None:
        """Labels of the site's columns, ``[1, K]`` or ``[B, K]``; merges what shares a column."""
        batches, _, width = site.layout.matrix_shape
        reason = f"{describe(node)}: a column of {site.name} would need two scales"
        if site.input is None or shape_of(site.input)[-1] != width:
            self.freeze(node, labels, f"{describe(node)} does not contract the last dimension of its input")
            return None
        labels = labels.expand(*labels.shape[:-1], width)
        per_matrix = (
            site.kind is SiteKind.BATCHED
            and site.layout.batch_dims == 1
            and labels.dim() >= 3
            and labels.shape[-3] == batches > 1
        )
        rows = (
            labels.movedim(-3, 0).reshape(batches, -1, width) if per_matrix else labels.reshape(1, -1, width)
        )
        columns = rows[:, 0]
        for k in range(1, rows.shape[1]):
            columns = self.merge(node, columns, rows[:, k], reason)
        return columns

    def accompany(self, node: fx.Node, labels: Tensor, other: object) -> bool:
        """Divide the parameter ``other``, which ``node`` adds to a labelled value, along if it is one."""
        view = parameter_view(self.program, other)
        if view is None:
            return False
        if view.shared:
            self.freeze(node, labels, f"{view.name}, which {describe(node)} adds, is used elsewhere, too")
            return True
        rank = max(labels.dim(), view.index.dim())
        index, values = torch.broadcast_tensors(align(view.index, rank), align(labels, rank))
        index, values = index.flatten(), values.flatten()
        held = torch.full((max(1, int(torch.tensor(view.shape).prod())),), NO_CHANNEL)
        held[index] = values
        self.merge(
            node, held[index], values, f"an element of {view.name} would need two scales in {describe(node)}"
        )
        self.companions.append(Companion(view, held.reshape(view.shape)))
        return True
