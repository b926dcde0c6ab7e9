"""Quantize weights and activations to integers, but keep the few input channels with outliers in float.

    linear(x, w)  →  linear(dequantize(quantize(x without O)), dequantize(w)) + x[O] · w[O]ᵀ

O, the outlier features, are channels with a large magnitude. LLM.int8() (Dettmers et al., 2022, section 3)
finds them in every call; they can also be fixed in calibration, which leaves nothing to decide at run time.
Keeps: the bias, shape and dtype of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.edits import Edit, Refuse, SetActivation, SetWeight
from fxcompress.errors import RecipeError
from fxcompress.formats import IntFormat, quantize_to_term
from fxcompress.forms import FixedOutliers, OutlierColumns, OutlierSplit
from fxcompress.pass_base import BlockContext
from fxcompress.passes._selection import (
    Candidate,
    Role,
    SelectivePass,
    candidates,
    check_group_size,
    describe,
    fitting_format,
)


@dataclass(frozen=True)
class SplitOutlierFeatures(SelectivePass):
    """Integer weights and integer activations per token, outlier channels apart.

    Args:
        bits: Code width of weights and activations, 2…8. Default 8. Weights that an earlier pass compressed
            keep their own.
        group_size: Inputs that share a scale of the weight; 0 = one scale per row. Default 0, as in the
            paper. The weights of an outlier channel are often small: groups code them finer.
        threshold: A channel with any magnitude of at least this, in any token of a call, is an outlier.
            Positive and finite. Default 6.0 (section 3.2 of the paper). Ignored with ``columns``.
        columns: Instead of deciding in every call, keep this many channels per site, those with the greatest
            magnitudes in calibration; their weights stay in full precision, too. Shapes are static and the
            outlier product is a small dense one. Default None: decide in every call, no data needed.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range.

    Example:
        >>> SplitOutlierFeatures(columns=16).needs_calibration
        True
    """

    bits: int = 8
    group_size: int = field(default=0, kw_only=True)
    threshold: float = field(default=6.0, kw_only=True)
    columns: int | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "split-outlier-features"
    summary: ClassVar[str] = "Integer weights and activations; channels with outliers stay in float."
    source: ClassVar[str] = "Dettmers et al., 2022 (LLM.int8(), arXiv:2208.07339), section 3"
    provides: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "quantized-activations"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise RecipeError(f"{self.name}: bits={self.bits!r}, expected an integer 2…8.")
        if type(self.group_size) is not int or self.group_size < 0:
            raise RecipeError(
                f"{self.name}: group_size={self.group_size!r}, expected 0 or a positive integer."
            )
        if type(self.threshold) not in (int, float) or not 0 < self.threshold < math.inf:
            raise RecipeError(
                f"{self.name}: threshold={self.threshold!r}, expected a positive finite number.",
                fix="without outlier features, use quantize-weights and quantize-activations.",
            )
        if self.columns is not None and (type(self.columns) is not int or self.columns < 1):
            raise RecipeError(f"{self.name}: columns={self.columns!r}, expected a positive number or null.")
        # Only one of the modes needs data; an instance may say so, the class cannot.
        object.__setattr__(self, "needs_calibration", self.columns is not None)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield edits for weight and activation, or a :class:`Refuse`, for every weight of the block."""
        self.check_patterns(block.program)
        if block.index == 0:
            check_group_size(self.name, block.program, self.group_size)
        chosen: list[Candidate] = []
        for candidate in candidates(block):
            reason = self._unsuitable(block, candidate)
            if reason is None:
                chosen.append(candidate)
            else:
                yield Refuse(candidate.name, reason)
        for candidate in chosen:
            if self.columns is None:
                yield from self._at_run_time(block, candidate)
            else:
                yield from self._fixed(block, candidate, self.columns)

    def _format(self) -> IntFormat:
        return IntFormat(bits=self.bits, symmetric=True, group_size=self.group_size)

    def _at_run_time(self, block: BlockContext, candidate: Candidate) -> Iterator[Edit]:
        name, site = candidate.name, candidate.primary
        if not block.state.is_compressed(name):
            fmt, note = fitting_format(self._format(), site.layout.matrix_shape[2])
            term = quantize_to_term(block.weight(name), site.layout, fmt)
            yield SetWeight(name, (term,), reason=f"{describe(fmt)}{note}")
        quantizer = OutlierSplit(self.bits, float(self.threshold))
        yield SetActivation(name, quantizer, quantizer.describe())

    def _fixed(self, block: BlockContext, candidate: Candidate, count: int) -> Iterator[Edit]:
        name, site = candidate.name, candidate.primary
        top = self._absmax(block, candidate)
        if top is None:
            yield Refuse(name, "no calibration token reaches it")
            return
        # Stable: of equal magnitudes the first channels, on every machine.
        order = torch.sort(top, descending=True, stable=True).indices
        columns = order[:count].sort().values
        matrix = site.layout.to_matrix(block.weight(name).detach())[0]  # [N, K]
        rest = matrix.index_fill(1, columns, 0)
        values = matrix.index_select(1, columns).contiguous()
        fmt, note = fitting_format(self._format(), site.layout.matrix_shape[2])
        term = quantize_to_term(site.layout.from_matrix(rest.unsqueeze(0)), site.layout, fmt)
        side = OutlierColumns(site.layout.shape, site.layout.perm, columns, values)
        inside = float(top[order[count:]].max()) if count < top.numel() else 0.0
        reason = f"{describe(fmt)}{note}, {count} columns kept; the others reach {inside:.3g}"
        yield SetWeight(name, (term, side), reason=reason)
        quantizer = FixedOutliers(self.bits, columns)
        yield SetActivation(name, quantizer, quantizer.describe())

    def _absmax(self, block: BlockContext, candidate: Candidate) -> Tensor | None:
        """``[K]`` greatest magnitude of each input channel over all uses."""
        seen = block.statistics(_products(candidate))
        found = [statistics.absmax.cpu() for statistics in seen.values() if statistics.count]
        return torch.stack(found).amax(0) if found else None

    def _unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        name, form = candidate.name, block.state.form(candidate.name)
        reason = self.unselected(block.program, name)
        if reason is not None:
            return reason
        if candidate.role is not Role.MATRIX:
            return f"{candidate.role.value}: its input stays unquantized"
        if candidate.primary.kind is SiteKind.OTHER:
            return candidate.primary.reason or "no use of it is a product"
        if any(site.kind is not SiteKind.LINEAR for site in candidate.uses):
            return f"outlier features are split in linear layers only, this is {candidate.primary.kind.value}"
        if form.activation is not None:
            return "its input is quantized already"
        if self.columns is None:
            return None
        if block.state.is_compressed(name):
            return "its weight is compressed already, so no column of it can be kept (use columns=null)"
        if len(candidate.here) < len(candidate.uses):
            return "used in several blocks, which one choice of columns cannot serve"
        if len({site.layout for site in candidate.uses}) > 1:
            return "used in two directions, which one choice of columns cannot serve"
        width = candidate.primary.layout.matrix_shape[2]
        if self.columns >= width:
            return f"columns={self.columns} would keep all of its {width} inputs in float"
        return None


def _products(candidate: Candidate) -> list[Site]:
    return [site for site in candidate.here if site.takes_activation]
