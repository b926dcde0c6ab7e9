"""What passes that replace a weight by two thin factors share: options, ranks, refusals and edits."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.analysis.sites import find_sites
from fxcompress.edits import Edit, Refuse, SetWeight
from fxcompress.errors import RecipeError
from fxcompress.forms import LowRank, WeightLayout
from fxcompress.pass_base import BlockContext, SurveyContext
from fxcompress.passes._input_rows import arguments
from fxcompress.passes._low_rank_solver import Decomposition, decompose, relative_loss
from fxcompress.passes._moments import linear_grams, moments, stages
from fxcompress.passes._rank import (
    Spectrum,
    aligned,
    allocate_ranks,
    break_even,
    budget_rank,
    energy_rank,
)
from fxcompress.passes._selection import Candidate, Role, SelectivePass, candidates

_KEEP = 0.8


@dataclass(frozen=True, eq=False)
class Metric:
    """How errors of one weight are weighed.

    Args:
        root: ``[K, K]``, ``[K]``, or None for plain squares; see :func:`decompose`.
        gram: ``[K, K]`` to report output errors with, or None for errors of the weight itself.
    """

    root: Tensor | None
    gram: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Survey:
    """What a pass found out about the whole model.

    Args:
        known: For its metrics, by parameter.
        ranks: Rank by parameter (None: it stays whole) when they are shared out over the model, else None.
    """

    known: Mapping[str, Tensor]
    ranks: Mapping[str, int | None] | None


@dataclass(frozen=True)
class LowRankPass(SelectivePass):
    """Options of every pass that factors weights.

    Args:
        keep: Share of a weight's numbers that its factors may hold: rank ``⌊keep·N·K/(N + K)⌋``. Default 0.8
            unless ``rank`` or ``energy`` is given (only one of the three can be).
        rank: The same rank for every weight. Default None.
        energy: Least rank whose squared singular values (in the metric of the method) reach this share of
            their sum, in (0, 1]. Default None.
        budget: ``"layer"``: every weight keeps ``keep`` of its numbers. ``"global"``: all weights together
            do; ranks are allocated to lose least, the sum of relative squared errors. Default ``"layer"``.
            (``"search"`` is for passes that say so.)
        multiple: Ranks from ``keep`` are rounded down, those from ``energy`` up to a multiple of this, which
            kernels like. Default 8.
        heads: Factor untied output heads too. Default False.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range, or no weight allows the rank.
    """

    keep: float | None = field(default=None, kw_only=True)
    rank: int | None = field(default=None, kw_only=True)
    energy: float | None = field(default=None, kw_only=True)
    budget: Literal["layer", "global", "search"] = field(default="layer", kw_only=True)
    multiple: int = field(default=8, kw_only=True)
    heads: bool = field(default=False, kw_only=True)

    provides: ClassVar[frozenset[str]] = frozenset({"low-rank"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "sparse-weights"})
    budgets: ClassVar[tuple[str, ...]] = ("layer", "global")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [option for option in ("keep", "rank", "energy") if getattr(self, option) is not None]
        if len(given) > 1:
            raise RecipeError(f"{self.name}: {' and '.join(given)} are given.", fix="give one of them.")
        check_share(self.name, "keep", self.keep, open_end=True)
        check_share(self.name, "energy", self.energy, open_end=False)
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise RecipeError(f"{self.name}: rank={self.rank!r}, expected a positive integer.")
        if type(self.multiple) is not int or self.multiple < 1:
            raise RecipeError(f"{self.name}: multiple={self.multiple!r}, expected a positive integer.")
        if self.budget not in self.budgets:
            expected = " or ".join(map(repr, self.budgets))
            raise RecipeError(f"{self.name}: budget={self.budget!r}, expected {expected}.")
        if self.budget != "layer" and given not in ([], ["keep"]):
            raise RecipeError(
                f"{self.name}: budget={self.budget!r} shares out all parameters, but {given[0]} is given.",
                fix="give keep instead.",
            )
        if not isinstance(self.heads, bool):
            raise RecipeError(f"{self.name}: heads={self.heads!r}, expected true or false.")

    @property
    def share(self) -> float:
        """Share of the numbers to keep."""
        return _KEEP if self.keep is None else self.keep

    @abstractmethod
    def metrics(
        self, block: BlockContext, stage: Sequence[Candidate], known: Mapping[str, Tensor]
    ) -> Mapping[str, Metric | str]:
        """The metric of every candidate of a stage, or why it has none; ``known`` comes from :meth:`look`."""

    def look(self, model: SurveyContext) -> Mapping[str, Tensor]:
        """What the metrics need to know of the whole model, by parameter."""
        return {}

    def survey(self, model: SurveyContext) -> Survey:
        """What the metrics need, and the ranks when they are shared out over the model."""
        known = self.look(model)
        try:
            ranks = None if self.budget == "layer" else self.allocation(model, known)
        except RecipeError as error:
            raise RecipeError(f"{self.name}: {error}") from error
        return Survey(known, ranks)

    def allocation(self, model: SurveyContext, known: Mapping[str, Tensor]) -> Mapping[str, int | None]:
        """Ranks under a global budget, from the spectra of all weights."""
        spectra = {
            candidate.name: Spectrum(len(found.weight), found.weight.shape[1], found.values)
            for _, candidate, found in self.decompositions(model, known)
        }
        return allocate_ranks(spectra, self.share, self.multiple)

    def decompositions(
        self, model: SurveyContext, known: Mapping[str, Tensor]
    ) -> Iterator[tuple[BlockContext, Candidate, Decomposition]]:
        """Every weight the pass can factor, as the passes before left the model."""
        for block in model.blocks():
            for stage in self.stages(block, self.chosen(block)):
                metrics = self.metrics(block, stage, known)
                for candidate in stage:
                    metric = metrics[candidate.name]
                    if isinstance(metric, Metric):
                        yield block, candidate, decompose(self.matrix(block, candidate), metric.root)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetWeight` or a :class:`Refuse` for every weight of the block."""
        self.check_patterns(block.program)
        if block.index == 0:
            self._check_rank(block)
        chosen = []
        for candidate in candidates(block):
            reason = self.unsuitable(block, candidate)
            if reason is None:
                chosen.append(candidate)
            else:
                yield Refuse(candidate.name, reason)
        for stage in self.stages(block, chosen):
            metrics = self.metrics(block, stage, block.survey.known)
            for candidate in stage:
                yield self._edit(block, candidate, metrics[candidate.name])

    def chosen(self, block: BlockContext) -> list[Candidate]:
        """The weights of a block that the pass takes."""
        return [c for c in candidates(block) if self.unsuitable(block, c) is None]

    def stages(self, block: BlockContext, chosen: Sequence[Candidate]) -> list[list[Candidate]]:
        """Weights whose metrics are asked for together, earlier ones being compressed; all at once here."""
        return [list(chosen)] if chosen else []

    def unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        """Why the pass leaves a weight alone."""
        reason = self.unselected(block.program, candidate.name)
        if reason is not None:
            return reason
        if candidate.role is Role.EMBEDDING:
            return "embedding: a look-up needs whole rows"
        if candidate.role is Role.HEAD and not self.heads:
            return "output head: its error reaches the output directly (heads=False)"
        return no_factors(candidate.primary)

    def matrix(self, block: BlockContext, candidate: Candidate) -> Tensor:
        """The weight as ``[N, K]``."""
        return candidate.primary.layout.to_matrix(block.weight(candidate.name).detach())[0]

    def choose_rank(self, block: BlockContext, name: str, found: Decomposition) -> int | str:
        """The rank of a weight, or why it has none."""
        rows, columns = found.weight.shape
        small = min(rows, columns)
        if self.budget != "layer":
            allotted: int | None = block.survey.ranks.get(name)
            if allotted is None:
                return "the allocation leaves it whole: other weights lose less"
            rank = allotted
        elif self.rank is not None:
            rank = self.rank
            if rank > small:
                return f"rank {rank} is above what a {rows} × {columns} matrix has"
        elif self.energy is not None:
            rank = min(aligned(energy_rank(found.values, self.energy), self.multiple, up=True), small)
        else:
            rank = aligned(budget_rank(rows, columns, self.share), self.multiple, up=False)
        if rank < 1:
            return f"keep={self.share:g} of {rows} × {columns} numbers does not pay for rank 1"
        if rank >= break_even(rows, columns):
            return (
                f"rank {rank} neither shrinks nor speeds it up: factors of {rows} × {columns} do below"
                f" {break_even(rows, columns)}"
            )
        return rank

    def refined(self, block: BlockContext, candidate: Candidate, u: Tensor, v: Tensor) -> Tensor:
        """The left factor once the right one is fixed; unchanged unless a method fits it again."""
        return u

    def _edit(self, block: BlockContext, candidate: Candidate, metric: Metric | str) -> Edit:
        name = candidate.name
        if isinstance(metric, str):
            return Refuse(name, metric)
        dtype = block.weight(name).dtype
        found = decompose(self.matrix(block, candidate), metric.root)
        rank = self.choose_rank(block, name, found)
        if isinstance(rank, str):
            return Refuse(name, rank)
        u, v = found.factors(rank)
        u = self.refined(block, candidate, u, v)
        u, v = u.to(dtype), v.to(dtype)
        return low_rank_edit(name, candidate.primary.layout, found.weight, u, v, metric.gram)

    def _check_rank(self, block: BlockContext) -> None:
        """A rank that no weight of the model allows is a mistake, not a reason to leave all alone."""
        sizes = [
            min(site.layout.matrix_shape[1:])
            for site in find_sites(block.program)
            if no_factors(site) is None
        ]
        if self.rank is not None and sizes and self.rank > max(sizes):
            raise RecipeError(
                f"{self.name}: rank={self.rank} is above the smaller side of every weight (at most"
                f" {max(sizes)}).",
                fix=f"use a rank below {max(sizes)}.",
            )


