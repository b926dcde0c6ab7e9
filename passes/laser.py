"""Remove the small singular values of a few matrices, where that makes the model better.

    w  →  its best approximation of a lower rank, dense (or two factors)

Sharma, Ash & Misra, 2023, "The Truth is in There: Improving Reasoning in Language Models with Layer-Selective
Rank Reduction" (LASER, arXiv:2312.13558). Which matrix and how much is found by trying on validation
data: the calibration data must be like the task. It is no compression by itself: the result is dense
unless ``factored``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.edits import Edit, Refuse, SetTensor
from fxcompress.errors import RecipeError
from fxcompress.pass_base import BlockContext, ModelFunction, SurveyContext
from fxcompress.passes._low_rank import check_number, check_share, low_rank_edit, no_factors
from fxcompress.passes._low_rank_solver import Decomposition, decompose
from fxcompress.passes._rank import break_even
from fxcompress.passes._selection import Candidate, Role, SelectivePass, candidates


@dataclass(frozen=True)
class Laser(SelectivePass):
    """Reduce the rank of the matrices for which validation data ask.

    Args:
        shares: Shares ρ of the full rank that are tried: rank ``⌊ρ·min(N, K)⌋``, at least 1. With
            ``search="off"`` exactly one. Default 0.55, 0.1, 0.06, 0.02 (the authors' composition: reductions
            of 0.45, 0.9, then by 0.04).
        search: ``"greedy"``: from the last weight to the first, each is reduced further while the loss does
            not rise (the authors' composition). ``"single"``: every weight and share alone; the best pair is
            taken if it lowers the loss. ``"off"``: reduce every selected weight. Default ``"greedy"``.
        tolerance: Loss in nats that a step may add in the greedy search. Default 0.
        factored: Store two factors where that takes less room than the dense matrix. Default False.
        include, exclude: Name patterns, see :class:`SelectivePass`. The paper finds gains in the first
            feed-forward matrices of late layers: naming them shortens the search, which runs the model
            once per weight and share.

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: a search on a model that scores no next tokens.

    Example:
        >>> Laser(search="off", shares=(0.01,), include=("*.26.mlp.fc_in.weight",)).needs_calibration
        False
    """

    shares: tuple[float, ...] = (0.55, 0.1, 0.06, 0.02)
    search: Literal["greedy", "single", "off"] = "greedy"
    tolerance: float = 0.0
    factored: bool = False

    name: ClassVar[str] = "laser"
    summary: ClassVar[str] = "Lower the rank of the few matrices for which validation data ask."
    source: ClassVar[str] = "Sharma et al., 2023 (LASER, arXiv:2312.13558)"
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "low-rank", "sparse-weights"})
    needs_calibration: ClassVar[bool] = True  # unless search="off"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shares", tuple(self.shares))
        for share in self.shares:
            check_share(self.name, "shares", share, open_end=False)
        if self.search not in ("greedy", "single", "off"):
            raise RecipeError(f"{self.name}: search={self.search!r}, expected 'greedy', 'single' or 'off'.")
        if not self.shares or (self.search == "off" and len(self.shares) != 1):
            found = len(self.shares)
            raise RecipeError(
                f"{self.name}: {found} shares with search={self.search!r}.", fix="shares=(0.1,) with 'off'."
            )
        check_number(self.name, "tolerance", self.tolerance, 0, math.inf)
        if not isinstance(self.factored, bool):
            raise RecipeError(f"{self.name}: factored={self.factored!r}, expected true or false.")
        object.__setattr__(self, "needs_calibration", self.search != "off")

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """Factors are provided when they are stored."""
        return frozenset({"low-rank"} if self.factored else ())

    def survey(self, model: SurveyContext) -> Mapping[str, tuple[float, str]]:
        """``{name: (share, reason)}`` of the weights to reduce."""
        if self.search == "off":
            return {}
        found = [(candidate, block) for block in model.blocks() for candidate in self._chosen(block)]
        function = model.function()
        start = _loss(function, {})
        search = self._greedy if self.search == "greedy" else self._single
        return search(function, found, start)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield the reduced weights, and a :class:`Refuse` for every other one."""
        self.check_patterns(block.program)
        chosen: Mapping[str, tuple[float, str]] = block.survey
        for candidate in candidates(block):
            reason = self._unsuitable(block, candidate)
            if reason is None and self.search != "off" and candidate.name not in chosen:
                reason = "no lower rank of it lowers the loss"
            if reason is not None:
                yield Refuse(candidate.name, reason)
                continue
            share, why = chosen.get(candidate.name, (self.shares[0], ""))
            yield self._edit(block, candidate, share, why)

    def _greedy(
        self, function: ModelFunction, found: Sequence[tuple[Candidate, BlockContext]], start: float
    ) -> dict[str, tuple[float, str]]:
        accepted: dict[str, Tensor] = {}
        chosen: dict[str, tuple[float, str]] = {}
        best = start
        for candidate, block in reversed(found):
            weight, parts = _decomposed(block, candidate)
            for share in sorted(self.shares, reverse=True):
                value = _reduced(candidate, weight, parts, share)
                loss = _loss(function, {**accepted, candidate.name: value})
                if not loss <= best + self.tolerance:  # NaN included
                    break
                why = f"loss {best:.4f} → {loss:.4f}"
                best = min(best, loss)
                accepted[candidate.name], chosen[candidate.name] = value, (share, why)
        return chosen

    def _single(
        self, function: ModelFunction, found: Sequence[tuple[Candidate, BlockContext]], start: float
    ) -> dict[str, tuple[float, str]]:
        best: tuple[float, str, float] = (start, "", 1.0)
        for candidate, block in found:
            weight, parts = _decomposed(block, candidate)
            for share in self.shares:
                value = _reduced(candidate, weight, parts, share)
                best = min(best, (_loss(function, {candidate.name: value}), candidate.name, share))
        loss, name, share = best
        return {name: (share, f"loss {start:.4f} → {loss:.4f}")} if name else {}

    def _edit(self, block: BlockContext, candidate: Candidate, share: float, why: str) -> Edit:
        name, layout = candidate.name, candidate.primary.layout
        weight, parts = _decomposed(block, candidate)
        rows, columns = parts.weight.shape
        rank = _rank(share, rows, columns)
        if rank == min(rows, columns):
            return Refuse(name, f"share {share:g} keeps its full rank")
        if self.factored and rank < break_even(rows, columns):
            u, v = (factor.to(weight.dtype) for factor in parts.factors(rank))
            return low_rank_edit(name, layout, parts.weight, u, v, None)
        value = _reduced(candidate, weight, parts, share)
        reason = f"rank {rank} of {min(rows, columns)}, dense{f', {why}' if why else ''}"
        return SetTensor(name, value, reason)

    def _chosen(self, block: BlockContext) -> list[Candidate]:
        return [c for c in candidates(block) if self._unsuitable(block, c) is None]

    def _unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        reason = self.unselected(block.program, candidate.name)
        if reason is None and candidate.role is not Role.MATRIX:
            reason = f"{candidate.role.value}: left whole"
        return reason or no_factors(candidate.primary)


def _decomposed(block: BlockContext, candidate: Candidate) -> tuple[Tensor, Decomposition]:
    weight = block.weight(candidate.name).detach()
    return weight, decompose(candidate.primary.layout.to_matrix(weight)[0])


def _reduced(candidate: Candidate, weight: Tensor, parts: Decomposition, share: float) -> Tensor:
    """The parameter at a lower rank, in its own shape and dtype; itself at full rank."""
    rank = _rank(share, *parts.weight.shape)
    if rank == min(parts.weight.shape) or not float(parts.values[rank:].sum()):
        return weight
    u, v = parts.factors(rank)
    return candidate.primary.layout.from_matrix((u @ v)[None].to(weight.dtype))


def _rank(share: float, rows: int, columns: int) -> int:
    return max(1, math.floor(share * min(rows, columns) + 1e-9))


@torch.no_grad()
def _loss(function: ModelFunction, tensors: Mapping[str, Any]) -> float:
    losses = [float(function.loss(batch, tensors)) for batch in range(function.batches)]
    return sum(losses) / len(losses)
