"""What passes that permute input channels share: when a permutation must not fold, and gathers instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fxcompress.analysis.permutation import PermutationGroup
from fxcompress.analysis.site_types import SiteKind
from fxcompress.edits import Edit, SetTensor, SetTransform
from fxcompress.forms import Permute
from fxcompress.pass_base import BlockContext
from fxcompress.passes._selection import Candidate, Role, SelectivePass


def unsuitable(one: SelectivePass, block: BlockContext, candidate: Candidate) -> str | None:
    """Why the input channels of a weight cannot have an order of their own; None when they can."""
    reason = one.unselected(block.program, candidate.name)
    if reason is not None:
        return reason
    if candidate.role is not Role.MATRIX:
        return f"{candidate.role.value}: its input keeps its order"
    if candidate.primary.kind is SiteKind.OTHER:
        return candidate.primary.reason or "no use of it is a product"
    if candidate.primary.kind is not SiteKind.LINEAR:
        return f"channels of linear layers only are reordered, this is {candidate.primary.kind.value}"
    if len(candidate.uses) > 1:
        return "used at several places, which one order cannot serve"
    return "its channels are in clusters already" if block.state.form(candidate.name).clusters else None


def unfoldable(
    one: SelectivePass, block: BlockContext, group: PermutationGroup, family: Sequence[Candidate]
) -> str | None:
    """Why a group must not be folded although it could be: ``family`` are all that may read its channels."""
    names = {candidate.name for candidate in family}
    for parameter in group.parameters:
        reason = one.unselected(block.program, parameter.name) if one.exclude else None
        if reason is not None:
            return f"{parameter.name} is {reason}"
        form = block.state.form(parameter.name)
        if form.terms or (form.clusters and parameter.name in {s.name for s in group.consumers}):
            return f"{parameter.name} is compressed or in clusters already"
    foreign = [site.name for site in group.consumers if site.name not in names]
    return f"{foreign[0]}, which reads the same channels, is not reordered" if foreign else None


def gathered(
    block: BlockContext,
    family: Sequence[Candidate],
    order: Tensor,
    why: str,
    clusters: tuple[int, ...],
    note: str,
) -> Iterator[Edit]:
    """Edits that gather the input of ``family`` in ``order: [K]``, once for all, columns reordered alike."""
    for candidate in family:
        site, weight = candidate.primary, block.weight(candidate.name).detach()
        moved = weight.index_select(site.layout.perm[1], order.to(weight.device))
        yield SetTensor(site.name, moved, f"input reordered by a gather: {why}")
        yield SetTransform(site.name, (Permute(order),), clusters=clusters, reason=note)
