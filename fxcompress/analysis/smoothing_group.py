"""The smoothing group: what changes, and how, when channels of one value are scaled."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.analysis.site_types import Site
from fxcompress.edits import SetTensor, SetTransform
from fxcompress.errors import WeightError
from fxcompress.forms import Scale, WeightLayout


class GroupKind(enum.Enum):
    """What produces the channels."""

    NORM = "norm"  # the gain of a normalisation, or any other product with a parameter
    LINEAR = "linear"  # the rows of a matrix
    EXPLICIT = "explicit"  # nothing that could absorb a scale: the readers' input is multiplied at run time


@dataclass(frozen=True, eq=False)
class ScaledParameter:
    """A parameter whose elements follow the channels.

    Args:
        name: Canonical name.
        channels: int64, broadcasts to the parameter's shape: the channel of every element, -1 for none.
        role: ``"gain"``, ``"bias"``, ``"rows"`` or ``"columns"``.
        producer: Producers are divided by the scale, consumers multiplied.
        multiplier, offset: The graph uses ``multiplier · parameter + offset``, which is what gets scaled.
    """

    name: str
    channels: Tensor
    role: str
    producer: bool
    multiplier: float = 1.0
    offset: float = 0.0

    def rescaled(self, value: Tensor, scale: Tensor) -> Tensor:
        """``value`` after scaling; same shape and dtype.

        Args:
            value: The parameter.
            scale: ``[C]`` positive.

        Raises:
            WeightError: an element leaves the range of its dtype.
        """
        exact = self._exact(value, scale)
        result = exact.to(value.dtype)
        lost = (result == 0) & (exact != 0)
        if bool(lost.any()) or not bool(torch.isfinite(result).all()):
            raise WeightError(f"{self.name}: a scaled element leaves the range of {value.dtype}.")
        return result

    def rounded_channels(self, value: Tensor, scale: Tensor) -> Tensor:
        """``[C]`` bool: channels with an element that the dtype of ``value`` cannot hold after scaling."""
        exact = self._exact(value, scale)
        lossy = exact.to(value.dtype).to(torch.float64) != exact
        hit = torch.zeros(scale.numel() + 1, dtype=torch.bool)  # the last entry collects channel -1
        hit[self.channels.expand(value.shape)[lossy.to("cpu")]] = True
        return hit[:-1]

    def _exact(self, value: Tensor, scale: Tensor) -> Tensor:
        """The scaled value in float64."""
        factor = self._factors(scale.to(device=value.device, dtype=torch.float64))
        if self.offset == 0:
            return value.detach() * factor  # the factor makes it float64
        used = self.multiplier * value.detach().double() + self.offset
        return torch.where(factor == 1, value.double(), (used * factor - self.offset) / self.multiplier)

    def _factors(self, scale: Tensor) -> Tensor:
        step = scale.reciprocal() if self.producer else scale
        padded = torch.cat([step, step.new_ones(1)])  # channel -1 reads the last entry
        return padded[self.channels.to(scale.device)]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A site that reads the channels.

    Args:
        site: The site; its columns are multiplied by the scale.
        columns: ``[B, K]``, or ``[1, K]`` when all its matrices agree: channel of every column, -1 for none.
    """

    site: Site
    columns: Tensor

    def spread(self, per_channel: Tensor, fill: float = 1.0) -> Tensor:
        """``[C]`` per channel to ``[B or 1, K]`` per column; ``fill`` for columns of no channel."""
        return torch.cat([per_channel, per_channel.new_full((1,), fill)])[self.columns]

    @property
    def input_name(self) -> str:
        """Name of the node that the site reads."""
        if self.site.input is None:
            raise WeightError(f"{self.site.name}: a site without an input cannot take a scale.")
        return self.site.input.name


