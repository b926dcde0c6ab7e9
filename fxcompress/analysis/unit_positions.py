"""Where the units of an axis lie along a dimension that the axis is a part of."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxcompress.analysis.axes import Axes, Axis, Dim

__all__ = ["unit_positions"]

_Labels: TypeAlias = "npt.NDArray[np.int64]"


def unit_positions(axes: Axes, dim: Dim, axis: Axis) -> Tensor:
    """``[units, width]`` int64: positions of every unit of ``axis`` along ``dim``, ascending.

    Example:
        Grouped queries, ``dim`` = (2 key heads, 2 queries each, 2 channels), ``axis`` the key heads:
        ``[[0, 1, 2, 3], [4, 5, 6, 7]]``.
    """
    labels = _labels(axes, dim, axis)
    assert labels is not None
    order = np.argsort(labels, kind="stable")
    return torch.from_numpy(order[int((labels < 0).sum()) :].reshape(axis.units, -1).astype(np.int64))


def _labels(axes: Axes, dim: Dim, axis: Axis) -> _Labels | None:
    """Unit at every position, -1 where there is none; None without any."""
    leaves = axes.leaves(dim)
    sizes = [leaf.units for leaf in leaves]
    for place, leaf in enumerate(leaves):
        own = _leaf_labels(axes, leaf, axis)
        if own is not None:
            shape = [1] * len(sizes)
            shape[place] = sizes[place]
            return np.broadcast_to(own.reshape(shape), sizes).reshape(-1)
    return None


def _leaf_labels(axes: Axes, leaf: Axis, axis: Axis) -> _Labels | None:
    if leaf is axis:
        return np.arange(leaf.units, dtype=np.int64)
    if leaf.parts is None:
        return None
    found = [_labels(axes, part, axis) for part in leaf.parts]
    if all(labels is None for labels in found):
        return None
    return np.concatenate(
        [
            np.full(axes.count(part), -1, dtype=np.int64) if labels is None else labels
            for labels, part in zip(found, leaf.parts, strict=True)
        ]
    )
