"""Reorder channels so that those of similar range are neighbours, and one scale fits each cluster of them.

    y = f(W₁ x + b),  z = W₂ y   →  rows of W₁ and b, columns of W₂ permuted        no operation added
    z = W x                      →  z = W[:, order] · x[order]                      one gather of the input

RPTQ (Yuan et al., 2023, section 4): channels are clustered by (min, max) over the calibration data.
Keeps: the function. Where a permutation folds is read off the dataflow
(:mod:`fxcompress.analysis.permutation`); within attention, channels stay in their head. Elsewhere, in
particular after a normalisation, whose input is the residual stream, the input is gathered explicitly, once
for all layers that read it; compiled, the gather becomes part of what computes the input.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxcompress.analysis.permutation import PermutationGroup, find_permutation_group
from fxcompress.analysis.site_types import Site
from fxcompress.analysis.sites import find_sites
from fxcompress.edits import Edit, Refuse, SetTransform
from fxcompress.errors import RecipeError
from fxcompress.pass_base import BlockContext, Statistics
from fxcompress.passes._clusters import cluster
from fxcompress.passes._folding import gathered, unfoldable, unsuitable
from fxcompress.passes._inside import nodes_inside
from fxcompress.passes._selection import Candidate, SelectivePass, candidates


@dataclass(frozen=True)
class ReorderChannels(SelectivePass):
    """Put input channels of similar range next to each other.

    Args:
        clusters: Clusters per input. Default 32 (section 5.1).
        head_clusters: Clusters per attention head, where channels must stay in their head. Default 4.
        gather: Also reorder where the permutation does not fold into weights, by an explicit gather of the
            input. Default True. False leaves such inputs alone.
        include, exclude: Name patterns, see :class:`SelectivePass`. A permutation that would fold into an
            unselected parameter is gathered instead.

    Raises:
        RecipeError: an option is out of range.

    Example:
        >>> ReorderChannels(clusters=16).preserves_function
        True
    """

    clusters: int = 32
    head_clusters: int = 4
    gather: bool = True

    name: ClassVar[str] = "reorder-channels"
    summary: ClassVar[str] = "Cluster input channels by range and reorder them; the function stays the same."
    source: ClassVar[str] = "Yuan et al., 2023 (RPTQ, arXiv:2304.01089), section 4"
    provides: ClassVar[frozenset[str]] = frozenset({"reordered-channels"})
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"quantized-weights", "quantized-activations", "sparse-weights", "low-rank"}
    )
    needs_calibration: ClassVar[bool] = True
    preserves_function: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("clusters", "head_clusters"):
            value = getattr(self, option)
            if type(value) is not int or value < 1:
                raise RecipeError(f"{self.name}: {option}={value!r}, expected a positive number.")
        if not isinstance(self.gather, bool):
            raise RecipeError(f"{self.name}: gather={self.gather!r}, expected true or false.")

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield permuted tensors, gathers and the clusters of every input; a :class:`Refuse` for the rest."""
        self.check_patterns(block.program)
        chosen: dict[fx.Node, list[Candidate]] = {}
        for candidate in candidates(block):
            reason = self._unsuitable(block, candidate)
            if reason is not None:
                yield Refuse(candidate.name, reason)
            elif candidate.primary.input is not None:
                chosen.setdefault(candidate.primary.input, []).append(candidate)
        if not chosen:
            return
        statistics = block.statistics([c.primary for family in chosen.values() for c in family])
        by_node: dict[fx.Node, list[Site]] = {}
        for site in find_sites(block.program):
            by_node.setdefault(site.node, []).append(site)
        inside = nodes_inside(block)
        for node, family in chosen.items():
            found = find_permutation_group(block.program, family[0].primary, by_node, inside)
            blocked = found if isinstance(found, str) else unfoldable(self, block, found, family)
            seen = statistics[node.name]
            if not seen.count:
                reason = "no calibration token reaches it"
            elif blocked is None and isinstance(found, PermutationGroup):
                reason = yield from self._fold(block, found, seen)
            elif self.gather:
                reason = yield from self._gather(block, family, seen, str(blocked))
            else:
                reason = f"the permutation does not fold (gather=False): {blocked}"
            for candidate in family if reason else ():
                yield Refuse(candidate.name, reason)

    def _fold(
        self, block: BlockContext, group: PermutationGroup, seen: Statistics
    ) -> Generator[Edit, None, str]:
        """Permute every parameter of the group; returns why not, or nothing."""
        channels = group.cells.numel()
        low = torch.full((channels,), float("inf"), dtype=torch.float64)
        low.scatter_reduce_(0, group.columns, seen.minimum.double().cpu(), "amin")
        high = torch.full((channels,), -float("inf"), dtype=torch.float64)
        high.scatter_reduce_(0, group.columns, seen.maximum.double().cpu(), "amax")
        classes = group.classes
        cells = group.cells[classes].unique().tolist()
        count = self.clusters if len(cells) == 1 else self.head_clusters
        target, label = torch.arange(channels), torch.zeros(channels, dtype=torch.int64)
        for place, cell in enumerate(cells):
            members = classes[group.cells[classes] == cell]
            if count > members.numel():
                option = "clusters" if len(cells) == 1 else "head_clusters"
                return f"{option}={count} exceed the {members.numel()} channels that can be exchanged"
            found = cluster(torch.stack([low[members], high[members]], 1), count, block.generator)
            target[members] = members[torch.argsort(found, stable=True)]
            label[members] = found + place * count
        within = f" within {len(cells)} cells" if len(cells) > 1 else ""
        reason = f"{classes.numel()} channels reordered{within}, folded into weights"
        yield from group.edits(target, block.weight, reason)
        for site in group.consumers:
            columns = next(
                p.labels for p in group.parameters if (p.name, p.dim) == (site.name, site.layout.perm[1])
            )
            if bool((columns >= 0).all()):
                sizes = _runs(label[target[columns]])
                yield SetTransform(site.name, clusters=sizes, reason=f"{len(sizes)} clusters")
        return ""

    def _gather(
        self, block: BlockContext, family: list[Candidate], seen: Statistics, blocked: str
    ) -> Generator[Edit, None, str]:
        """Gather the input once for all its readers; returns why not, or nothing."""
        width = family[0].primary.layout.matrix_shape[2]
        if self.clusters > width:
            return f"clusters={self.clusters} exceed its {width} input channels"
        points = torch.stack([seen.minimum, seen.maximum], 1).cpu()
        label = cluster(points, self.clusters, block.generator)
        order = torch.argsort(label, stable=True)
        sizes = _runs(label[order])
        yield from gathered(block, family, order, blocked, sizes, f"{len(sizes)} clusters")
        return ""

    def _unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        reason = unsuitable(self, block, candidate)
        form = block.state.form(candidate.name)
        if reason is None and (form.terms or form.activation is not None):
            return "it is quantized already"
        return reason


def _runs(labels: Tensor) -> tuple[int, ...]:
    """Lengths of the runs of equal neighbours."""
    return tuple(torch.unique_consecutive(labels, return_counts=True)[1].tolist())
