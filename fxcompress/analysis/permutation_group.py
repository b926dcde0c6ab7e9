"""The permutation group: what changes, and how, when channels of one value are permuted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site
from fxcompress.edits import SetTensor
from fxcompress.errors import WeightError


@dataclass(frozen=True, eq=False)
class LabelledParameter:
    """A parameter that moves with the channels along one dimension.

    Args:
        name: Canonical name.
        dim: The dimension.
        labels: ``[n]`` int64: channel class of every slice along ``dim``, -1 for slices that stay.
    """

    name: str
    dim: int
    labels: Tensor

    def index(self, target: Tensor) -> Tensor:
        """``[n]``: slice p of the permuted parameter is slice ``index[p]`` of the old one.

        Args:
            target: ``[C]``: class c is replaced by class ``target[c]``, which must stand equally often.
        """
        held = self.labels >= 0
        positions = held.nonzero().flatten()
        labels = self.labels[positions]
        by_label = torch.argsort(labels, stable=True)
        counts = torch.bincount(labels, minlength=target.numel())
        start = counts.cumsum(0) - counts
        rank = torch.empty_like(by_label)
        rank[by_label] = torch.arange(by_label.numel()) - start[labels[by_label]]
        if not torch.equal(counts[target], counts):
            raise WeightError(f"{self.name}: the permutation joins channels that stand unequally often.")
        index = torch.arange(self.labels.numel())
        index[positions] = positions[by_label[start[target[labels]] + rank]]
        return index


@dataclass(frozen=True, eq=False)
class PermutationGroup:
    """Channels that can be permuted without any op, and every parameter that moves with them.

    Args:
        producers: Sites whose rows move.
        consumers: Sites whose columns move.
        columns: ``[K]``: channel class of every input of the site the search started at.
        cells: ``[C]``: a permutation must keep every class in its cell.
        parameters: Everything that moves, biases and gains included.
    """

    producers: tuple[Site, ...]
    consumers: tuple[Site, ...]
    columns: Tensor
    cells: Tensor
    parameters: tuple[LabelledParameter, ...]

    @property
    def classes(self) -> Tensor:
        """Numbers of the channel classes in use, ascending."""
        found: Tensor = self.columns.unique()
        return found

    def edits(self, target: Tensor, weight: Callable[[str], Tensor], reason: str = "") -> Iterator[SetTensor]:
        """The edits that replace channel class c by ``target[c]`` everywhere.

        Args:
            target: ``[C]`` int64, a permutation that keeps every cell.
            weight: Current value of a parameter by name.
            reason: Goes into the report.

        Raises:
            WeightError: ``target`` is no permutation, or leaves a cell. Nothing is yielded then.
        """
        numbers = torch.arange(self.cells.numel())
        if not torch.equal(target.sort().values, numbers) or not torch.equal(self.cells[target], self.cells):
            raise WeightError("a channel permutation must be one, within the group's cells.")
        values: dict[str, Tensor] = {}
        for parameter in self.parameters:
            old = values.get(parameter.name, weight(parameter.name))
            index = parameter.index(target).to(old.device)
            values[parameter.name] = old.detach().index_select(parameter.dim, index)
        for name, value in values.items():
            yield SetTensor(name, value, reason)