def low_rank_edit(
    name: str, layout: WeightLayout, weight: Tensor, u: Tensor, v: Tensor, gram: Tensor | None
) -> SetWeight:
    """The edit that replaces ``weight: [N, K]`` by ``u·v``."""
    rows, columns = weight.shape
    rank = u.shape[1]
    error = relative_loss(weight, u.double() @ v.double(), gram)
    share = rank * (rows + columns) / (rows * columns)
    what = "weight" if gram is None else "output"
    reason = f"rank {rank} of {min(rows, columns)}, {share:.0%} of its numbers, {what} error {error:.2%}"
    return SetWeight(name, (LowRank.of(layout, u, v),), reason=reason, error=None if gram is None else error)


def no_factors(site: Site) -> str | None:
    """Why two products cannot stand for the use of a weight, or None."""
    if site.kind is SiteKind.OTHER or site.input is None:
        return site.reason or "it is not multiplied with an activation"
    if site.kind is SiteKind.LINEAR and site.layout.batch_dims == 0 and len(site.layout.shape) == 2:
        return None
    if site.kind is SiteKind.CONV:
        if int(arguments(site.node)["groups"]) != 1:
            return "grouped convolution: its groups are matrices of their own"
        plain = site.layout.perm == tuple(range(len(site.layout.shape)))
        return None if plain else "a convolution whose kernel is stored in another order"
    kinds = {
        SiteKind.EXPERTS: "a grouped product over experts is no pair of linear layers",
        SiteKind.BATCHED: "a batch of matrices is no pair of linear layers",
        SiteKind.CONV_TRANSPOSED: "a transposed convolution is no pair of convolutions",
        SiteKind.EMBEDDING: "embedding: a look-up needs whole rows",
    }
    return kinds.get(site.kind, f"{site.kind.value}: no pair of products stands for it")


