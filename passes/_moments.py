"""Second moments of the inputs of weights, matrix by matrix, and the order in which weights are solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.pass_base import BlockContext
from fxcompress.passes._input_rows import matrix_count, site_rows
from fxcompress.passes._selection import Candidate


def stages(chosen: Sequence[Candidate]) -> list[list[Candidate]]:
    """Linear sites that read the same value together, all others alone, in graph order."""
    stages: dict[object, list[Candidate]] = {}
    for candidate in chosen:
        alone = candidate.primary.kind is not SiteKind.LINEAR
        stages.setdefault(candidate.name if alone else candidate.primary.input, []).append(candidate)
    return list(stages.values())


def uses(candidate: Candidate) -> list[Site]:
    """Uses in this block that read the weight as the primary one does."""
    first = candidate.primary
    return [site for site in candidate.here if site.kind is first.kind and site.layout == first.layout]


def linear_grams(block: BlockContext, chosen: Sequence[Candidate]) -> dict[str, Tensor]:
    """``[1, K, K]`` by parameter name for linear sites that any token reached."""
    linear = [candidate for candidate in chosen if candidate.primary.kind is SiteKind.LINEAR]
    sites = [site for candidate in linear for site in uses(candidate)]
    if not sites:
        return {}
    statistics = block.statistics(sites, gram=True)
    grams = {}
    for candidate in linear:
        seen = [statistics[site.input.name] for site in uses(candidate) if site.input is not None]
        seen = [entry for entry in seen if entry.count > 0]
        total = sum(entry.count for entry in seen)
        if total:
            first, *others = [
                entry.gram if len(seen) == 1 else entry.gram * (entry.count / total) for entry in seen
            ]
            grams[candidate.name] = sum(others, first)[None]
    return grams


def moments(block: BlockContext, candidate: Candidate, part: range) -> Tensor | None:
    """``[len(part), K, K]``: mean ``x xᵀ`` of the rows of those matrices; None when there are no rows at all.

    A matrix that no row reached (an expert nothing was routed to) takes the mean over the rows of all.
    """
    site = candidate.primary
    columns = site.layout.matrix_shape[2]
    device = block.state.weights[candidate.name].device
    sums = torch.zeros(len(part), columns, columns, device=device)
    counts = torch.zeros(len(part), device=device)
    pooled, total = torch.zeros(columns, columns, device=device), 0
    for use in uses(candidate):
        for rows in site_rows(block, use):
            x = rows.values.detach().to(device, torch.float32)  # [M, T, K]
            total += x.shape[0] * x.shape[1]
            if rows.first is None:
                moment = x[0].mT @ x[0]
                sums += moment
                counts += x.shape[1]
                pooled += moment
                continue
            inside = [m for m in range(x.shape[0]) if rows.first + m in part]
            moments = x.mT @ x  # [M, K, K]
            pooled += moments.sum(0)
            if inside:
                at = slice(rows.first + inside[0] - part.start, rows.first + inside[-1] - part.start + 1)
                sums[at] += moments[inside[0] : inside[-1] + 1]
                counts[at] += x.shape[1]
    if total == 0:
        return None
    reached = (counts > 0)[:, None, None]
    return torch.where(reached, sums / counts.clamp_min(1)[:, None, None], pooled / total)


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of the inputs of one weight.

    Args:
        mean: ``[M, K]`` float32: E[x], for each of its M matrices (1 where all share the inputs).
        second: ``[M, K]`` float32: E[x²].
    """

    mean: Tensor
    second: Tensor

    @property
    def variance(self) -> Tensor:
        """``[M, K]``: E[x²] − E[x]², never negative."""
        return (self.second - self.mean.square()).clamp_min(0)


def diagonal_moments(block: BlockContext, chosen: Sequence[Candidate]) -> dict[str, Moments]:
    """Moments by parameter name, of weights that any token reached.

    A matrix that no row reached takes the mean over the rows of all.
    """
    linear = [candidate for candidate in chosen if candidate.primary.kind is SiteKind.LINEAR]
    sites = [site for candidate in linear for site in uses(candidate)]
    statistics = block.statistics(sites) if sites else {}
    found = {}
    for candidate in chosen:
        if candidate.primary.kind is SiteKind.LINEAR:
            seen = [statistics[site.input.name] for site in uses(candidate) if site.input is not None]
            seen = [entry for entry in seen if entry.count > 0]
            total = sum(entry.count for entry in seen)
            if total:
                mean = torch.stack([entry.mean * (entry.count / total) for entry in seen]).sum(0)
                second = torch.stack([entry.second_moment * (entry.count / total) for entry in seen]).sum(0)
                found[candidate.name] = Moments(mean[None], second[None])
        else:
            moment = _row_moments(block, candidate)
            if moment is not None:
                found[candidate.name] = moment
    return found


def _row_moments(block: BlockContext, candidate: Candidate) -> Moments | None:
    site = candidate.primary
    count, columns = matrix_count(site), site.layout.matrix_shape[2]
    sums = torch.zeros(2, count, columns, dtype=torch.float64)
    counts = torch.zeros(count, dtype=torch.float64)
    for use in uses(candidate):
        for rows in site_rows(block, use):
            x = rows.values.detach().cpu().double()  # [M, T, K]
            found = torch.stack([x.sum(1), x.square().sum(1)])  # [2, M, K]
            at = slice(None) if rows.first is None else slice(rows.first, rows.first + x.shape[0])
            sums[:, at] += found
            counts[at] += x.shape[1]
    if not bool((counts > 0).any()):
        return None
    reached = (counts > 0)[:, None]
    pooled = sums.sum(1, keepdim=True) / counts.sum()
    mean, second = torch.where(reached, sums / counts.clamp_min(1)[:, None], pooled).float()
    return Moments(mean, second)
