"""Measure how sensitive layers are, so that the pruning pass behind can give sensitive ones fewer zeros.

Changes nothing by itself. SAMSP (Shao et al., 2023, arXiv:2310.09499) ranks weights by the mean diagonal of
the Hessian of their output error, ``2 E[x²]`` averaged over inputs (exact: no sampling is needed for a linear
layer); OWL (Yin et al., 2023, arXiv:2310.05175) counts how many scores ``|W|·‖x‖`` of a block are outliers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fxcompress.analysis.site_types import SiteKind
from fxcompress.edits import Edit, Refuse, SetSensitivity
from fxcompress.errors import RecipeError
from fxcompress.pass_base import BlockContext, Pass
from fxcompress.passes._input_rows import unsupported
from fxcompress.passes._moments import Moments, diagonal_moments
from fxcompress.passes._pruning import PruningPass
from fxcompress.passes._scores import wanda_scores
from fxcompress.passes._selection import Candidate, Role, SelectivePass, candidates

_SPREADS = {"samsp": 0.2, "owl": 0.08}


@dataclass(frozen=True)
class AllocateSparsity(SelectivePass):
    """Note sensitivities for the pruning pass that follows.

    Args:
        method: ``"owl"`` or ``"samsp"``. Default ``"owl"``.
        spread: SAMSP: half the distance between the least and the most sparse weight. OWL: λ, a quarter of
            it at most. Default 0.2 (an implementation of SAMSP) or 0.08 (the OWL authors' code).
        outlier: OWL: scores above this many times the block's mean are outliers. Default 3 (authors' code).
        lowest, highest: Bounds of a weight's sparsity; the others make up for what they cut off. Default 0
            and 0.99.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range, no pruning pass without a pattern follows, or its sparsity
            lies outside the bounds.

    Example:
        >>> AllocateSparsity(method="samsp").needs_calibration
        True
    """

    method: Literal["owl", "samsp"] = "owl"
    spread: float | None = None
    outlier: float = 3.0
    lowest: float = 0.0
    highest: float = 0.99

    name: ClassVar[str] = "allocate-sparsity"
    summary: ClassVar[str] = "Measure sensitivities, so that pruning spares the layers it would hurt most."
    source: ClassVar[str] = (
        "Shao et al., 2023 (SAMSP, arXiv:2310.09499); Yin et al., 2023 (OWL, arXiv:2310.05175)"
    )
    provides: ClassVar[frozenset[str]] = frozenset({"sparsity-allocation"})
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"sparse-weights", "quantized-weights", "sparsity-allocation", "low-rank"}
    )
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in _SPREADS:
            raise RecipeError(f"{self.name}: method={self.method!r}, expected 'owl' or 'samsp'.")
        for option, low, high in (("spread", 0, 1), ("outlier", 0, float("inf"))):
            value = getattr(self, option)
            if option == "spread" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
                raise RecipeError(
                    f"{self.name}: {option}={value!r}, expected a number between {low} and {high}."
                )
        numbers = all(type(bound) in (int, float) for bound in (self.lowest, self.highest))
        if not numbers or not 0 <= self.lowest < self.highest < 1:
            raise RecipeError(
                f"{self.name}: lowest={self.lowest!r}, highest={self.highest!r}, expected"
                " 0 <= lowest < highest < 1."
            )

    def check_later(self, later: Sequence[Pass]) -> None:
        """See :meth:`Pass.check_later`."""
        pruning = [item for item in later if isinstance(item, PruningPass)]
        if not pruning:
            raise RecipeError(f"{self.name}: no pruning pass follows.", fix="add one, e.g. wanda.")
        for item in pruning:
            if item.pattern:
                raise RecipeError(
                    f"{self.name}: {item.name} makes every layer {item.pattern}; nothing can be divided.",
                    fix="leave the pattern or this pass out.",
                )
            if not self.lowest <= item.sparsity <= self.highest:
                raise RecipeError(
                    f"{self.name}: {item.name} asks for a mean sparsity of {item.sparsity:g}, which cannot be"
                    f" met with weights between {self.lowest:g} and {self.highest:g}.",
                    fix="widen the bounds, or change the sparsity.",
                )

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetSensitivity` or a :class:`Refuse` for every weight of the block."""
        self.check_patterns(block.program)
        chosen = []
        for candidate in candidates(block):
            reason = self._unsuitable(block, candidate)
            if reason is None:
                chosen.append(candidate)
            else:
                yield Refuse(candidate.name, reason)
        found = diagonal_moments(block, chosen)
        values = self._values(block, [c for c in chosen if c.name in found], found)
        spread = _SPREADS[self.method] if self.spread is None else float(self.spread)
        bounds = (float(self.lowest), float(self.highest))
        for candidate in chosen:
            name = candidate.name
            if name in values:
                reason = f"{self.method} sensitivity {values[name]:.4g}"
                yield SetSensitivity(name, self.method, values[name], spread, bounds, reason)
            else:
                yield Refuse(name, "no calibration token reaches it")

    def _values(
        self, block: BlockContext, chosen: Sequence[Candidate], found: dict[str, Moments]
    ) -> dict[str, float]:
        if self.method == "samsp":
            return {c.name: 2 * float(found[c.name].second.double().mean()) for c in chosen}
        scores = [
            wanda_scores(c.primary, block.weight(c.name).detach(), found[c.name].second).flatten()
            for c in chosen
        ]
        share = outlier_share(scores, float(self.outlier)) if scores else 0.0
        return {c.name: share for c in chosen}

    def _unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        reason = self.unselected(block.program, candidate.name)
        if reason is not None:
            return reason
        if candidate.role is not Role.MATRIX:
            return f"{candidate.role.value}: not pruned"
        if candidate.primary.kind is SiteKind.OTHER:
            return candidate.primary.reason or "no use of it is a product"
        return unsupported(candidate.primary)


def outlier_share(scores: Sequence[Tensor], times: float) -> float:
    """Percentage of all scores that exceed ``times`` their mean."""
    count = sum(part.numel() for part in scores)
    mean = sum(float(part.double().sum()) for part in scores) / count
    return 100 * sum(int((part > times * mean).sum()) for part in scores) / count
