"""Find, by dataflow alone, which parameters a permutation of input channels of a site folds into.

    y = f(W₁ x + b),  z = W₂ y     →     rows of W₁ and b permuted, columns of W₂ permuted alike

f may be anything that treats the permuted channels alike and apart: element-wise ops (of several permuted
values too: both branches of a gated unit), views, transposes, splits, attention over the value. Attention
mixes positions, and weighs each head by itself, so channels must stay within their head; such limits are the
group's *cells*. Other than for scales (:mod:`fxcompress.analysis.smoothing`) the element-wise op may be any,
but every operand must be permuted along.

The search starts at a site's input and visits every op that reads or makes a labelled value, forwards and
backwards, until nothing is new. An op without a rule, a reader outside the block, or a parameter that is
used elsewhere, too, ends it with a reason: then the permutation can only be an explicit gather.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, fx

from fxcompress.analysis.channel_flow import product_of
from fxcompress.analysis.channel_labels import NO_CHANNEL, align
from fxcompress.analysis.channel_moves import BlockedError
from fxcompress.analysis.op_arguments import describe, op_name, shape_of
from fxcompress.analysis.parameter_views import parameter_view
from fxcompress.analysis.permutation_group import LabelledParameter, PermutationGroup
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.capture.program import Program

__all__ = ["PermutationGroup", "find_permutation_group"]

_SHAPE_ONLY = ("aten::sym_size", "aten::sym_stride", "aten::sym_numel")


def find_permutation_group(
    program: Program,
    site: Site,
    sites: Mapping[fx.Node, Sequence[Site]],
    inside: AbstractSet[fx.Node] | None = None,
) -> PermutationGroup | str:
    """The group through which the input channels of ``site`` can be permuted, or why there is none.

    Args:
        program: The program.
        site: A linear site.
        sites: All weight sites by their node.
        inside: Nodes of the block; the group lies wholly inside. Default: the whole graph.

    Example:
        >>> group = find_permutation_group(program, site, by_node)
        >>> group if isinstance(group, str) else [parameter.name for parameter in group.parameters]
    """
    if site.kind is not SiteKind.LINEAR or site.input is None:
        return f"the input of a {site.kind.value} site cannot be permuted"
    search = Search(program, sites, set(program.graph.nodes) if inside is None else inside)
    rank = len(shape_of(site.input))
    count = site.layout.matrix_shape[2]
    search.count = count
    search.root = torch.arange(count)
    try:
        search.assign(site.input, align(torch.arange(count), rank))
        search.run()
        return search.group(site)
    except BlockedError as blocked:
        return str(blocked)


class Search:
    """The labels found so far. Label j of an element: it moves with channel j; -1: it stays."""

    def __init__(
        self, program: Program, sites: Mapping[fx.Node, Sequence[Site]], inside: AbstractSet[fx.Node]
    ) -> None:
        self.program = program
        self.sites = sites
        self.inside = inside
        self.count = 0
        self.root = torch.zeros(0, dtype=torch.int64)
        self.labels: dict[fx.Node, Tensor] = {}
        self.parameters: dict[tuple[str, int], Tensor] = {}  # (name, dimension) → labels along it
        self.consumers: dict[fx.Node, Site] = {}
        self.producers: dict[fx.Node, Site] = {}
        self.limits: list[tuple[Tensor, tuple[int, ...]]] = []  # labels, dimensions they may not cross
        self.chains: dict[str, set[fx.Node]] = {}
        self._queue: list[fx.Node] = []

    def run(self) -> None:
        """Visit ops until no label is new."""
        while self._queue:
            node = self._queue.pop()
            self._visit(node)
            for user in node.users:
                self._visit(user)

    def assign(self, node: fx.Node, labels: Tensor) -> None:
        """Label the elements of a value; equal elements with two labels move alike from now on."""
        if node.op != "call_function" or node not in self.inside:
            raise BlockedError(f"{describe(node)} is made outside the block or by no op")
        old = self.labels.get(node)
        if old is None:
            new = labels
        else:
            old, labels = torch.broadcast_tensors(old, labels)
            both = (old >= 0) & (labels >= 0)
            self.unite(old[both], labels[both])
            new = torch.where(old >= 0, old, labels)
            if torch.equal(new, self.labels[node]) and new.shape == self.labels[node].shape:
                return
        self.labels[node] = new
        self._queue.append(node)

    def unite(self, one: Tensor, two: Tensor) -> None:
        """Demand that channels move together."""
        for a, b in {(int(x), int(y)) for x, y in zip(self.root[one], self.root[two], strict=True)}:
            low, high = sorted((int(self.root[a]), int(self.root[b])))
            self.root[self.root == high] = low

    def limit(self, labels: Tensor, dims: Sequence[int]) -> None:
        """Channels at different places along ``dims`` are treated differently."""
        dims = tuple(d for d in dims if labels.shape[d] > 1)
        if dims:
            self.limits.append((labels, dims))

    def label_parameter(self, name: str, dim: int, labels: Tensor) -> None:
        """Label a parameter along one dimension."""
        old = self.parameters.get((name, dim))
        if old is not None:
            both = (old >= 0) & (labels >= 0)
            self.unite(old[both], labels[both])
            labels = torch.where(old >= 0, old, labels)
        self.parameters[name, dim] = labels

    def _visit(self, node: fx.Node) -> None:
        from fxcompress.analysis.permutation_rules import RULES

        inputs = [source for source in node.all_input_nodes if source in self.labels]
        if node.op == "output" or node.op != "call_function":
            raise BlockedError(f"it is read by {describe(node)}")
        if op_name(node) in _SHAPE_ONLY:
            return
        if node not in self.inside:
            raise BlockedError(f"it is read outside its block, by {describe(node)}")
        if node in self.sites:
            self._site(node, inputs)
            return
        rule = RULES.get(op_name(node) or getattr(node.target, "__name__", ""))
        if rule is None:
            raise BlockedError(f"{describe(node)} does not treat channels alike and apart")
        rule(self, node)

    def _site(self, node: fx.Node, inputs: Sequence[fx.Node]) -> None:
        site = product_of(self.sites[node])
        if site is None or site.kind is not SiteKind.LINEAR or site.input is None:
            what = self.sites[node][0]
            raise BlockedError(
                f"{describe(node)} uses {what.name} ({what.kind.value}), which is no linear layer"
            )
        rows, columns = (
            (site.layout.perm[0], site.layout.perm[1]) if len(site.layout.shape) == 2 else (None, None)
        )
        if rows is None or columns is None:
            raise BlockedError(f"{site.name} is no matrix")
        if node in self.labels:
            self.producers[node] = site
            held = _last(self.labels[node], site.layout.matrix_shape[1], node)
            self.label_parameter(site.name, rows, held)
            self._bias(site, held)
        if any(source is not site.input for source in inputs):
            raise BlockedError(f"{describe(node)} adds it to its product")
        if site.input in self.labels:
            self.consumers[node] = site
            held = _last(self.labels[site.input], site.layout.matrix_shape[2], node)
            self.label_parameter(site.name, columns, held)
        self.chains.setdefault(site.name, set()).update({node, *site.chain})

    def _bias(self, site: Site, labels: Tensor) -> None:
        if site.bias_node is None:
            return
        view = parameter_view(self.program, site.bias_node)
        if view is None or view.shared or len(view.shape) != 1 or view.offset != 0:
            raise BlockedError(f"the bias of {site.name} is no vector of its own")
        if not torch.equal(view.index.flatten(), torch.arange(view.shape[0])):
            raise BlockedError(f"the bias of {site.name} is rearranged before its use")
        self.label_parameter(view.name, 0, labels)

    def group(self, site: Site) -> PermutationGroup:
        """The result, once nothing is new."""
        for name, chain in self.chains.items():
            uses = sum(_uses(holder, chain) for holder in self.program.weight_node(name))
            visited = sum(
                1 for held in (*self.producers.values(), *self.consumers.values()) if held.name == name
            )
            if uses != 1 or visited > 1:
                raise BlockedError(f"{name} is used at several places, and a permutation serves one")
        columns = self.root[_last(self.labels_of(site), self.count, site.node)]
        parameters = tuple(
            LabelledParameter(name, dim, torch.where(labels >= 0, self.root[labels.clamp_min(0)], NO_CHANNEL))
            for (name, dim), labels in self.parameters.items()
        )
        cells = torch.zeros(self.count, dtype=torch.int64)
        for labels, dims in self.limits:
            cells = _refine(cells, _places(self.root, labels, dims))
        for parameter in parameters:
            cells = _refine(cells, _counts(parameter.labels, self.count))
        consumers = tuple(self.consumers.values())
        return PermutationGroup(tuple(self.producers.values()), consumers, columns, cells, parameters)

    def labels_of(self, site: Site) -> Tensor:
        """Labels of the site's input."""
        assert site.input is not None
        return self.labels[site.input]


