"""Centre channels and shrink those beyond a threshold, so that activations fit a coarse grid.

    y = x̂·γ + β,  z = W y + b   →   γ/s,  (β − z₀)/s,  W·diag(s),  b + W·z₀
    z = W x + b                 →   W·diag(s)·((x − z₀)/s) + (b + W·z₀)          explicit

Outlier Suppression+ (Wei et al., 2023, arXiv:2304.09145): z₀_j = (max_j + min_j)/2 makes channels symmetric,
s_j = max(1, (max_j − z₀_j)/t, (min_j − z₀_j)/(−t)) shrinks only those that exceed ±t; t by search.
Keeps: the function. New biases are kept in float64 and the shift is what the stored bias of the norm really
lost, so nothing is rounded away.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.analysis.shift_paths import added_bias_refusal, shift_bias
from fxcompress.analysis.sites import find_sites
from fxcompress.analysis.smoothing import GroupKind, ScaledParameter, SmoothingGroup
from fxcompress.edits import Edit, SetTensor, SetTransform
from fxcompress.errors import RecipeError, WeightError
from fxcompress.forms import Scale, Shift
from fxcompress.pass_base import BlockContext
from fxcompress.passes._balancing import BALANCED, BalancingPass, Work, make_target
from fxcompress.passes._output_error import Target


@dataclass(frozen=True)
class SuppressOutliers(BalancingPass):
    """Shift and scale channels per group.

    Args:
        shift: ``"fold"``: shift where a norm's bias can absorb it and every reader can be given a bias;
            elsewhere scale only. ``"explicit"``: elsewhere shift at run time (one addition per token), also
            behind norms without a bias. ``"none"``: scale only. Default ``"fold"``.
        steps: Thresholds tried, evenly from the largest magnitude down to that of the smallest channel; below
            it every channel shrinks alike, which changes no grid. Default 100 (the paper).
        tokens: Calibration tokens they are judged on. Default 256.
        bits, group_size, symmetric: Number format of the weights that follows. Default 8 bits, symmetric, one
            scale per row.
        activation_bits, activation_mode: How inputs will be quantized. Default 8 bits, ``"static"``.
        fold_linear, heads, exact, explicit: See :class:`fxcompress.passes._balancing.BalancingPass`. With
            ``exact`` scales are powers of two and shifts whatever the stored bias can express.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    The least error of the outputs of the sites that read the group decides
    (:mod:`fxcompress.passes._output_error`), where the paper looks at the output of the attention or of the
    first feed-forward matrix.

    Raises:
        RecipeError, FormatError: an option is out of range, or another format follows.
        CalibrationError: the calibration data gave NaN or inf.

    Example:
        >>> SuppressOutliers(shift="none").preserves_function
        True
    """

    shift: Literal["fold", "explicit", "none"] = "fold"
    steps: int = 100
    tokens: int = 256
    bits: int = 8
    group_size: int = 0
    symmetric: bool = True
    activation_bits: int = 8
    activation_mode: Literal["dynamic", "static"] = "static"

    name: ClassVar[str] = "suppress-outliers"
    summary: ClassVar[str] = (
        "Centre channels and shrink those beyond a threshold; the function stays the same."
    )
    source: ClassVar[str] = "Wei et al., 2023 (Outlier Suppression+, arXiv:2304.09145), sections 4.1 and 4.2"
    provides: ClassVar[frozenset[str]] = frozenset({"outliers-suppressed"})
    conflicts: ClassVar[frozenset[str]] = BalancingPass.conflicts | BALANCED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift not in ("fold", "explicit", "none"):
            raise RecipeError(f"{self.name}: shift={self.shift!r}, expected 'fold', 'explicit' or 'none'.")
        for option in ("steps", "tokens"):
            if type(getattr(self, option)) is not int or getattr(self, option) < 1:
                raise RecipeError(
                    f"{self.name}: {option}={getattr(self, option)!r}, expected a positive integer."
                )
        self._target()

    def _target(self) -> Target:
        activation = (self.activation_mode, self.activation_bits)
        return make_target(self.name, self.bits, self.group_size, self.symmetric, activation)

    @property
    def search(self) -> tuple[Target, int]:
        """See :class:`BalancingPass`."""
        return self._target(), self.tokens

    def ordered(self, block: BlockContext, groups: list[SmoothingGroup]) -> list[SmoothingGroup]:
        """Last reader first: what scales a matrix's rows must come before its bias moves into its form."""
        place = {site: index for index, site in enumerate(block.sites)}
        return sorted(groups, key=lambda group: -max(place[site] for site in group.sites))

    def choose(self, work: Work) -> tuple[Tensor, str] | str:
        """See :class:`BalancingPass`; without a shift."""
        scale, words, _ = self._search(work, None)
        return words if scale is None else (scale, words)

    def balance(self, work: Work) -> Generator[Edit, None, str | None]:
        """Yield the edits of one group; returns why there are none."""
        bias, note = self._shiftable(work)
        if note:
            reason = yield from super().balance(work)
            return None if reason is None else f"{reason}; not shifted: {note}"
        refusal = self.unsuitable(work)
        if refusal is not None:
            return refusal
        z = centre(*self._range(work))
        scale, words, _ = self._search(work, z)
        if scale is None:
            return words
        scale = work.group.without_rounding(scale, work.block.weight) if self.exact else scale
        if bool((scale == 1).all()) and bool((z == 0).all()):
            return "nothing to move: every scale is 1 and every channel centred"
        try:
            edits = list(self._edits(work, scale, z, bias, words))
        except WeightError as error:
            return str(error)
        yield from edits
        return None

    def _shiftable(self, work: Work) -> tuple[ScaledParameter | None, str]:
        """The bias that takes a shift, or None; and why there is no shift at all, or nothing."""
        if self.shift == "none":
            return None, "shift='none'"
        sites = find_sites(work.block.program)
        bias, why = shift_bias(work.block.program, sites, work.group)
        if bias is not None or self.shift == "fold":
            return bias, why
        return None, added_bias_refusal(sites, work.group)

    def _range(self, work: Work) -> tuple[Tensor, Tensor]:
        """Least and greatest value of every channel, ``[C]`` float64; zero where nothing was seen."""
        low = -work.group.input_max({name: -found.minimum for name, found in work.seen.items()})
        high = work.group.input_max({name: found.maximum for name, found in work.seen.items()})
        seen = torch.isfinite(low) & torch.isfinite(high)
        return torch.where(seen, low, 0.0), torch.where(seen, high, 0.0)

    def _search(self, work: Work, z: Tensor | None) -> tuple[Tensor | None, str, float]:
        """The scale of the best threshold, words, and its error; None and the reason when none helps."""
        assert work.error is not None
        low, high = self._range(work)
        if z is not None:
            low, high = low - z, high - z
        magnitude = torch.maximum(-low, high)  # [C]
        ones = torch.ones_like(magnitude)
        before = work.error(ones)
        best, least, threshold = None, before, float("inf")
        for t in thresholds(magnitude, self.steps):
            scale = self.rounded(threshold_scale(low, high, t))
            error = work.error(scale, z)
            if error < least:
                best, least, threshold = scale, error, t
        if best is None:
            return None, f"no threshold gives a smaller output error than leaving it ({before:.3g})", before
        return best, f"t={threshold:.3g}: output error {before:.3g} → {least:.3g}", least

    def _edits(
        self, work: Work, scale: Tensor, z: Tensor, bias: ScaledParameter | None, words: str
    ) -> Iterator[Edit]:
        group, block = work.group, work.block
        span = f"{float(scale.min()):.3g}…{float(scale.max()):.3g}"
        reason = f"shifted by up to {float(z.abs().max()):.3g} and scaled by {span}, {words}"
        old = {name: block.weight(name).detach() for name in group.site_names}
        shifted: dict[str, Tensor] = {}
        if bias is not None:
            moved, z = shifted_bias(block.weight(bias.name), bias, scale, z)
            shifted[bias.name] = moved
        for edit in group.edits(scale, block.weight, reason):
            if isinstance(edit, SetTensor):
                yield SetTensor(edit.name, shifted.get(edit.name, edit.value), reason)
        for consumer in group.consumers:
            site = consumer.site
            offset = consumer.spread(z, 0.0)[0]  # [K] float64
            transforms: tuple[Shift | Scale, ...] = ()
            if bias is None:
                factor = consumer.spread(scale).reciprocal().float()[0]
                explicit = group.kind is GroupKind.EXPLICIT
                # Behind a fold the input is divided already, so the shift is, too.
                step = -offset if explicit else -offset * factor.double()
                transforms = (Shift(step.float()), Scale(factor)) if explicit else (Shift(step.float()),)
                offset = -transforms[0].tensors()["offset"].double() / (1 if explicit else factor.double())
            weight = site.layout.to_matrix(old[site.name])[0].double()  # [N, K]
            value = weight @ offset.to(weight.device)
            current = block.state.form(site.name).bias
            if current is None and site.bias is not None:
                current = block.weight(site.bias)
            if current is not None:
                value = value + current.detach().double()
            yield SetTransform(site.name, transforms, bias=value, reason=reason)


