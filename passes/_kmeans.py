"""Weighted k-means of numbers, for many rows at once: the tables of learned codebooks.

In one dimension clusters are intervals, so that a step of Lloyd's algorithm needs no distances: sums over
intervals are differences of running sums over the sorted row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 21  # numbers sorted at once; bounds the float64 temporaries to some hundred MiB


def weighted_kmeans(values: Tensor, weights: Tensor | None, count: int, iterations: int = 50) -> Tensor:
    """Centroids of every row that make ``Σ weight · (value − nearest centroid)²`` small.

    Lloyd's algorithm, three starts, the best kept for every row: the levels of rounding to nearest (so that
    no row ends worse than those), quantiles, and the mean of both, which is near the density of centroids
    that is best for many of them. A row of at most ``count`` distinct values is met exactly.

    Args:
        values: ``[R, K]``, floating and finite.
        weights: ``[K]`` or ``[R, K]``, not negative; None weighs all alike. A row whose weights are all zero
            counts as unweighted (Kim et al., 2023, authors' code).
        count: Centroids per row, C.
        iterations: Most steps of every start. Default 50 (authors' code).

    Returns:
        ``[R, C]`` float64, ascending.

    Example:
        >>> weighted_kmeans(torch.tensor([[0.0, 1.0, 10.0, 11.0]]), None, 2).tolist()
        [[0.5, 10.5]]
    """
    rows, columns = values.shape
    step = max(1, _CHUNK // columns)
    parts = []
    for start in range(0, rows, step):
        part = values[start : start + step].to(torch.float64)
        given = torch.ones(columns, dtype=torch.float64) if weights is None else weights.to(torch.float64)
        given = given[start : start + step] if given.dim() == 2 else given
        parts.append(_SortedRows(part, given.to(part.device).expand_as(part)).cluster(count, iterations))
    return torch.cat(parts)


class _SortedRows:
    """Rows in ascending order with running sums of weights, weighted values and their squares."""

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        x, order = values.sort(dim=1)
        self.x = x.contiguous()  # [R, K]
        weight = weights.gather(1, order)
        top = weight.amax(1, keepdim=True)
        weight = torch.where(top > 0, weight / top.clamp_min(torch.finfo(top.dtype).tiny), 1.0)
        sums = torch.stack([weight, weight * self.x, weight * self.x.square()]).cumsum(2)
        self.sums = torch.nn.functional.pad(sums, (1, 0))  # [3, R, K + 1]

    def cluster(self, count: int, iterations: int) -> Tensor:
        """``[R, count]``."""
        even, quantiles = self._rounding_levels(count), self._quantiles(count)
        found = [self._lloyd(start, iterations) for start in (even, quantiles, (even + quantiles) / 2)]
        losses = torch.stack([self._loss(centroids) for centroids in found])  # [3, R]
        best = torch.stack(found)[losses.argmin(0), torch.arange(len(self.x))]
        return self._distinct(best)

    def _rounding_levels(self, count: int) -> Tensor:
        low, high = self.x[:, :1].clamp(max=0), self.x[:, -1:].clamp(min=0)
        scale = (high - low) / (count - 1)
        zero = torch.where(scale > 0, torch.round(-low / scale.clamp_min(torch.finfo(scale.dtype).tiny)), 0)
        return scale * (torch.arange(count, dtype=scale.dtype, device=scale.device) - zero)

    def _quantiles(self, count: int) -> Tensor:
        columns = self.x.shape[1]
        at = (torch.arange(count, device=self.x.device) + 0.5) / count * columns
        return self.x[:, at.long().clamp_max(columns - 1)]

    def _intervals(self, centroids: Tensor) -> Tensor:
        """``[3, R, C]``: the sums over the values nearest to each centroid."""
        ends = torch.searchsorted(self.x, ((centroids[:, 1:] + centroids[:, :-1]) / 2).contiguous())
        rows, columns = self.x.shape
        ends = torch.cat([ends.new_zeros(rows, 1), ends, ends.new_full((rows, 1), columns)], dim=1)
        found: Tensor = self.sums.gather(2, ends.expand(3, -1, -1)).diff(dim=2)
        return found

    def _lloyd(self, centroids: Tensor, iterations: int) -> Tensor:
        for _ in range(iterations):
            weight, first, _ = self._intervals(centroids)
            moved = torch.where(
                weight > 0, first / weight.clamp_min(torch.finfo(weight.dtype).tiny), centroids
            )
            moved = moved.sort(dim=1).values  # one without values stays where it was, others may pass it
            if torch.equal(moved, centroids):
                break
            centroids = moved
        return centroids

    def _loss(self, centroids: Tensor) -> Tensor:
        weight, first, second = self._intervals(centroids)
        loss: Tensor = (second - 2 * centroids * first + centroids.square() * weight).sum(1)
        return loss

    def _distinct(self, centroids: Tensor) -> Tensor:
        """Rows of at most C distinct values get these; what is left of their table repeats the last."""
        count = centroids.shape[1]
        rank = torch.nn.functional.pad((self.x.diff(dim=1) > 0).long(), (1, 0)).cumsum(1)  # [R, K]
        few = rank[:, -1] < count
        if bool(few.any()):
            table = self.x[few][:, -1:].repeat(1, count)
            centroids = centroids.clone()
            centroids[few] = table.scatter(1, rank[few], self.x[few])
        return centroids