def _last(labels: Tensor, width: int, node: fx.Node) -> Tensor:
    """``[width]`` labels along the last dimension, the only one they may depend on."""
    if any(size > 1 for size in labels.shape[:-1]):
        raise BlockedError(f"{describe(node)} contracts channels that lie in several dimensions")
    return labels.reshape(-1).expand(width) if labels.numel() == 1 else labels.reshape(-1)


def _uses(node: fx.Node, chain: AbstractSet[fx.Node]) -> int:
    """Readers of a weight, where nodes of its own chain count through what reads them."""
    return sum(
        _uses(user, chain) if user in chain and user.users and _is_move(user) else 1 for user in node.users
    )


def _is_move(node: fx.Node) -> bool:
    return len(node.all_input_nodes) == 1


def _places(root: Tensor, labels: Tensor, dims: Sequence[int]) -> Tensor:
    """``[C, P]``: how often each channel stands at each place along ``dims``."""
    shape = [labels.shape[d] for d in dims]
    grid = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    view = [1] * labels.dim()
    for d in dims:
        view[d] = labels.shape[d]
    place = grid.reshape(view).expand(labels.shape)
    held = labels >= 0
    table = torch.zeros(root.numel(), grid.numel(), dtype=torch.int64)
    table.index_put_((root[labels[held]], place[held]), torch.ones((), dtype=torch.int64), accumulate=True)
    return table


def _counts(labels: Tensor, count: int) -> Tensor:
    return torch.bincount(labels[labels >= 0], minlength=count).unsqueeze(1)


def _refine(cells: Tensor, table: Tensor) -> Tensor:
    """Split cells by the rows of ``table``; numbered by first channel, so that the order is stable."""
    _, split = torch.unique(torch.cat([cells.unsqueeze(1), table], 1), dim=0, return_inverse=True)
    first = torch.full((int(split.max()) + 1,), split.numel())
    first.scatter_reduce_(0, split, torch.arange(split.numel()), "amin")
    return first.argsort().argsort()[split]
