"""Move activation outliers into the weights, so that both can be quantized.

    y = x̂·γ (+ β),  z = W y            →  γ/s, β/s, W·diag(s)          norm gain before matrices
    y = W₁ x + b,   z = W₂ f(y)        →  diag(1/s)·W₁, b/s, W₂·diag(s)  matrix before matrices

SmoothQuant (Xiao et al., 2023, arXiv:2211.10438, equation 4): s_j = max|y_j|^α / max|W_:j|^(1−α).
Keeps: the function. No operation is added to the model. Which parameters belong together is read off the
dataflow (:mod:`fxcompress.analysis.smoothing`): f may be any chain that commutes with a positive scale per
channel.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.analysis.sites import find_sites
from fxcompress.analysis.smoothing import SmoothingAnalysis, SmoothingGroup, find_smoothing_groups
from fxcompress.edits import Edit, Refuse
from fxcompress.errors import RecipeError, WeightError
from fxcompress.pass_base import BlockContext, Statistics
from fxcompress.passes._inside import nodes_inside
from fxcompress.passes._selection import SelectivePass, find_heads

_FLOOR = 1e-5  # for max|W_:j| and for s_j, as in the authors' code


@dataclass(frozen=True)
class SmoothActivations(SelectivePass):
    """Balance the ranges of activations and weights per input channel.

    Args:
        alpha: How much of the difficulty moves into the weights: 0 flattens the weights, 1 the activations.
            Default 0.5 (section 5.1); models with strong outliers take 0.8…0.85.
        fold_linear: Also scale between two matrices (value → output, up → down). Default True; the paper
            only scales after norms.
        heads: Also smooth groups that feed nothing but output heads. Default False: the inputs of output
            heads are not quantized by default.
        exact: Round every scale to the nearest power of two, and keep the scale 1 where even that would round
            a stored weight. The function is then unchanged to the last bit of every weight, in any
            floating-point dtype, and a scale is off by at most √2. Default True. False takes the formula's
            scales and rounds the scaled weights to their dtype; the pass then does not promise an unchanged
            function.
        include, exclude: Name patterns, see :class:`SelectivePass`. A group is left alone as a whole when one
            of its parameters is.

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: the calibration data gave NaN or inf.

    Example:
        >>> SmoothActivations(alpha=0.85).needs_calibration
        True
    """

    alpha: float = 0.5
    fold_linear: bool = True
    heads: bool = False
    exact: bool = True

    name: ClassVar[str] = "smooth-activations"
    summary: ClassVar[str] = "Move activation outliers into the weights; the function stays the same."
    source: ClassVar[str] = "Xiao et al., 2023 (SmoothQuant, arXiv:2211.10438), section 4"
    provides: ClassVar[frozenset[str]] = frozenset({"smoothed"})
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"quantized-weights", "quantized-activations", "reordered-channels"}
    )
    needs_calibration: ClassVar[bool] = True
    preserves_function: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.alpha) not in (int, float) or not 0 <= self.alpha <= 1:
            raise RecipeError(f"{self.name}: alpha={self.alpha!r}, expected a number from 0 to 1.")
        for option in ("fold_linear", "heads", "exact"):
            if not isinstance(getattr(self, option), bool):
                raise RecipeError(f"{self.name}: {option}={getattr(self, option)!r}, expected true or false.")
        # Rounding in the weights' dtype is a change; an instance may say so, the class cannot.
        object.__setattr__(self, "preserves_function", self.exact)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield the folded tensors of every group of the block, and a :class:`Refuse` for other sites."""
        self.check_patterns(block.program)
        analysis = _analyze(block, self.fold_linear)
        refused = {site.name: reason for site, reason in reversed(analysis.refused)}
        groups = self._select(block, analysis.groups, refused)
        statistics = block.statistics([site for group in groups for site in group.sites]) if groups else {}
        for group in groups:
            reason = yield from self._smooth(block, group, statistics)
            if reason is not None:
                refused.update(dict.fromkeys(group.site_names, reason))
        for name, why in refused.items():
            yield Refuse(name, why)

    def scales(
        self, group: SmoothingGroup, block: BlockContext, statistics: Mapping[str, Statistics]
    ) -> Tensor | None:
        """``[C]`` float64: the formula's scales of one group; None when no calibration token reaches it.

        A channel that is zero in all calibration data, or that no weight reads, keeps the scale 1.
        """
        seen = {name: found.absmax for name, found in statistics.items() if found.count}
        if not any(consumer.input_name in seen for consumer in group.consumers):
            return None
        x = group.input_absmax(seen)  # [C]
        w = group.weight_absmax(block.weight)  # [C]
        scale = x.pow(self.alpha) / w.clamp_min(_FLOOR).pow(1 - self.alpha)
        return torch.where((x == 0) | (w == 0), 1.0, scale.clamp_min(_FLOOR))

    def _select(
        self, block: BlockContext, groups: Sequence[SmoothingGroup], refused: dict[str, str]
    ) -> list[SmoothingGroup]:
        """Groups to scale; of several that scale the same input channels, the first is enough."""
        heads = frozenset() if self.heads else find_heads(block.program, find_sites(block.program))
        taken: list[SmoothingGroup] = []
        for group in groups:
            reason = self._unselected_member(block, group)
            if reason is None and heads.issuperset(group.site_names):
                reason = "output head: its input stays unquantized (heads=False)"
            if reason is not None:
                for name in group.site_names:
                    refused.setdefault(name, reason)
            elif not any(_overlap(group, other) for other in taken):
                taken.append(group)
        for group in taken:
            for name in group.site_names:
                refused.pop(name, None)
        return taken

    def _unselected_member(self, block: BlockContext, group: SmoothingGroup) -> str | None:
        """Why the patterns leave a group out: include speaks of the sites, exclude of every parameter."""
        without_include = replace(self, include=())
        for parameter in group.parameters:
            chooser = without_include if parameter.producer else self
            reason = chooser.unselected(block.program, parameter.name)
            if reason is not None:
                return f"{parameter.name} {'is ' if reason.startswith('excluded') else ''}{reason}"
        return None

    def _smooth(
        self, block: BlockContext, group: SmoothingGroup, statistics: Mapping[str, Statistics]
    ) -> Generator[Edit, None, str | None]:
        """Yield the edits of one group; returns why there are none."""
        scale = self.scales(group, block, statistics)
        if scale is None:
            return "no calibration token reaches it"
        if self.exact:
            scale = torch.exp2(scale.log2().round())
            kept = group.without_rounding(scale, block.weight)
            if bool((kept == 1).all()) and not bool((scale == 1).all()):
                return f"{group.name}: any scale but 1 would round a stored weight (exact=True)"
            scale = kept
        if bool((scale == 1).all()):
            return "nothing to move: every scale is 1"
        moved = int((scale != 1).sum())
        reason = (
            f"smoothed with {group.name}: {moved} of {group.channels} channels,"
            f" scales {float(scale.min()):.3g}…{float(scale.max()):.3g}, α={self.alpha:g}"
        )
        try:
            yield from group.edits(scale, block.weight, reason)
        except WeightError as error:
            return str(error)
        return None


def _analyze(block: BlockContext, fold_linear: bool) -> SmoothingAnalysis:
    """Groups that lie wholly inside the block: producer, path and all sites."""
    program = block.program
    mine = {site.node for site in block.sites}
    others = [site for site in find_sites(program) if site.node not in mine]
    inside = nodes_inside(block) - {site.node for site in others}
    return find_smoothing_groups(program, [*block.sites, *others], inside, fold_linear=fold_linear)


def _overlap(one: SmoothingGroup, two: SmoothingGroup) -> bool:
    """Whether two groups scale the same input channel of a site."""
    held = {consumer.site: consumer.columns for consumer in one.consumers}
    return any(
        bool(((held[consumer.site] >= 0) & (consumer.columns >= 0)).any())
        for consumer in two.consumers
        if consumer.site in held
    )
