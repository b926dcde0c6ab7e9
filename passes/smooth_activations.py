"""Move activation outliers into the weights, so that both can be quantized.

    y = x̂·γ (+ β),  z = W y            →  γ/s, β/s, W·diag(s)          norm gain before matrices
    y = W₁ x + b,   z = W₂ f(y)        →  diag(1/s)·W₁, b/s, W₂·diag(s)  matrix before matrices
    z = W x                            →  W·diag(s) · (x/s)              (explicit) where neither absorbs it

SmoothQuant (Xiao et al., 2023, arXiv:2211.10438, equation 4): s_j = max|y_j|^α / max|W_:j|^(1−α).
Keeps: the function. Which parameters belong together is read off the dataflow
(:mod:`fxcompress.analysis.smoothing`): f may be any chain that commutes with a positive scale per channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.errors import RecipeError
from fxcompress.passes._balancing import BALANCED, BalancingPass, Work, make_target
from fxcompress.passes._output_error import Target

_FLOOR = 1e-5  # for max|W_:j| and for s_j, as in the authors' code


@dataclass(frozen=True)
class SmoothActivations(BalancingPass):
    """Balance the ranges of activations and weights per input channel.

    Args:
        alpha: How much of the difficulty moves into the weights: 0 flattens the weights, 1 the activations.
            Default 0.5 (section 5.1); models with strong outliers take 0.8…0.85. ``"search"`` takes for each
            group the α = 0, 1/steps, …, 1, or no scale at all, with the least error of the outputs of all
            sites that read the group, on calibration tokens and under the quantization described by the
            options below (:mod:`fxcompress.passes._output_error`).
        steps: Number of steps of the search. Default 20.
        tokens: Number of calibration tokens it is judged on. Default 256.
        bits, group_size, symmetric: (search) Number format of the weights that follows. Default 8 bits,
            symmetric, one scale per row.
        activation_bits, activation_mode: (search) How inputs will be quantized. Default 8 bits,
            ``"dynamic"``.
        fold_linear, heads, exact, explicit: See :class:`fxcompress.passes._balancing.BalancingPass`.
        include, exclude: Name patterns, see :class:`SelectivePass`. A group is left alone as a whole when one
            of its parameters is.

    Raises:
        RecipeError: an option is out of range, or a search was told another format than follows.
        CalibrationError: the calibration data gave NaN or inf.

    Example:
        >>> SmoothActivations(alpha="search", steps=10).needs_calibration
        True
    """

    alpha: float | Literal["search"] = 0.5
    steps: int = 20
    tokens: int = 256
    bits: int = 8
    group_size: int = 0
    symmetric: bool = True
    activation_bits: int = 8
    activation_mode: Literal["dynamic", "static"] = "dynamic"

    name: ClassVar[str] = "smooth-activations"
    summary: ClassVar[str] = "Move activation outliers into the weights; the function stays the same."
    source: ClassVar[str] = "Xiao et al., 2023 (SmoothQuant, arXiv:2211.10438), section 4"
    provides: ClassVar[frozenset[str]] = frozenset({"smoothed"})
    conflicts: ClassVar[frozenset[str]] = BalancingPass.conflicts | (BALANCED - {"smoothed"})

    def __post_init__(self) -> None:
        super().__post_init__()
        a = self.alpha
        if a != "search" and (type(a) not in (int, float) or not 0 <= a <= 1):
            raise RecipeError(f'{self.name}: alpha={a!r}, expected a number from 0 to 1, or "search".')
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
    def search(self) -> tuple[Target, int] | None:
        """See :class:`BalancingPass`."""
        return (self._target(), self.tokens) if self.alpha == "search" else None

    def choose(self, work: Work) -> tuple[Tensor, str] | str:
        """See :class:`BalancingPass`. A channel that is zero in all data, or unread, keeps the scale 1."""
        seen = {name: found.absmax for name, found in work.seen.items()}
        x = work.group.input_absmax(seen)  # [C]
        w = work.group.weight_absmax(work.block.weight)  # [C]
        if work.error is None:
            assert self.alpha != "search"
            return smoothing_scale(x, w, self.alpha), f"α={self.alpha:g}"
        unscaled = work.error(torch.ones_like(x))
        best, least, found = torch.ones_like(x), unscaled, "none"
        for step in range(self.steps + 1):
            scale = self.rounded(smoothing_scale(x, w, step / self.steps))
            error = work.error(scale)
            if error < least:
                best, least, found = scale, error, f"{step / self.steps:g}"
        if found == "none":
            return f"no α gives a smaller output error than the scale 1 ({unscaled:.3g})"
        return best, f"α={found} by search: output error {unscaled:.3g} → {least:.3g}"


def smoothing_scale(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """``max|x|^α / max|W|^(1−α)`` per channel, float64; 1 where either is zero.

    Args:
        x: ``[C]`` largest magnitudes of the channels.
        w: ``[C]`` largest magnitudes of the weights that read them.
        alpha: 0…1.
    """
    scale = x.pow(alpha) / w.clamp_min(_FLOOR).pow(1 - alpha)
    return torch.where((x == 0) | (w == 0), 1.0, scale.clamp_min(_FLOOR))
