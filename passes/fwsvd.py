"""Replace weights by two thin factors, protecting the inputs whose weights matter most to the loss.

    linear(x, w)  →  linear(linear(x, v), u)
    conv(x, w)    →  conv1x1(conv(x, v), u)

Hsu et al., 2022, "Language model compression with weighted low-rank factorization" (arXiv:2207.00112). The
importance of an input is the root of the Fisher information of its weights, summed over outputs, so that the
weighted problem still has a closed solution: ``SVD(W · diag(I))``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError, RecipeError
from fxcompress.pass_base import BlockContext, ModelFunction, SurveyContext
from fxcompress.passes._low_rank import LowRankPass, Metric
from fxcompress.passes._selection import Candidate

_LEAST = 1e-6  # of the mean importance


@dataclass(frozen=True)
class Fwsvd(LowRankPass):
    """Truncate the singular values of ``W·diag(I)``, I being the root of the Fisher information per input.

    The gradient is that of the whole model, once per calibration batch: a batch of one sequence gives the
    paper's sum over samples. All weights and activations of the model are in memory for it.

    Args:
        labels: ``"data"``: the loss is the next-token loss on the calibration text (the paper's task loss).
            ``"model"``: outputs are drawn from the model itself (the Fisher information proper), which needs
            no labels and serves any model. Default ``"data"``.
        keep, rank, energy, budget, multiple, heads: See :class:`LowRankPass`.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: ``labels="data"`` for a model that scores no next tokens, or gradients of NaN or
        inf.

    Example:
        >>> Fwsvd(labels="model").needs_calibration
        True
    """

    labels: Literal["data", "model"] = "data"

    name: ClassVar[str] = "fwsvd"
    summary: ClassVar[str] = "Factor weights, weighing inputs by Fisher information (gradients of the model)."
    source: ClassVar[str] = "Hsu et al., 2022 (FWSVD, arXiv:2207.00112)"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels not in ("data", "model"):
            raise RecipeError(f"{self.name}: labels={self.labels!r}, expected 'data' or 'model'.")

    def look(self, model: SurveyContext) -> Mapping[str, Tensor]:
        """Importance ``[K]`` of the inputs of every weight: the root of its summed squared gradients."""
        names = {}
        for block in model.blocks():
            for candidate in self.chosen(block):
                names[candidate.name] = (candidate.primary.layout, block.weight(candidate.name))
        function = model.function()
        sums = {
            name: torch.zeros(layout.matrix_shape[2], dtype=torch.float64)
            for name, (layout, _) in names.items()
        }
        for batch in range(function.batches if names else 0):
            latent = {name: w.detach().clone().requires_grad_(True) for name, (_, w) in names.items()}
            for name, gradient in self._gradients(function, batch, latent, model.generator).items():
                matrix = names[name][0].to_matrix(gradient)[0]  # [N, K]
                sums[name] += matrix.double().square().sum(0).cpu()
        return {name: _importance(total) for name, total in sums.items()}

    def metrics(
        self, block: BlockContext, stage: Sequence[Candidate], known: Mapping[str, Tensor]
    ) -> Mapping[str, Metric | str]:
        """A diagonal root."""
        found: dict[str, Metric | str] = {}
        for candidate in stage:
            used = bool((known[candidate.name] > 0).any())
            found[candidate.name] = (
                Metric(known[candidate.name]) if used else "the loss does not depend on it"
            )
        return found

    def _gradients(
        self, function: ModelFunction, batch: int, latent: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        with torch.enable_grad():
            if self.labels == "data":
                try:
                    loss = function.loss(batch, latent)
                except CalibrationError as error:
                    raise CalibrationError(str(error), fix="labels='model' needs no labels.") from error
            else:
                loss = function.sampled_loss(batch, generator, latent)
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                loss, list(latent.values()), allow_unused=True
            )
        gradients = {name: g for name, g in zip(latent, found, strict=True) if g is not None}
        for name, gradient in gradients.items():
            if not bool(torch.isfinite(gradient).all()):
                raise CalibrationError(f"{self.name}: the gradient of {name} contains NaN or inf.")
        return gradients


def _importance(squares: Tensor) -> Tensor:
    """The root of summed squared gradients; unused inputs count a little, so that none is free to change."""
    root = squares.sqrt()
    return root.clamp_min(float(root.mean()) * _LEAST) if bool((root > 0).any()) else root