def input_grams(block: BlockContext, stage: Sequence[Candidate]) -> dict[str, Tensor | str]:
    """``E[x xᵀ]: [K, K]`` of what every weight multiplies, or why there is none."""
    grams = linear_grams(block, stage)
    found: dict[str, Tensor | str] = {}
    for candidate in stage:
        if candidate.primary.kind is SiteKind.LINEAR:
            gram = grams.get(candidate.name)
        else:
            gram = moments(block, candidate, range(1))
        found[candidate.name] = "no calibration token reaches it" if gram is None else gram[0]
    return found


def input_order(chosen: Sequence[Candidate], sequential: str) -> list[list[Candidate]]:
    """``"stage"``: weights with one input together, in graph order; ``"block"``: all at once."""
    if sequential == "stage":
        return stages(chosen)
    return [list(chosen)] if chosen else []


def check_number(pass_name: str, option: str, value: object, low: float, high: float) -> None:
    """Refuse what is no number ``low…high``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        end = f"…{high:g}" if math.isfinite(high) else " or more"
        raise RecipeError(f"{pass_name}: {option}={value!r}, expected a number {low:g}{end}.")


def check_share(pass_name: str, option: str, value: object, *, open_end: bool) -> None:
    """Refuse a share outside (0, 1), or (0, 1] unless ``open_end``; None passes."""
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not 0 < value <= 1 or (open_end and value == 1):  # type: ignore[operator]
        end = "below 1" if open_end else "up to 1"
        raise RecipeError(f"{pass_name}: {option}={value!r}, expected a number above 0 and {end}.")
