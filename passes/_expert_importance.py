"""How much each expert matters, judged by the rows that its matrices multiply.

    wanda    Σ |w_ij| · √(Σ x_j² / T)               over the expert's matrices
    flap     Σ_j Var[x_j] · Σ_i w_ij² · rows / T    over the expert's matrices

x are the rows that were dealt to the expert (all rows, where every expert computes), T the rows dealt to all
experts together. They are the criteria for channels with the sums taken over an expert's own rows: dividing
by T and not by its own rows lets the share of tokens that the router gives an expert count, so that one which
is hardly ever chosen is worth little whatever its weights are, and one which never is, nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.analysis.channel_group import ChannelGroup, GroupMember
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.pass_base import BlockContext, ModelContext
from fxcompress.passes._input_rows import site_rows, unsupported

__all__ = ["ExpertInputs", "expert_flap", "expert_wanda", "over_experts"]

_STACKED = (SiteKind.EXPERTS, SiteKind.BATCHED)


@dataclass(frozen=True, eq=False)
class ExpertInputs:
    """What the matrices of one parameter, one per expert, multiply and are.

    Args:
        weights: ``[E, N, K]`` float64.
        sums: ``[E, K]`` float64: Σ x over an expert's rows.
        squares: ``[E, K]`` float64: Σ x².
        rows: ``[E]`` float64: how many rows each expert was given.
    """

    weights: Tensor
    sums: Tensor
    squares: Tensor
    rows: Tensor


def expert_wanda(inputs: ExpertInputs) -> Tensor:
    """``[E]``: ``Σ |w_ij| · √(Σ x_j² / T)`` (Sun et al., 2024, with the norm over an expert's own rows)."""
    norms = (inputs.squares / inputs.rows.sum().clamp_min(1)).sqrt()
    return (inputs.weights.abs().sum(1) * norms).sum(1)


def expert_flap(inputs: ExpertInputs) -> Tensor:
    """``[E]``: ``Σ_j Var[x_j] · Σ_i w_ij² · rows / T`` (An et al., 2024, equation 5, for an expert)."""
    count = inputs.rows.clamp_min(1)[:, None]
    variance = (inputs.squares / count - (inputs.sums / count).square()).clamp_min(0)
    share = inputs.rows / inputs.rows.sum().clamp_min(1)
    return (inputs.weights.square().sum(1) * variance).sum(1) * share


def over_experts(
    model: ModelContext, groups: Sequence[ChannelGroup], score: Callable[[ExpertInputs], Tensor]
) -> dict[str, Tensor]:
    """``[units]`` float64 by group: the scores of all stacked matrices of an expert added up.

    Groups of experts without a stack of matrices whose rows can be told apart are missing.
    """
    found: dict[str, Tensor] = {}
    for block in model.blocks:
        for group in groups:
            for member, site in _stacks(block, group):
                value = score(_measure(block, member, site))
                found[group.name] = found.get(group.name, 0) + value
    return found


def _stacks(block: BlockContext, group: ChannelGroup) -> list[tuple[GroupMember, Site]]:
    """Uses in a block of parameters that hold one matrix per expert."""
    return [
        (member, site)
        for member in group.members
        for site in block.sites
        if site.name == member.name
        and site.kind in _STACKED
        and site.layout.batch_dims == 1
        and site.layout.perm[0] == member.dim
        and member.positions.shape == (site.layout.shape[member.dim], 1)
        and unsupported(site) is None
    ]


def _measure(block: BlockContext, member: GroupMember, site: Site) -> ExpertInputs:
    weights = site.layout.to_matrix(block.weight(member.name)).detach().to("cpu", torch.float64)
    experts, _, columns = weights.shape
    sums, squares = torch.zeros(2, experts, columns, dtype=torch.float64)
    counts = torch.zeros(experts, dtype=torch.float64)
    for rows in site_rows(block, site):
        x = rows.values.detach().to("cpu", torch.float64)  # [M, T, K]
        at = slice(None) if rows.first is None else slice(rows.first, rows.first + x.shape[0])
        sums[at] += x.sum(1)
        squares[at] += x.square().sum(1)
        counts[at] += x.shape[1]
    return ExpertInputs(weights, sums, squares, counts)
