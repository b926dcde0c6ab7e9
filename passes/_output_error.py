"""How much the quantization to come changes the outputs of the sites that read a scaled value.

For a scale s the error of a group is the mean over its sites of

    ‖x Wᵀ − Q_a(x/s) · Q_w(W·diag(s))ᵀ‖² / ‖x Wᵀ‖²

on a sample of calibration tokens. It is measured at the sites themselves, not (as the AWQ and OS+ papers do)
at the output of the attention or of the feed-forward part: what those parts are is a fact about
architectures, which the graph does not hold; what reads the scaled value is read off the graph. Dividing by
each site's own energy lets a router or a small key projection count as much as a large one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.analysis.smoothing import Consumer, SmoothingGroup
from fxcompress.formats import IntFormat
from fxcompress.formats.integer import decode, encode, find_parameters
from fxcompress.forms import ActivationQuantizer, DynamicPerToken
from fxcompress.ops.activation import apply_quantizer
from fxcompress.pass_base import BlockContext, Statistics
from fxcompress.passes._grids import static_quantizer
from fxcompress.passes._input_rows import Rows, site_rows
from fxcompress.passes._selection import fitting_format

_BATCH_SHARE = 8  # one batch gives at most 1/8 of the sample (if there are that many), so texts mix

Samples = Mapping[Site, Sequence[Rows]]


@dataclass(frozen=True)
class Target:
    """The quantization that follows.

    Args:
        weights: Number format of the weights.
        activation_bits: Width of the inputs' codes; None: inputs stay as they are.
        static: One calibrated range per site instead of one scale per token.
    """

    weights: IntFormat
    activation_bits: int | None
    static: bool = False


def sample_rows(block: BlockContext, sites: Sequence[Site], limit: int) -> dict[Site, list[Rows]]:
    """Randomly chosen input rows of sites, about ``limit`` per matrix; readers of one value share them."""
    linear = [site for site in sites if site.kind is SiteKind.LINEAR]
    share = max(1, limit // _BATCH_SHARE)
    parts: dict[str, list[Tensor]] = {}
    for values in block.inputs(linear) if linear else ():
        for name, x in values.items():
            parts.setdefault(name, []).append(_choose(x.reshape(-1, x.shape[-1]), share, block))
    shared = {
        name: [Rows(_choose(torch.cat(found), limit, block)[None], None)] for name, found in parts.items()
    }
    samples = {site: shared[site.input.name] for site in linear if site.input is not None}
    for site in sites:
        if site.kind is not SiteKind.LINEAR:
            rows = list(site_rows(block, site))
            count = max(1, limit // max(1, len(rows)))
            samples[site] = [
                Rows(_choose(part.values.transpose(0, 1), count, block).transpose(0, 1).clone(), part.first)
                for part in rows
            ]
    return samples


def _choose(rows: Tensor, count: int, block: BlockContext) -> Tensor:
    """``count`` of the rows ``[T, …]`` at random, in order; all of them when there are no more."""
    if len(rows) <= count:
        return rows
    return rows[torch.randperm(len(rows), generator=block.generator)[:count].sort().values.to(rows.device)]


@dataclass(frozen=True, eq=False)
class _Reader:
    """A site with sampled rows; ``parts``: rows ``[M, T, K]``, the matrices they meet, exact outputs."""

    consumer: Consumer
    weight: Tensor  # [B, N, K] float32
    parts: tuple[tuple[Tensor, slice, Tensor], ...]
    energy: float


class OutputError:
    """The error of one group as a function of its scale, and of a shift if there is one.

    Args:
        group: The group.
        block: Where current weights come from.
        samples: Rows of every site of the group, from :func:`sample_rows`.
        statistics: Of the sites' inputs; gives static ranges.
        target: What follows.
    """

    def __init__(
        self,
        group: SmoothingGroup,
        block: BlockContext,
        samples: Samples,
        statistics: Mapping[str, Statistics],
        target: Target,
    ) -> None:
        self.target = target
        self.statistics = statistics
        self._known: dict[tuple[bytes, bytes], float] = {}
        readers = (_reader(consumer, block, samples[consumer.site]) for consumer in group.consumers)
        self.readers = [reader for reader in readers if reader.energy > 0]

    @torch.no_grad()
    def __call__(self, scale: Tensor, shift: Tensor | None = None) -> float:
        """Error for ``scale [C]`` and, subtracted before dividing, ``shift [C]``; 0 when nothing is read."""
        key = (scale.numpy().tobytes(), b"" if shift is None else shift.numpy().tobytes())
        if key not in self._known:
            errors = [self._error(reader, scale, shift) for reader in self.readers]
            self._known[key] = sum(errors) / len(errors) if errors else 0.0
        return self._known[key]

    def _error(self, reader: _Reader, scale: Tensor, shift: Tensor | None) -> float:
        consumer = reader.consumer
        factor = consumer.spread(scale).float().unsqueeze(1)  # [B or 1, 1, K]
        offset = None if shift is None else consumer.spread(shift, 0.0).float().unsqueeze(1)
        factor = factor.to(reader.weight.device)
        weight = quantized(reader.weight * factor, self.target.weights)
        quantizer = self._static(consumer, scale, shift)
        total = 0.0
        for x, matrices, exact in reader.parts:
            own = factor[matrices] if factor.shape[0] > 1 else factor
            moved = x if offset is None else x - (offset[matrices] if offset.shape[0] > 1 else offset)
            scaled = self._quantized_input(moved / own, quantizer)
            out = scaled @ weight[matrices].mT
            if offset is not None:  # what a bias will add
                dense = reader.weight[matrices]
                out = out + (offset[matrices] if offset.shape[0] > 1 else offset) @ dense.mT
            total += float((out - exact).double().square().sum())
        return total / reader.energy

    def _quantized_input(self, x: Tensor, static: ActivationQuantizer | None) -> Tensor:
        if self.target.activation_bits is None:
            return x
        return apply_quantizer(x, static or DynamicPerToken(self.target.activation_bits))

    def _static(self, consumer: Consumer, scale: Tensor, shift: Tensor | None) -> ActivationQuantizer | None:
        if not self.target.static or self.target.activation_bits is None:
            return None
        seen = self.statistics[consumer.input_name]
        z = 0.0 if shift is None else consumer.spread(shift, 0.0)
        low, high = ((v.cpu().double() - z) / consumer.spread(scale) for v in (seen.minimum, seen.maximum))
        return static_quantizer(low.min(), high.max(), self.target.activation_bits, consumer.site.name)


def quantized(weight: Tensor, fmt: IntFormat) -> Tensor:
    """``[B, N, K]`` after rounding to nearest in ``fmt`` (per row where a group exceeds the row)."""
    fitting, _ = fitting_format(fmt, weight.shape[-1])
    scale, zero = find_parameters(weight, fitting)
    return decode(encode(weight, scale, zero, fitting), scale, zero, fitting, weight.dtype)


def _reader(consumer: Consumer, block: BlockContext, rows: Sequence[Rows]) -> _Reader:
    weight = consumer.site.layout.to_matrix(block.weight(consumer.site.name).detach()).float()
    parts = tuple(_exact(rows, weight))
    energy = sum(float(exact.double().square().sum()) for _, _, exact in parts)
    return _Reader(consumer, weight, parts, energy)


def _exact(rows: Sequence[Rows], weight: Tensor) -> Iterator[tuple[Tensor, slice, Tensor]]:
    for part in rows:
        if part.values.shape[1]:
            x = part.values.detach().float()
            first = part.first
            matrices = slice(None) if first is None else slice(first, first + len(x))
            yield x, matrices, x @ weight[matrices].mT


@torch.no_grad()
def input_error(
    block: BlockContext, site: Site, rows: Sequence[Rows], quantizer: ActivationQuantizer
) -> float:
    """``‖(x − Q(x))·Wᵀ‖ / ‖x·Wᵀ‖`` of one site on sampled rows, W being its weight as it is now.

    The rows are the site's input after the transforms that earlier passes chose.
    """
    weight = site.layout.to_matrix(block.state.effective(site.name).detach()).float()  # [B, N, K]
    gap = size = 0.0
    for part in rows:
        first = part.first
        matrices = slice(None) if first is None else slice(first, first + len(part.values))
        x = part.values.float()
        wrong = (x - apply_quantizer(x, quantizer)) @ weight[matrices].mT
        gap += float(wrong.double().square().sum())
        size += float((x @ weight[matrices].mT).double().square().sum())
    if gap == 0:
        return 0.0
    return math.sqrt(gap / size) if size > 0 else math.inf
