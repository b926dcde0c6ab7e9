"""Find where queries can be divided by a scale per channel that their keys are multiplied with.

    scores = Σ_c q_c · k_c = Σ_c (q_c / s_c) · (k_c · s_c)

The scale moves into whatever produces each side: rows of a projection (parts of one, where it is fused), the
gain of a norm per head, and biases added on the way. What lies between has to commute with a scale per
channel; a rotary embedding mixes two channels of a pair, which then share their scale, and the flow of labels
finds the pairs by itself, whatever their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxcompress.analysis.attention import AttentionSite, find_attention
from fxcompress.analysis.channel_flow import Flow
from fxcompress.analysis.channel_labels import NO_CHANNEL, ChannelClasses, align, constant_along
from fxcompress.analysis.op_arguments import aten_names, op_name
from fxcompress.analysis.site_types import Site
from fxcompress.analysis.smoothing_group import GroupKind, ScaledParameter, SmoothingGroup
from fxcompress.analysis.smoothing_sources import Source, find_sources
from fxcompress.capture.program import Program

__all__ = ["QueryKeyAnalysis", "QueryKeyGroup", "find_query_key_groups"]

_SDPA = "aten::scaled_dot_product_attention"
_PRODUCTS = aten_names("matmul bmm")


@dataclass(frozen=True, eq=False)
class QueryKeyGroup:
    """Queries and keys of one attention.

    Args:
        attention: The attention.
        group: Its parameters, all of them producers: channels ``0 … C-1`` are queries, ``C … 2C-1`` keys.
        query, key: What produces each side.
        query_channels, key_channels: ``[rows or gains]`` channel below C of every element of the producer's
            own parameter, -1 for none.
    """

    attention: AttentionSite
    group: SmoothingGroup
    query: Source
    key: Source
    query_channels: Tensor
    key_channels: Tensor

    @property
    def channels(self) -> int:
        """C, the number of independent scales."""
        return self.group.channels // 2


@dataclass(frozen=True, eq=False)
class QueryKeyAnalysis:
    """What :func:`find_query_key_groups` found: groups, and why other attentions have none."""

    groups: tuple[QueryKeyGroup, ...]
    refused: tuple[tuple[AttentionSite, str], ...]


def find_query_key_groups(
    program: Program, sites: Sequence[Site], nodes: AbstractSet[fx.Node] | None = None
) -> QueryKeyAnalysis:
    """Find the groups of a program, or of one block of it.

    Args:
        program: The program.
        sites: Its weight sites.
        nodes: The block; a group lies wholly inside. Default: the whole graph.

    Example:
        >>> [group.group.name for group in find_query_key_groups(program, find_sites(program)).groups]
    """
    inside = set(program.graph.nodes) if nodes is None else nodes
    meetings = {
        score: attention
        for attention in find_attention(program, sites)
        if (score := _score(attention)) in inside and score is not None
    }
    if not meetings:
        return QueryKeyAnalysis((), ())
    by_node: dict[fx.Node, list[Site]] = {}
    for site in sites:
        by_node.setdefault(site.node, []).append(site)
    order = {node: k for k, node in enumerate(program.graph.nodes)}
    arrived: dict[fx.Node, dict[str, tuple[Source, _Arrivals]]] = {score: {} for score in meetings}
    stopped: dict[str, str] = {}
    for source in find_sources(program, sites, inside, fold_linear=True):
        if source.refusal:
            stopped[source.name] = source.refusal
            continue
        flow = _Arrivals(program, order, inside, by_node, source.classes(), source.node, meetings=meetings)
        for bias in source.biases:
            if not flow.accompany(source.node, source.labels, bias):
                flow.freeze(source.node, source.labels, f"{source.name}: what is added to it is no parameter")
        flow.run(source.labels)
        if flow.blockers and not flow.arrivals:
            stopped[source.name] = next(iter(flow.blockers.values()))
        for score, side in flow.arrivals:
            arrived[score].setdefault(side, (source, flow))
    groups, refused = [], []
    for score, attention in meetings.items():
        found = _missing(attention, arrived[score], stopped) or _group(attention, score, arrived[score])
        if isinstance(found, str):
            refused.append((attention, found))
        else:
            groups.append(found)
    return QueryKeyAnalysis(tuple(groups), tuple(refused))


def _score(attention: AttentionSite) -> fx.Node | None:
    """The op in which queries meet keys."""
    if op_name(attention.node) == _SDPA:
        return attention.node
    for user in attention.query.users:
        if user in attention.key.users and op_name(user) in _PRODUCTS:
            return user
    return None


@dataclass
class _Arrivals(Flow):
    """A flow that ends at attentions and notes what arrives there as queries or keys."""

    meetings: Mapping[fx.Node, AttentionSite] = field(default_factory=dict)
    arrivals: dict[tuple[fx.Node, str], Tensor] = field(default_factory=dict)

    def _apply(self, node: fx.Node, inputs: Sequence[fx.Node]) -> Tensor | list[Tensor] | None:
        if node not in self.meetings:
            return super()._apply(node, inputs)
        attention = self.meetings[node]
        for side, value in (("query", attention.query), ("key", attention.key)):
            labels = self.live(value)
            if labels is None:
                continue
            if side == "key" and attention.key_transposed:
                labels = labels.transpose(-1, -2)
            kept = constant_along(labels, -2)
            if kept is None:
                self.freeze(node, labels, "channels lie along the tokens of an attention")
            else:
                self.arrivals[node, side] = kept
        for value in inputs:
            if value is not attention.query and value is not attention.key:
                self.freeze(node, self.live(value), "it is no query and no key")
        return None


def _missing(
    attention: AttentionSite,
    arrived: Mapping[str, tuple[Source, _Arrivals]],
    stopped: Mapping[str, str],
) -> str | None:
    """Why one side has no producer, if so: what stopped the flow of its weights, where it has any."""
    for side, weights in (("query", attention.query_weights), ("key", attention.key_weights)):
        if side not in arrived:
            why = next((f": {name} → {stopped[name]}" for name in weights if name in stopped), "")
            return f"no parameter before its {side} can take a scale per channel{why}"
    return None


def _group(
    attention: AttentionSite, score: fx.Node, arrived: Mapping[str, tuple[Source, _Arrivals]]
) -> QueryKeyGroup | str:
    (query, query_flow), (key, key_flow) = arrived["query"], arrived["key"]
    for flow in (query_flow, key_flow):
        if {place for place, _ in flow.arrivals} != {score}:
            return f"{flow.seed.name} is read by several attentions"
    for side, source, flow in (("query", query, query_flow), ("key", key, key_flow)):
        labels = flow.arrivals[score, side]
        if not bool((flow.classes.live(labels) >= 0).any()):
            return f"{source.name} → {flow.classes.why(labels)}"
    joint, offset = _joined(query_flow, key_flow)
    queries, keys = query_flow.arrivals[score, "query"], key_flow.arrivals[score, "key"]
    keys = torch.where(keys >= 0, keys + offset, NO_CHANNEL)
    rank = max(queries.dim(), keys.dim())
    queries, keys = align(queries, rank), align(keys, rank)
    heads, kv_heads = queries.shape[-3], keys.shape[-3]
    if heads != kv_heads and 1 not in (heads, kv_heads):  # heads shared inside the op itself
        keys = keys.repeat_interleave(heads // kv_heads, -3)
    for source, flow in ((query, query_flow), (key, key_flow)):
        _freeze_elsewhere(joint, flow, 0 if flow is query_flow else offset, source.name)
    if offset == 0:  # one fused producer: an element that is query and key would need s and 1/s
        both = torch.zeros(joint.count, dtype=torch.bool)
        both[_members(joint, queries)] = True
        shared = _members(joint, keys)
        joint.freeze(shared[both[shared]], f"{query.name}: a row is read as query and as key")
    joint.merge(queries, keys, f"{attention.name}: a channel of its queries meets an unscaled key")
    return _build(attention, (query, query_flow, queries), (key, key_flow, keys), joint, offset)


def _joined(query_flow: _Arrivals, key_flow: _Arrivals) -> tuple[ChannelClasses, int]:
    """One set of classes for both flows, and where the key's labels start in it."""
    flows = [query_flow] if query_flow is key_flow else [query_flow, key_flow]
    joint = ChannelClasses(sum(flow.classes.count for flow in flows))
    start = 0
    for flow in flows:
        own = torch.arange(flow.classes.count)
        joint.merge(own + start, flow.classes.root + start, "")
        joint.freeze(own[flow.classes.frozen] + start, flow.classes.why(own) or "")
        start += flow.classes.count
    return joint, 0 if len(flows) == 1 else query_flow.classes.count


