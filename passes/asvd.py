"""Replace weights by two thin factors after scaling up the inputs with large activations.

    linear(x, w)  →  linear(linear(x, v), u)
    conv(x, w)    →  conv1x1(conv(x, v), u)

Yuan et al., 2023, "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models"
(arXiv:2312.05821): ``SVD(W · diag(s))`` with ``s = mean|x|^alpha``, and a search for the rank of every
layer by what truncating it alone does to the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxcompress.errors import RecipeError
from fxcompress.pass_base import BlockContext, SurveyContext
from fxcompress.passes._low_rank import LowRankPass, Metric, check_number, check_share
from fxcompress.passes._magnitudes import mean_magnitude
from fxcompress.passes._rank import aligned, break_even, budget_rank, truncation_search
from fxcompress.passes._selection import Candidate

_FLOOR = 1e-6  # added to every scale (reference code), so that unused inputs keep a weight


@dataclass(frozen=True)
class Asvd(LowRankPass):
    """Truncate the singular values of ``W·diag(mean|x|^alpha)``.

    Args:
        alpha: Power of the activation magnitudes. Default 0.5 (paper); 0 is plain SVD.
        budget: ``"layer"`` and ``"global"`` as in :class:`LowRankPass`. ``"search"``: the paper's
            sensitivity-based truncation rank search (STRS): every weight is truncated alone to each of
            ``shares``, the change of the model's outputs on the calibration data is measured (mean KL
            divergence per token where the paper takes perplexity, so that no labels are needed), and one cut
            through all of these by damage gives every weight its share. It runs the model once per weight
            and share: use little data. Default ``"layer"``.
        shares: Shares of a weight's numbers that the search tries. Default 0.4…0.9 (paper).
        keep, rank, energy, multiple, heads: See :class:`LowRankPass`.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range, or the search cannot meet ``keep``.

    Example:
        >>> Asvd(keep=0.9, budget="search").shares
        (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """

    alpha: float = 0.5
    shares: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

    name: ClassVar[str] = "asvd"
    summary: ClassVar[str] = "Factor weights after scaling inputs by their activations; search for ranks."
    source: ClassVar[str] = "Yuan et al., 2023 (ASVD, arXiv:2312.05821)"
    needs_calibration: ClassVar[bool] = True
    budgets: ClassVar[tuple[str, ...]] = ("layer", "global", "search")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "alpha", self.alpha, 0, 1)
        object.__setattr__(self, "shares", tuple(self.shares))
        if not self.shares:
            raise RecipeError(f"{self.name}: shares is empty.", fix="shares=(0.5, 0.7, 0.9)")
        for share in self.shares:
            check_share(self.name, "shares", share, open_end=True)

    def metrics(
        self, block: BlockContext, stage: Sequence[Candidate], known: Mapping[str, Tensor]
    ) -> Mapping[str, Metric | str]:
        """A diagonal root."""
        found: dict[str, Metric | str] = {}
        for candidate in stage:
            magnitude = mean_magnitude(block, candidate)
            if magnitude is None:
                found[candidate.name] = "no calibration token reaches it"
            else:
                found[candidate.name] = Metric(magnitude**self.alpha + _FLOOR if self.alpha else None)
        return found

    def allocation(self, model: SurveyContext, known: Mapping[str, Tensor]) -> Mapping[str, int | None]:
        """Ranks by the search, or from the spectra."""
        if self.budget != "search":
            return super().allocation(model, known)
        function = model.function()
        sizes: dict[str, tuple[int, int]] = {}
        trials: dict[str, dict[float, float]] = {}
        for block, candidate, found in self.decompositions(model, known):
            name, (rows, columns) = candidate.name, found.weight.shape
            weight = block.weight(name)
            sizes[name] = (rows, columns)
            trials[name] = {}
            for share in sorted(self.shares):
                u, v = found.factors(max(1, budget_rank(rows, columns, share)))
                tried = {name: candidate.primary.layout.from_matrix((u @ v)[None].to(weight.dtype))}
                damage = [float(function.divergence(batch, tried)) for batch in range(function.batches)]
                trials[name][share] = sum(damage) / len(damage)
        numbers = {name: rows * columns for name, (rows, columns) in sizes.items()}
        chosen = truncation_search(trials, numbers, self.share)
        return {name: self._searched_rank(*sizes[name], share) for name, share in chosen.items()}

    def _searched_rank(self, rows: int, columns: int, share: float) -> int | None:
        rank = aligned(budget_rank(rows, columns, share), self.multiple, up=False)
        return None if share == 1 or rank >= break_even(rows, columns) else max(1, rank)
