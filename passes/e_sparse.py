"""E-Sparse: scores that count how much information an input channel carries, besides how large it is.

    linear(x, w)  →  linear(x, w · mask),   score_ij = |w_ij| · (H_j + α · sqrt(E[x_j²]))

Li et al., 2023, "E-Sparse: Boosting the Large Language Model Inference through Entropy-based N:M Sparsity"
(arXiv:2310.15929). H_j is the entropy of a histogram of channel j. The channel shuffles of the paper are the
pass ``permute-channels`` with ``metric="entropy"``, before this one. Keeps: every use of the weight, its
shape and dtype, and all weights that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxcompress.edits import Edit
from fxcompress.errors import RecipeError
from fxcompress.pass_base import BlockContext
from fxcompress.passes._entropy import channel_entropy, entropy_scores
from fxcompress.passes._moments import diagonal_moments
from fxcompress.passes._pruning import PruningPass, prune_by_score


@dataclass(frozen=True)
class ESparse(PruningPass):
    """Zero the weights of least magnitude times information.

    Args:
        sparsity, pattern, padding, include, exclude: See :class:`PruningPass`. Default pattern ``"2:4"``.
        alpha: Weight of the norm beside the entropy. Default 512. Norms here are per token, so that it does
            not depend on how much data there is; the paper's is over all tokens, whose number's root is 512
            for 128 sequences of 2048. Its own factor is not known to us and taken to be 1.
        bins: Of the histogram. Default 100 (likewise our choice).

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: the data gave NaN or inf.

    Example:
        >>> ESparse().groups
        (2, 4)
    """

    pattern: str = "2:4"
    alpha: float = 512.0
    bins: int = 100

    name: ClassVar[str] = "e-sparse"
    summary: ClassVar[str] = "Zero the weights of least magnitude times entropy and norm of their input."
    source: ClassVar[str] = "Li et al., 2023 (E-Sparse, arXiv:2310.15929)"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.alpha) not in (int, float) or not 0 <= self.alpha < float("inf"):
            raise RecipeError(f"{self.name}: alpha={self.alpha!r}, expected a number from 0.")
        if type(self.bins) is not int or self.bins < 2:
            raise RecipeError(f"{self.name}: bins={self.bins!r}, expected an integer from 2.")

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetMask` or a :class:`Refuse` for every weight of the block."""
        chosen, refused = self.choose(block)
        yield from refused
        moments = diagonal_moments(block, chosen)
        known: dict[object, Tensor | None] = {}
        scores = {}
        for candidate in chosen:
            site = candidate.primary
            key = (site.input, site.kind, site.layout.matrix_shape[2])
            if key not in known:
                known[key] = channel_entropy(block, site, self.bins)
            entropy = known[key]
            if candidate.name in moments and entropy is not None:
                norm = moments[candidate.name].second.sqrt()
                weight = block.weight(candidate.name).detach()
                scores[candidate.name] = entropy_scores(site, weight, norm, entropy, float(self.alpha))
        yield from prune_by_score(self, block, chosen, scores, rows=True)