def _freeze_elsewhere(joint: ChannelClasses, flow: _Arrivals, start: int, name: str) -> None:
    """Rows that a matrix reads directly, too (values of a fused projection, say) keep their scale."""
    for absorbed in flow.absorbed:
        columns = absorbed.columns[absorbed.columns >= 0]
        joint.freeze(columns + start, f"{name}: {absorbed.site.name} reads it")


def _members(joint: ChannelClasses, labels: Tensor) -> Tensor:
    """All labels in the classes of the live ones among ``labels``."""
    live = joint.live(labels)
    chosen = torch.zeros(joint.count, dtype=torch.bool)
    chosen[joint.root[live[live >= 0]]] = True
    return chosen[joint.root].nonzero().flatten()


def _build(
    attention: AttentionSite,
    query: tuple[Source, _Arrivals, Tensor],
    key: tuple[Source, _Arrivals, Tensor],
    joint: ChannelClasses,
    offset: int,
) -> QueryKeyGroup | str:
    """Number the classes that are left; keys get the numbers of their queries plus C."""
    live = joint.live(query[2])
    used = torch.zeros(joint.count, dtype=torch.bool)
    used[joint.root[live[live >= 0]]] = True
    count = int(used.sum())
    if not count:
        return joint.why(query[2]) or "no channel of its queries meets one of its keys"
    number = torch.full((joint.count,), NO_CHANNEL)
    number[used] = torch.arange(count)
    channel_of = number[joint.root]
    is_key = torch.zeros(joint.count, dtype=torch.bool)
    # After the tie a class holds queries and keys; which one an element is, its own arrival says.
    is_key[_own_members(key[1].classes, key[1].arrivals[_only(key[1]), "key"]) + offset] = True

    def channels(labels: Tensor, start: int) -> Tensor:
        places = labels.clamp_min(0) + start
        held = torch.where(labels >= 0, channel_of[places], NO_CHANNEL)
        return torch.where((held >= 0) & is_key[places], held + count, held)

    producers: list[ScaledParameter] = []
    sides = [(query[0], query[1], 0)]
    if key[1] is not query[1]:
        sides.append((key[0], key[1], offset))
    for source, flow, start in sides:
        producers += [
            ScaledParameter(p.name, channels(p.labels, start), p.role, True, p.multiplier, p.offset)
            for p in source.parameters
        ]
        producers += [
            ScaledParameter(
                c.view.name, channels(c.labels, start), "bias", True, c.view.multiplier, c.view.offset
            )
            for c in flow.companions
        ]
    group = SmoothingGroup(GroupKind.LINEAR, attention.node, 2 * count, tuple(producers), ())
    own_query = channels(torch.arange(query[0].count), 0)
    own_key = channels(torch.arange(key[0].count), offset)
    return QueryKeyGroup(
        attention,
        group,
        query[0],
        key[0],
        torch.where(own_query < count, own_query, NO_CHANNEL),
        torch.where(own_key >= count, own_key - count, NO_CHANNEL),
    )


def _only(flow: _Arrivals) -> fx.Node:
    return next(place for place, _ in flow.arrivals)


def _own_members(classes: ChannelClasses, labels: Tensor) -> Tensor:
    chosen = torch.zeros(classes.count, dtype=torch.bool)
    chosen[classes.root[labels[labels >= 0]]] = True
    return chosen[classes.root].nonzero().flatten()
