"""Channel labels: which channel of a producer every element of a tensor belongs to.

Labels are an int64 tensor with the rank of the value they describe; a dimension is either full or 1, and 1
means that the label does not depend on that dimension, so batch and sequence stay symbolic. The label -1
stands for an
element that belongs to no channel: its value does not change when the channels are scaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

NO_CHANNEL = -1


def align(labels: Tensor, rank: int) -> Tensor:
    """Prepend dimensions of size 1 up to ``rank``, as broadcasting does."""
    return labels.reshape((1,) * (rank - labels.dim()) + tuple(labels.shape))


def constant_along(labels: Tensor, dim: int) -> Tensor | None:
    """``labels`` with ``dim`` reduced to 1 when they do not depend on it, else None."""
    first = labels.narrow(dim, 0, 1)
    return first if labels.shape[dim] == 1 or bool((labels == first).all()) else None


def static_size(size: Any) -> int | None:
    """A dimension's size as an int, or None when it is symbolic."""
    return size if isinstance(size, int) else None


def regroup(labels: Tensor, old: Sequence[Any], new: Sequence[Any]) -> Tensor | None:
    """Labels of a value of shape ``old`` (sizes may be symbolic) after a reshape to ``new``.

    The two shapes are cut at every place where the products of sizes agree; between two cuts, sizes must be
    static if labels vary there.

    Returns:
        The labels of the reshaped value, or None when labelled dimensions are mixed with symbolic ones.
    """
    expanded: list[int] = []
    target: list[int] = []
    cuts = _cuts(old, new)
    for (i, j), (k, m) in pairwise(cuts):
        if all(labels.shape[d] == 1 for d in range(i, k)):
            expanded += [1] * (k - i)
            target += [1] * (m - j)
            continue
        sizes = [static_size(size) for size in (*old[i:k], *new[j:m])]
        if any(size is None for size in sizes):
            return None
        known = [size for size in sizes if size is not None]
        expanded += known[: k - i]
        target += known[k - i :]
    return labels.expand(expanded).reshape(target)


def _cuts(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[int, int]]:
    """Places ``(i, j)`` where ``old[:i]`` and ``new[:j]`` hold equally many elements, ends included."""
    left, right = [_expression(size) for size in old], [_expression(size) for size in new]
    prefix = (
        [_product(left[:i]) for i in range(len(left) + 1)],
        [_product(right[:j]) for j in range(len(right) + 1)],
    )
    suffix = (
        [_product(left[i:]) for i in range(len(left) + 1)],
        [_product(right[j:]) for j in range(len(right) + 1)],
    )
    cuts = [(0, 0)]
    for i in range(1, len(left)):
        for j in range(cuts[-1][1], len(right) + 1):
            if prefix[0][i] == prefix[1][j] or suffix[0][i] == suffix[1][j]:
                cuts.append((i, j))
                break
    cuts.append((len(left), len(right)))
    return cuts


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _product(sizes: Sequence[Any]) -> Any:
    product = math.prod(sizes)
    return product if isinstance(product, int) else product.expand()


class ChannelClasses:
    """Channels that must share one scale (merged), and channels that must keep the scale 1 (frozen).

    Args:
        count: Number of channels; labels are ``0 … count-1``.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.root = torch.arange(count)  # [count], idempotent: root[root] == root
        self.frozen = torch.zeros(count, dtype=torch.bool)
        self._why = torch.full((count,), NO_CHANNEL)  # [count] index into reasons
        self.reasons: list[str] = []

    @property
    def exhausted(self) -> bool:
        """Whether no channel is left to scale."""
        return bool(self.frozen.all())

    def live(self, labels: Tensor) -> Tensor:
        """``labels`` with -1 in place of frozen channels."""
        alive = (labels >= 0) & ~self.frozen[labels.clamp_min(0)]
        return torch.where(alive, labels, NO_CHANNEL)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Fix the scale of these channels, and of all merged with them, to 1."""
        chosen = self.live(labels)
        chosen = chosen[chosen >= 0]
        if not chosen.numel():
            return
        roots = torch.zeros(self.count, dtype=torch.bool)
        roots[self.root[chosen]] = True
        members = roots[self.root]
        self.reasons.append(reason)
        self._why[members & ~self.frozen] = len(self.reasons) - 1
        self.frozen |= members

    def merge(self, one: Tensor, two: Tensor, reason: str) -> Tensor:
        """Demand equal scales element by element; returns the common labels.

        Where only one side belongs to a live channel, that channel is frozen for ``reason``.
        """
        one, two = torch.broadcast_tensors(self.live(one), self.live(two))
        both = (one >= 0) & (two >= 0)
        self._union(one[both], two[both])
        lonely = (one >= 0) ^ (two >= 0)
        self.freeze(torch.maximum(one, two)[lonely], reason)
        return self.live(torch.maximum(one, two))

    def why(self, labels: Tensor) -> str | None:
        """The reason for which the first frozen channel among ``labels`` was frozen."""
        chosen = labels[labels >= 0]
        chosen = chosen[self.frozen[chosen]]
        return self.reasons[int(self._why[chosen[0]])] if chosen.numel() else None

    def _union(self, one: Tensor, two: Tensor) -> None:
        if not one.numel():
            return
        before = self.reasons_of_frozen()
        a, b = self.root[one], self.root[two]
        while not torch.equal(a, b):
            low, high = torch.minimum(a, b), torch.maximum(a, b)
            self.root.scatter_reduce_(0, high, low, "amin")
            while not torch.equal(self.root, self.root[self.root]):
                self.root = self.root[self.root]
            a, b = self.root[a], self.root[b]
        for members, reason in before:
            self.freeze(members, reason)

    def reasons_of_frozen(self) -> list[tuple[Tensor, str]]:
        """Frozen channels by reason."""
        return [((self._why == k).nonzero().flatten(), reason) for k, reason in enumerate(self.reasons)]
