"""Orders of channels in which groups of m lose less when n of each are kept.

``retained`` is what counts: the sum over rows and groups of the n largest scores. Two moves: dealing channels
out by rank, so that every group gets some of the important ones, and swapping pairs between groups while that
gains (both after Li et al., 2023, E-Sparse; swaps are exact and greedy here, within blocks of channels).
"""

from __future__ import annotations

import torch
from torch import Tensor


def retained(scores: Tensor, n: int, m: int) -> float:
    """Sum of the n largest of every m neighbours of ``scores: [R, C]``; m divides C.

    Example:
        >>> retained(torch.tensor([[8.0, 7, 6, 5, 1, 1, 1, 1]]), 2, 4)
        17.0
    """
    return float(scores.unflatten(1, (-1, m)).topk(n, dim=-1).values.double().sum())


def dealt(importance: Tensor, m: int) -> Tensor:
    """Order ``[C]`` that deals channels to the ``C / m`` groups in turn, from the most important on.

    Example:
        >>> dealt(torch.tensor([8.0, 7, 6, 5, 1, 1, 1, 1]), 4).tolist()
        [0, 2, 4, 6, 1, 3, 5, 7]
    """
    ranked = importance.argsort(descending=True, stable=True)
    return ranked.view(m, -1).T.flatten()


def best_order(scores: Tensor, n: int, m: int, *, deal: bool, block: int, rounds: int) -> Tensor:
    """Order ``[C]`` of channels: place p takes channel ``order[p]``.

    Args:
        scores: ``[R, C]`` float32; m divides C.
        n: Kept of every group.
        m: Size of a group.
        deal: Start from :func:`dealt` where that retains more.
        block: Channels among which pairs are swapped; 0: none.
        rounds: Most swaps per block.
    """
    order = torch.arange(scores.shape[1])
    if deal:
        other = dealt(scores.double().sum(0), m)
        if retained(scores[:, other], n, m) > retained(scores, n, m):
            order = other
    size = block // m * m
    whole = scores.shape[1] // size * size if size > m else 0
    if whole:
        parts = _swapped(scores[:, order[:whole]].T.reshape(-1, size, len(scores)), n, m, rounds)
        order[:whole] = order[:whole].view(-1, size).gather(1, parts).flatten()
    if size > m and scores.shape[1] - whole > m:
        rest = order[whole:]
        part = _swapped(scores[:, rest].T[None], n, m, rounds)[0]
        order[whole:] = rest[part]
    return order


def _swapped(x: Tensor, n: int, m: int, rounds: int) -> Tensor:
    """Greedy swaps in every block of ``x: [P, C, R]``: orders ``[P, C]``."""
    count, size, _ = x.shape
    order = torch.arange(size).expand(count, size).contiguous()
    group = torch.arange(size) // m
    apart = group[:, None] != group[None]
    place = torch.arange(count)
    for _ in range(rounds):
        gain = torch.where(apart, _gains(x, n, m), -torch.inf)
        best, pair = gain.flatten(1).max(1)
        moved = best > 1e-6 * x.sum((1, 2))
        if not bool(moved.any()):
            break
        at, a, b = place[moved], (pair // size)[moved], (pair % size)[moved]
        for table in (x, order):
            table[at, a], table[at, b] = table[at, b].clone(), table[at, a].clone()
    return order


def _gains(x: Tensor, n: int, m: int) -> Tensor:
    """``[P, C, C]``: what a block retains more when channels u and v of two groups change places.

    Without one of its channels a group retains the n largest of the others; a channel that comes adds what it
    has above the n-th of those.
    """
    groups = x.unflatten(1, (-1, m))  # [P, G, m, R]
    held = groups.topk(n, dim=2).values.sum(2)  # [P, G, R]
    without, nth = [], []
    for i in range(m):
        others = torch.cat([groups[:, :, :i], groups[:, :, i + 1 :]], 2).topk(n, dim=2).values
        without.append(others.sum(2))
        nth.append(others[:, :, -1])
    base = (torch.stack(without, 2) - held[:, :, None]).sum(-1).flatten(1)  # [P, C], ≤ 0
    floor = torch.stack(nth, 2).flatten(1, 2)  # [P, C, R]
    joined = torch.stack([(x - floor[:, u, None]).clamp_min(0).sum(-1) for u in range(x.shape[1])], 1)
    gains: Tensor = base[:, :, None] + base[:, None] + joined + joined.mT
    return gains
