"""k-means on a few points, the same on every run."""

from __future__ import annotations

import torch
from torch import Tensor

_STARTS = 10  # as in the RPTQ reference code (n_init)
_ROUNDS = 100


def cluster(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Labels of points by k-means; the best of ten starts (k-means++).

    Args:
        points: ``[n, d]`` finite.
        count: Clusters, at most n. Fewer result when fewer points differ.
        generator: Source of the starts.

    Returns:
        ``[n]`` int64, ``0 … c-1``, in ascending order of the clusters' centres (last coordinate first).
    """
    x = points.double()
    distinct = torch.unique(x, dim=0)
    count = min(count, distinct.shape[0])
    best, least = torch.zeros(len(x), dtype=torch.int64), float("inf")
    for _ in range(_STARTS if 1 < count < distinct.shape[0] else 1):
        centres = distinct if count == distinct.shape[0] else _start(x, count, generator)
        labels, inertia = _lloyd(x, centres)
        if inertia < least:
            best, least = labels, inertia
    return _ordered(x, best)


def _start(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each centre is drawn with a probability that grows with its squared distance."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    gap = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        chosen.append(int(torch.multinomial(gap / gap.sum(), 1, generator=generator)))
        gap = torch.minimum(gap, (x - x[chosen[-1]]).square().sum(1))
    return x[chosen]


def _lloyd(x: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    labels = torch.full((len(x),), -1)
    gap = torch.zeros(len(x), dtype=x.dtype)
    for _ in range(_ROUNDS):
        distance = (x.unsqueeze(1) - centres).square().sum(-1)  # [n, k]
        gap, new = distance.min(1)
        if torch.equal(new, labels):
            break
        labels = new
        sizes = torch.bincount(labels, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, labels, x)
        centres = torch.where(sizes.unsqueeze(1) > 0, sums / sizes.clamp_min(1).unsqueeze(1), centres)
        for empty in (sizes == 0).nonzero().flatten().tolist():
            farthest = int(gap.argmax())
            centres[empty], gap[farthest] = x[farthest], 0
    return labels, float(gap.sum())


def _ordered(x: Tensor, labels: Tensor) -> Tensor:
    """Number clusters by their centres, so that equal clusterings get equal numbers."""
    used = labels.unique().tolist()
    centres = {label: x[labels == label].mean(0).tolist()[::-1] for label in used}
    rank = {label: place for place, label in enumerate(sorted(used, key=centres.__getitem__))}
    return torch.tensor([rank[label] for label in labels.tolist()])
