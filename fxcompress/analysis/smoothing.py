"""Find, by dataflow alone, where a scale per channel can move from an activation into the weights around it.

A *smoothing group* is one producer whose output channels can be divided by s, and all sites that read them:

    norm gain       y = x̂·γ (+ β)        γ ← γ/s, β ← β/s; stored as 1+γ: γ ← (1+γ)/s − 1
    matrix          y = W₁x + b            rows of W₁ and entries of b divided by s
    every reader    z = W₂·f(y)            columns of W₂ multiplied by s

where f is any chain of ops that commutes with a positive scale per channel: views, transposes, splits,
gathers of tokens, ReLU, products with unscaled values (the gate of a gated unit), attention over the value
(heads that share a value share its scale). The function is unchanged for every s > 0 (equivalent
transformations F1 and F2 of SmoothQuant, arXiv:2211.10438, section 4, and of its successors).

A producer qualifies only as far as *every* reader of its channels is such a site; all else is refused with a
reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.analysis.channel_flow import ABSORBING, Absorbed, Flow
from fxcompress.analysis.channel_labels import NO_CHANNEL
from fxcompress.analysis.op_arguments import arguments, op_name
from fxcompress.analysis.site_types import Site
from fxcompress.analysis.smoothing_group import (
    Consumer,
    GroupKind,
    ScaledParameter,
    SmoothingGroup,
    columns_in_parameter,
)
from fxcompress.analysis.smoothing_sources import Source, find_sources
from fxcompress.capture.program import Program

__all__ = [
    "Consumer",
    "GroupKind",
    "ScaledParameter",
    "SmoothingAnalysis",
    "SmoothingGroup",
    "find_smoothing_groups",
]


@dataclass(frozen=True, eq=False)
class SmoothingAnalysis:
    """What :func:`find_smoothing_groups` found.

    Args:
        groups: Groups in graph order of their producers.
        refused: Every site with an activation input that is in no group, and why.
    """

    groups: tuple[SmoothingGroup, ...]
    refused: tuple[tuple[Site, str], ...]


def find_smoothing_groups(
    program: Program,
    sites: Sequence[Site],
    nodes: AbstractSet[fx.Node] | None = None,
    *,
    fold_linear: bool = True,
) -> SmoothingAnalysis:
    """Find all smoothing groups of a program, or of one block of it.

    Args:
        program: The program.
        sites: Its weight sites; sites outside ``nodes`` are known but never part of a group.
        nodes: The block. A group lies wholly inside: producer, path and all sites. Default: the whole graph.
        fold_linear: Whether matrices are producers, too, or only norm gains.

    Example:
        >>> analysis = find_smoothing_groups(program, find_sites(program))
        >>> [(group.name, group.site_names) for group in analysis.groups]
    """
    inside = set(program.graph.nodes) if nodes is None else nodes
    finder = _Finder(program, sites, inside)
    groups = []
    for source in find_sources(program, sites, inside, fold_linear=fold_linear):
        group = finder.try_source(source)
        if group is not None:
            groups.append(group)
    covered = {consumer.site for group in groups for consumer in group.consumers}
    refused = [
        (site, finder.reason(site))
        for site in sites
        if site.takes_activation and site.node in inside and site not in covered
    ]
    return SmoothingAnalysis(tuple(groups), tuple(refused))


class _Finder:
    def __init__(self, program: Program, sites: Sequence[Site], inside: AbstractSet[fx.Node]) -> None:
        self.program = program
        self.inside = inside
        self.order = {node: k for k, node in enumerate(program.graph.nodes)}
        self.sites: dict[fx.Node, list[Site]] = {}
        for site in sites:
            self.sites.setdefault(site.node, []).append(site)
        self.producer_reasons: dict[fx.Node, str] = {}
        self.site_reasons: dict[Site, str] = {}

    def try_source(self, source: Source) -> SmoothingGroup | None:
        if source.refusal:
            self.producer_reasons[source.node] = source.refusal
            return None
        flow = Flow(self.program, self.order, self.inside, self.sites, source.classes(), source.node)
        for bias in source.biases:
            if not flow.accompany(source.node, source.labels, bias):
                flow.freeze(
                    source.node,
                    source.labels,
                    f"{source.name}: what is added to it is no parameter of its own",
                )
        if not flow.classes.exhausted:
            flow.run(source.labels)
        _drop_shared(flow)
        group = _build(source, flow)
        if group is None:
            self._note(source, flow)
        return group

    def _note(self, source: Source, flow: Flow) -> None:
        why = flow.classes.why(source.labels)
        self.producer_reasons[source.node] = (
            f"{source.name} → {why}" if why else f"{source.name}: no site reads it"
        )
        for absorbed in flow.absorbed:
            found = flow.classes.why(absorbed.columns)
            if found:
                self.site_reasons.setdefault(absorbed.site, f"{source.name} → {found}")

    def reason(self, site: Site) -> str:
        """Why a site is in no group: the nearest producer before it that was refused, and its reason."""
        if site.kind not in ABSORBING:
            return f"the input of a {site.kind.value} site cannot take a scale per channel"
        if site in self.site_reasons:
            return self.site_reasons[site]
        queue = [] if site.input is None else [site.input]
        seen = set(queue)
        for node in queue:
            if node in self.producer_reasons:
                return self.producer_reasons[node]
            if node.op != "call_function" or node in self.sites or node not in self.inside:
                continue
            new = [before for before in _before(node) if before not in seen]
            seen.update(new)
            queue += new
        return "no norm gain and no matrix before its input can take a scale per channel"


def _before(node: fx.Node) -> list[fx.Node]:
    if op_name(node) == "aten::scaled_dot_product_attention":
        return [arguments(node)["value"]]
    return node.all_input_nodes


def _drop_shared(flow: Flow) -> None:
    """Freeze what arrives at parameters that are used elsewhere, too; merge the uses of one parameter."""
    by_name: dict[str, list[Absorbed]] = {}
    for absorbed in flow.absorbed:
        by_name.setdefault(absorbed.site.name, []).append(absorbed)
    for name, uses in by_name.items():
        chains = {node for use in uses for node in use.site.chain}
        found = sum(_count_uses(holder, chains) for holder in flow.program.weight_node(name))
        if found != len(uses):
            for use in uses:
                flow.freeze(
                    use.site.node,
                    use.columns,
                    f"{name} is used at {found} places, and not all of them read the scaled value",
                )
            continue
        held = columns_in_parameter(uses[0].site.layout, uses[0].columns)
        for use in uses[1:]:
            other = columns_in_parameter(use.site.layout, use.columns)
            held = flow.merge(use.site.node, held, other, f"{name} would need two scales")


def _count_uses(node: fx.Node, chain: set[fx.Node]) -> int:
    return sum(_count_uses(user, chain) if user in chain else 1 for user in node.users)


def _build(source: Source, flow: Flow) -> SmoothingGroup | None:
    """Number the channels that are left and that at least one site absorbs."""
    classes = flow.classes
    used = torch.zeros(classes.count, dtype=torch.bool)
    for absorbed in flow.absorbed:
        columns = classes.live(absorbed.columns)
        used[classes.root[columns[columns >= 0]]] = True
    count = int(used.sum())
    if not count:
        return None
    number = torch.full((classes.count,), NO_CHANNEL)
    number[used] = torch.arange(count)
    channel_of = number[classes.root]  # [labels] → channel or -1

    def channels(labels: Tensor) -> Tensor:
        return torch.where(labels >= 0, channel_of[labels.clamp_min(0)], NO_CHANNEL)

    producers = [
        ScaledParameter(p.name, channels(p.labels), p.role, True, p.multiplier, p.offset)
        for p in source.parameters
    ]
    producers += [
        ScaledParameter(c.view.name, channels(c.labels), "bias", True, c.view.multiplier, c.view.offset)
        for c in flow.companions
    ]
    consumers = tuple(
        Consumer(absorbed.site, columns)
        for absorbed in flow.absorbed
        if bool(((columns := channels(absorbed.columns)) >= 0).any())
    )
    return SmoothingGroup(source.kind, source.node, count, tuple(producers), consumers)