@dataclass(frozen=True, eq=False)
class SmoothingGroup:
    """One producer and every reader of its channels. For any scale s > 0 the edits keep the function.

    Without a producer (:attr:`GroupKind.EXPLICIT`) the readers' input is divided by an op of its own.

    Args:
        kind: What produces the channels.
        source: The node whose value is divided by the scale.
        channels: C, the number of independent scales.
        producers: Parameters to divide: gain or rows first, then biases; empty when explicit.
        consumers: All sites that read the channels.
    """

    kind: GroupKind
    source: fx.Node
    channels: int
    producers: tuple[ScaledParameter, ...]
    consumers: tuple[Consumer, ...]

    @property
    def name(self) -> str:
        """Name of the producer's first parameter, or of the first reader when there is no producer."""
        return self.producers[0].name if self.producers else self.consumers[0].site.name

    @property
    def sites(self) -> tuple[Site, ...]:
        """The consuming sites, in graph order."""
        return tuple(consumer.site for consumer in self.consumers)

    @property
    def site_names(self) -> tuple[str, ...]:
        """Parameter names of the consuming sites, each once."""
        return tuple(dict.fromkeys(site.name for site in self.sites))

    @property
    def parameters(self) -> tuple[ScaledParameter, ...]:
        """Every parameter the group changes, each once: producers, then consumers."""
        columns: dict[str, ScaledParameter] = {}
        for consumer in self.consumers:
            held = columns_in_parameter(consumer.site.layout, consumer.columns)
            columns.setdefault(
                consumer.site.name, ScaledParameter(consumer.site.name, held, "columns", False)
            )
        return (*self.producers, *columns.values())

    def edits(
        self, scale: Tensor, weight: Callable[[str], Tensor], reason: str = ""
    ) -> Iterator[SetTensor | SetTransform]:
        """The edits that divide the producer (or the readers' input) by ``scale`` and multiply the consumers.

        Args:
            scale: ``[C]``, finite and positive.
            weight: Current value of a parameter by name.
            reason: Goes into the report.

        Raises:
            WeightError: the scale is not positive and finite, of another length, or an element leaves the
                range of its dtype. Nothing is yielded then.
        """
        if tuple(scale.shape) != (self.channels,) or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise WeightError(
                f"{self.name}: expected {self.channels} positive finite scales, found {tuple(scale.shape)}"
                f" with minimum {float(scale.min()) if scale.numel() else float('nan')}."
            )
        if self.kind is GroupKind.EXPLICIT:  # the factor is stored in float32; the weights follow it
            scale = scale.double().reciprocal().float().double().reciprocal()
        values = [
            (parameter.name, parameter.rescaled(weight(parameter.name), scale))
            for parameter in self.parameters
        ]
        for name, value in values:
            yield SetTensor(name, value, reason)
        if self.kind is GroupKind.EXPLICIT:
            for consumer in self.consumers:
                factor = consumer.spread(scale).reciprocal().float()[0]  # [K]
                yield SetTransform(consumer.site.name, (Scale(factor),), reason=reason)

    def without_rounding(self, scale: Tensor, weight: Callable[[str], Tensor]) -> Tensor:
        """``scale`` with 1 wherever a changed parameter could not be stored exactly in its dtype.

        A power of two only moves exponents, so it survives unless a value leaves the normal range, or unless
        a gain is stored with an offset.
        """
        lossy = torch.zeros(self.channels, dtype=torch.bool)
        for parameter in self.parameters:
            lossy |= parameter.rounded_channels(weight(parameter.name), scale)
        return torch.where(lossy, 1.0, scale)

    def input_absmax(self, absmax: Mapping[str, Tensor]) -> Tensor:
        """``[C]`` float64: largest magnitude of each channel at the sites' inputs.

        Args:
            absmax: ``[K]`` per input, by ``site.input.name``; sites whose input is missing do not count.
        """
        held = torch.zeros(self.channels, dtype=torch.float64)
        for consumer in self.consumers:
            if consumer.input_name not in absmax:
                continue
            found = absmax[consumer.input_name].detach().to("cpu", torch.float64)
            _scatter_max(held, consumer.columns, found.expand(consumer.columns.shape))
        return held

    def input_max(self, maximum: Mapping[str, Tensor]) -> Tensor:
        """``[C]`` float64: greatest value of each channel at the sites' inputs; -inf where none is known.

        Args:
            maximum: ``[K]`` per input, by ``site.input.name``.
        """
        held = torch.full((self.channels,), -torch.inf, dtype=torch.float64)
        for consumer in self.consumers:
            if consumer.input_name in maximum:
                found = maximum[consumer.input_name].detach().to("cpu", torch.float64)
                _scatter_max(held, consumer.columns, found.expand(consumer.columns.shape))
        return held

    def weight_absmax(self, weight: Callable[[str], Tensor]) -> Tensor:
        """``[C]`` float64: largest magnitude of each channel's columns over all consumers."""
        held = torch.zeros(self.channels, dtype=torch.float64)
        for consumer in self.consumers:
            matrix = consumer.site.layout.to_matrix(weight(consumer.site.name).detach())  # [B, N, K]
            found = matrix.abs().amax(dim=1).to("cpu", torch.float64)  # [B, K]
            if consumer.columns.shape[0] == 1:
                found = found.amax(dim=0, keepdim=True)
            _scatter_max(held, consumer.columns, found)
        return held


def _scatter_max(held: Tensor, channels: Tensor, values: Tensor) -> None:
    chosen = channels >= 0
    held.scatter_reduce_(0, channels[chosen], values[chosen], "amax")


def rows_in_parameter(layout: WeightLayout, rows: Tensor) -> Tensor:
    """``rows`` [B or 1, N] as a tensor that broadcasts to the parameter's shape."""
    split = layout.batch_dims + layout.row_dims
    shape = layout.permuted_shape
    batch = shape[: layout.batch_dims] if rows.shape[0] > 1 else (1,) * layout.batch_dims
    return _restore(
        layout, rows.reshape(*batch, *shape[layout.batch_dims : split], *(1,) * (len(shape) - split))
    )


def columns_in_parameter(layout: WeightLayout, columns: Tensor) -> Tensor:
    """``columns`` [B or 1, K] as a tensor that broadcasts to the parameter's shape."""
    split = layout.batch_dims + layout.row_dims
    shape = layout.permuted_shape
    batch = shape[: layout.batch_dims] if columns.shape[0] > 1 else (1,) * layout.batch_dims
    return _restore(layout, columns.reshape(*batch, *(1,) * layout.row_dims, *shape[split:]))


def _restore(layout: WeightLayout, permuted: Tensor) -> Tensor:
    inverse = sorted(range(len(layout.perm)), key=layout.perm.__getitem__)
    return permuted.permute(inverse)