def centre(low: Tensor, high: Tensor) -> Tensor:
    """``(max + min)/2`` per channel ``[C]``, in float32 precision; 0 for channels that are constant zero."""
    return ((low + high) / 2).float().double()


def thresholds(magnitude: Tensor, steps: int) -> list[float]:
    """Evenly spaced from the largest magnitude down to the smallest that is not zero; empty without any."""
    used = magnitude[magnitude > 0]
    if not used.numel():
        return []
    top, bottom = float(used.max()), float(used.min())
    return [top - (top - bottom) * step / steps for step in range(steps + 1)]


def threshold_scale(low: Tensor, high: Tensor, t: float) -> Tensor:
    """``max(1, high/t, low/(−t))`` per channel: only channels beyond ±t shrink.

    Example:
        >>> threshold_scale(torch.tensor([-27.0, -1.0]), torch.tensor([27.0, 2.0]), 13.5).tolist()
        [2.0, 1.0]
    """
    return torch.maximum(high / t, -low / t).clamp_min(1.0)


def shifted_bias(value: Tensor, bias: ScaledParameter, scale: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """``(β − z)/s`` in the dtype of β, and the shift ``[C]`` float64 that this really is."""
    channels = bias.channels.expand(value.shape)
    chosen = channels >= 0
    own = channels[chosen]
    wide = value.detach().double().cpu()
    moved = wide.clone()
    moved[chosen] = (wide[chosen] - z[own]) / scale[own]
    stored = moved.to(value.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise WeightError(f"{bias.name}: a shifted element leaves the range of {value.dtype}.")
    real = torch.zeros_like(z)
    real[own] = wide[chosen] - stored.double()[chosen] * scale[own]
    return stored.to(value.device), real
