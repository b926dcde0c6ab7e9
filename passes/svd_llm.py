"""Replace weights by two thin factors that change the outputs on calibration data least.

    linear(x, w)  →  linear(linear(x, v), u)
    conv(x, w)    →  conv1x1(conv(x, v), u)

Wang et al., 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
Compression" (arXiv:2403.07378). With ``E[x xᵀ] = L Lᵀ``, dropping the singular value σ of ``W L`` costs
exactly σ² in squared output error, so truncation is optimal for the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fxcompress.errors import CalibrationError, RecipeError
from fxcompress.pass_base import BlockContext
from fxcompress.passes._low_rank import LowRankPass, Metric, check_number, input_grams, input_order
from fxcompress.passes._low_rank_solver import cholesky_root, refit_left
from fxcompress.passes._selection import Candidate


@dataclass(frozen=True)
class SvdLlm(LowRankPass):
    """Truncate the singular values of every weight in the metric of its inputs.

    Args:
        sequential: ``"stage"``: calibrate again after every set of weights with the same input, so that each
            sees the errors of those before it in its block. ``"block"``: calibrate once per block; faster.
            Default ``"stage"``. Earlier blocks are compressed in both cases.
        refit: Fit the left factor by least squares to inputs calibrated again just before it (the paper's
            closed-form update); needs ``sequential="block"``, since a metric taken on those inputs has
            nothing left to fit. Default False.
        shrinkage: ρ in 0…1: correlations between inputs are multiplied by 1 − ρ before the decomposition; 0
            is the paper's method, 1 weighs each input by itself. Default 0.
        keep, rank, energy, budget, multiple, heads: See :class:`LowRankPass`.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: the data gave NaN or inf.

    Example:
        >>> SvdLlm(keep=0.8).needs_calibration
        True
    """

    sequential: Literal["block", "stage"] = "stage"
    refit: bool = False
    shrinkage: float = 0.0

    name: ClassVar[str] = "svd-llm"
    summary: ClassVar[str] = "Factor weights so that outputs on calibration data change least."
    source: ClassVar[str] = "Wang et al., 2024 (SVD-LLM, arXiv:2403.07378)"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequential not in ("block", "stage"):
            raise RecipeError(f"{self.name}: sequential={self.sequential!r}, expected 'block' or 'stage'.")
        if not isinstance(self.refit, bool):
            raise RecipeError(f"{self.name}: refit={self.refit!r}, expected true or false.")
        if self.refit and self.sequential == "stage":
            raise RecipeError(
                f"{self.name}: refit=True has nothing to fit with sequential='stage'.",
                fix="sequential='block', or refit=False.",
            )
        check_number(self.name, "shrinkage", self.shrinkage, 0, 1)

    def stages(self, block: BlockContext, chosen: Sequence[Candidate]) -> list[list[Candidate]]:
        """See ``sequential``."""
        return input_order(chosen, self.sequential)

    def metrics(
        self, block: BlockContext, stage: Sequence[Candidate], known: Mapping[str, Tensor]
    ) -> Mapping[str, Metric | str]:
        """The Cholesky factor of the inputs' second moments."""
        found: dict[str, Metric | str] = {}
        for name, gram in input_grams(block, stage).items():
            found[name] = gram if isinstance(gram, str) else Metric(self._root(name, gram), gram)
        return found

    def refined(self, block: BlockContext, candidate: Candidate, u: Tensor, v: Tensor) -> Tensor:
        """See ``refit``."""
        if not self.refit:
            return u
        gram = input_grams(block, [candidate])[candidate.name]
        return u if isinstance(gram, str) else refit_left(self.matrix(block, candidate), v, gram)

    def _root(self, name: str, gram: Tensor) -> Tensor:
        try:
            return cholesky_root(gram, float(self.shrinkage))
        except CalibrationError as error:
            raise CalibrationError(f"{self.name}: {name}: {error}") from error
