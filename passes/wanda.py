"""Zero the weights of least |W|·‖x‖, row by row, without changing those that stay.

    linear(x, w)  →  linear(x, w · mask)

Sun et al., 2023, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv:2306.11695).
Keeps: every use of the weight, its shape and dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from fxcompress.edits import Edit
from fxcompress.errors import RecipeError
from fxcompress.pass_base import BlockContext
from fxcompress.passes._moments import diagonal_moments, stages
from fxcompress.passes._pruning import PruningPass, prune_by_score
from fxcompress.passes._scores import cumulative_shares, wanda_scores


@dataclass(frozen=True)
class Wanda(PruningPass):
    """Zero the weights that matter least for the outputs on calibration data.

    Args:
        sparsity, pattern, padding, include, exclude: See :class:`PruningPass`. Without a pattern every row
            loses the same number of weights.
        equal_loss: Prune every row until the same share α of its total score is lost, α such that the number
            of zeros in the matrix is exact (the paper's variant searches α). Default False; not for patterns.
        sequential: ``"block"``: calibrate once per block (authors' code). ``"stage"``: again after every set
            of weights with the same input. Default ``"block"``.

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: the data gave NaN or inf.

    Example:
        >>> Wanda(sparsity=0.6).needs_calibration
        True
    """

    equal_loss: bool = False
    sequential: Literal["block", "stage"] = "block"

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "Zero the weights of least magnitude times input norm."
    source: ClassVar[str] = "Sun et al., 2023 (Wanda, arXiv:2306.11695)"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.equal_loss, bool):
            raise RecipeError(f"{self.name}: equal_loss={self.equal_loss!r}, expected true or false.")
        if self.equal_loss and self.pattern:
            raise RecipeError(f"{self.name}: equal_loss does not apply to pattern={self.pattern!r}.")
        if self.sequential not in ("block", "stage"):
            raise RecipeError(f"{self.name}: sequential={self.sequential!r}, expected 'block' or 'stage'.")

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetMask` or a :class:`Refuse` for every weight of the block."""
        chosen, refused = self.choose(block)
        yield from refused
        for stage in [chosen] if self.sequential == "block" else stages(chosen):
            found = diagonal_moments(block, stage)
            scores = {
                c.name: wanda_scores(c.primary, block.weight(c.name).detach(), found[c.name].second)
                for c in stage
                if c.name in found
            }
            if self.equal_loss:
                scores = {name: cumulative_shares(value) for name, value in scores.items()}
            yield from prune_by_score(self, block, stage, scores, rows=not self.equal_loss)
