"""Scale salient weight channels up before rounding, judged by the activations that meet them.

    y = x̂·γ (+ β),  z = W y   →  γ/s, β/s, Q(W·diag(s))     and the other groups of smooth-activations

A weight column that meets large activations is multiplied by s_j > 1 and so rounded more finely, relative to
its size; s_j = (mean|x_j|)^ρ, normalised by √(max s · min s), with one ρ per group found by search. Nothing
is kept in higher precision. Keeps: the function (before rounding). AWQ (Lin et al., 2023, arXiv:2306.00978,
section 3).

Rounding itself is left to ``quantize-weights`` or ``gptq``, clipping to ``clip-weights``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.errors import RecipeError
from fxcompress.passes._balancing import BALANCED, BalancingPass, Work, make_target
from fxcompress.passes._output_error import Target

_FLOOR = 1e-4  # of s_j before normalising, as in the authors' code


@dataclass(frozen=True)
class Awq(BalancingPass):
    """Search a scale per input channel that lowers the rounding error where activations are large.

    Args:
        bits, group_size, symmetric: Number format of the weights that follows; a recipe that goes on with
            another is refused. Default 4 bits, groups of 64, asymmetric, as of the passes that round.
        activation_bits: Width of inputs that will be quantized per token; None: they stay as they are.
            Default None.
        steps: ρ = 0, 1/steps, …, (steps−1)/steps are tried. Default 20 (the authors' code).
        tokens: Number of calibration tokens they are judged on. Default 256.
        fold_linear, heads, exact, explicit: See :class:`fxcompress.passes._balancing.BalancingPass`.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    The least error of the outputs of the sites that read the group decides
    (:mod:`fxcompress.passes._output_error`), where the paper looks at the output of the attention or the
    feed-forward part.

    Raises:
        RecipeError, FormatError: an option is out of range, or another format follows.
        CalibrationError: the calibration data gave NaN or inf.

    Example:
        >>> Awq(bits=3, group_size=128).preserves_function
        True
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    activation_bits: int | None = None
    steps: int = 20
    tokens: int = 256

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = "Scale weight channels that meet large activations up before rounding."
    source: ClassVar[str] = "Lin et al., 2023 (AWQ, arXiv:2306.00978), section 3"
    provides: ClassVar[frozenset[str]] = frozenset({"awq-scaled"})
    conflicts: ClassVar[frozenset[str]] = BalancingPass.conflicts | (BALANCED - {"awq-scaled"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("steps", "tokens"):
            if type(getattr(self, option)) is not int or getattr(self, option) < 1:
                raise RecipeError(
                    f"{self.name}: {option}={getattr(self, option)!r}, expected a positive integer."
                )
        self._target()

    def _target(self) -> Target:
        activation = None if self.activation_bits is None else ("dynamic", self.activation_bits)
        return make_target(self.name, self.bits, self.group_size, self.symmetric, activation)

    @property
    def search(self) -> tuple[Target, int]:
        """See :class:`BalancingPass`."""
        return self._target(), self.tokens

    def choose(self, work: Work) -> tuple[Tensor, str] | str:
        """See :class:`BalancingPass`; ρ = 0 is the scale 1."""
        assert work.error is not None
        found = {name: statistics.mean_abs for name, statistics in work.seen.items()}
        mean = work.group.input_absmax(found)  # [C]; sites that share a channel mostly share the input
        best, rho = torch.ones_like(mean), 0.0
        unscaled = least = work.error(best)
        for step in range(1, self.steps):
            scale = self.rounded(salience_scale(mean, step / self.steps))
            error = work.error(scale)
            if error < least:
                best, rho, least = scale, step / self.steps, error
        if rho == 0:
            return f"no ρ gives a smaller output error than the scale 1 ({unscaled:.3g})"
        return best, f"ρ={rho:g}: output error {unscaled:.3g} → {least:.3g}"


def salience_scale(mean: Tensor, rho: float) -> Tensor:
    """``max(mean^ρ, 1e-4)`` over ``√(max·min)``, float64; 1 for channels without activations.

    Args:
        mean: ``[C]`` mean magnitudes of the channels.
        rho: 0…1.
    """
    used = mean > 0
    if not bool(used.any()):
        return torch.ones_like(mean)
    scale = mean.pow(rho).clamp_min(_FLOOR)
    return torch.where(used, scale / (scale[used].max() * scale[used].min()).sqrt(), 1.0)
