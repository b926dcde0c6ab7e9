"""What passes share that move scales between a value and the matrices that read it.

A pass of this kind chooses one scale per channel of each group (:mod:`fxcompress.analysis.smoothing`);
finding, selecting, rounding and applying is the same for all of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site
from fxcompress.analysis.sites import find_sites
from fxcompress.analysis.smoothing import SmoothingAnalysis, SmoothingGroup, find_smoothing_groups
from fxcompress.analysis.smoothing_explicit import explicit_groups
from fxcompress.edits import Edit, Refuse
from fxcompress.errors import FormatError, RecipeError, WeightError
from fxcompress.formats import IntFormat
from fxcompress.pass_base import BlockContext, Pass, Statistics
from fxcompress.passes._inside import nodes_inside
from fxcompress.passes._output_error import OutputError, Samples, Target, sample_rows
from fxcompress.passes._selection import SelectivePass, describe, find_heads

BALANCED = frozenset({"smoothed", "awq-scaled", "outliers-suppressed"})
"""What passes of this kind provide; after one of them another would undo it."""


@dataclass(frozen=True, eq=False)
class Work:
    """One group with what was measured at its sites.

    Args:
        group: The group.
        block: The block.
        statistics: Of the sites' inputs, by the name of the input.
        error: Output error as a function of the scale; None when the pass does not search.
    """

    group: SmoothingGroup
    block: BlockContext
    statistics: Mapping[str, Statistics]
    error: OutputError | None = None

    @property
    def seen(self) -> dict[str, Statistics]:
        """Statistics of the inputs that calibration tokens reached."""
        return {name: found for name, found in self.statistics.items() if found.count}


@dataclass(frozen=True)
class BalancingPass(SelectivePass):
    """A pass that scales channels.

    Args:
        fold_linear: Also scale between two matrices (value → output, up → down). Default True.
        heads: Also scale groups that feed nothing but output heads. Default False: the inputs of output heads
            are not quantized by default.
        exact: Round every scale to the nearest power of two, and keep the scale 1 where even that would round
            a stored weight. The function is then unchanged to the last bit of every weight, in any
            floating-point dtype, and a scale is off by at most √2. False takes scales as they are and rounds
            the scaled weights to their dtype; the pass then does not promise an unchanged function.
        explicit: Where nothing can absorb a scale, divide the input at run time: one product per token, for
            linear sites only. Default False.
    """

    fold_linear: bool = field(default=True, kw_only=True)
    heads: bool = field(default=False, kw_only=True)
    exact: bool = field(default=True, kw_only=True)
    explicit: bool = field(default=False, kw_only=True)

    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"quantized-weights", "quantized-activations", "reordered-channels", "low-rank"}
    )
    needs_calibration: ClassVar[bool] = True
    preserves_function: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("fold_linear", "heads", "exact", "explicit"):
            if not isinstance(getattr(self, option), bool):
                raise RecipeError(f"{self.name}: {option}={getattr(self, option)!r}, expected true or false.")
        # Rounding in the weights' dtype is a change; an instance may say so, the class cannot.
        object.__setattr__(self, "preserves_function", self.exact)

    @property
    def search(self) -> tuple[Target, int] | None:
        """The quantization to search for and the number of tokens to search on; None: no search."""
        return None

    @abstractmethod
    def choose(self, work: Work) -> tuple[Tensor, str] | str:
        """The scale ``[C]`` float64 of one group and a few words on it, or why there is none."""

    def check_later(self, later: Sequence[Pass]) -> None:
        """See :meth:`Pass.check_later`: a search is for the number formats that follow."""
        if self.search is not None:
            check_target(self.name, self.search[0], later)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield the changed tensors of every group of the block, and a :class:`Refuse` for other sites."""
        self.check_patterns(block.program)
        groups, refused = self.groups(block)
        statistics = block.statistics([site for group in groups for site in group.sites]) if groups else {}
        samples: Samples = {}
        if self.search is not None and groups:
            sites = [site for group in groups for site in group.sites]
            samples = sample_rows(block, sites, self.search[1])
        for group in self.ordered(block, groups):
            error = (
                None
                if self.search is None
                else OutputError(group, block, samples, statistics, self.search[0])
            )
            reason = yield from self.balance(Work(group, block, statistics, error))
            if reason is not None:
                refused.update(dict.fromkeys(group.site_names, reason))
        for name, why in refused.items():
            yield Refuse(name, why)

    def ordered(self, block: BlockContext, groups: list[SmoothingGroup]) -> list[SmoothingGroup]:
        """The order in which groups are balanced."""
        return groups

    def balance(self, work: Work) -> Generator[Edit, None, str | None]:
        """Yield the edits of one group; returns why there are none."""
        refusal = self.unsuitable(work)
        if refusal is not None:
            return refusal
        chosen = self.choose(work)
        if isinstance(chosen, str):
            return chosen
        group, block = work.group, work.block
        scale, words = chosen
        if self.exact:
            rounded = rounded_scale(scale)
            scale = group.without_rounding(rounded, block.weight)
            if bool((scale == 1).all()) and not bool((rounded == 1).all()):
                return f"{group.name}: any scale but 1 would round a stored weight (exact=True)"
        if bool((scale == 1).all()):
            return "nothing to move: every scale is 1"
        moved = int((scale != 1).sum())
        where = "at run time" if not group.producers else f"with {group.name}"
        span = f"{float(scale.min()):.3g}…{float(scale.max()):.3g}"
        reason = f"scaled {where}: {moved} of {group.channels} channels, {span}, {words}"
        try:
            yield from group.edits(scale, block.weight, reason)
        except WeightError as error:
            return str(error)
        return None

    def unsuitable(self, work: Work) -> str | None:
        """Why a group cannot be balanced now."""
        if not any(consumer.input_name in work.seen for consumer in work.group.consumers):
            return "no calibration token reaches it"
        name = work.group.name
        if work.group.producers and work.block.state.form(name).bias is not None:
            return f"{name}: its bias has moved into its form, where it would not be scaled along"
        return None

    def rounded(self, scale: Tensor) -> Tensor:
        """The scale that will be used for a wanted one, so that a search judges what it will get."""
        return rounded_scale(scale) if self.exact else scale

    def groups(self, block: BlockContext) -> tuple[list[SmoothingGroup], dict[str, str]]:
        """The groups of a block to scale, and for every other product with an activation the reason."""
        analysis, sites = _analyze(block, self.fold_linear)
        refused = {site.name: reason for site, reason in reversed(analysis.refused)}
        groups = self._select(block, analysis.groups, refused)
        if self.explicit:
            left = {site for site, _ in analysis.refused}
            more, why = explicit_groups(block.program, sites, left)
            for site, reason in why.items():
                refused[site.name] = f"{refused[site.name]}; {reason}"
            groups += self._select(block, more, refused)
        return groups, refused

    def _select(
        self, block: BlockContext, groups: Sequence[SmoothingGroup], refused: dict[str, str]
    ) -> list[SmoothingGroup]:
        """Groups to scale; of several that scale the same input channels, the first is enough."""
        heads = frozenset() if self.heads else find_heads(block.program, find_sites(block.program))
        taken: list[SmoothingGroup] = []
        for group in groups:
            reason = self._unselected_member(block, group)
            if reason is None and heads.issuperset(group.site_names):
                reason = "output head: its input stays unquantized (heads=False)"
            if reason is not None:
                for name in group.site_names:
                    refused.setdefault(name, reason)
            elif not any(_overlap(group, other) for other in taken):
                taken.append(group)
        for group in taken:
            for name in group.site_names:
                refused.pop(name, None)
        return taken

    def _unselected_member(self, block: BlockContext, group: SmoothingGroup) -> str | None:
        """Why the patterns leave a group out: include speaks of the sites, exclude of every parameter."""
        without_include = replace(self, include=())
        for parameter in group.parameters:
            chooser = without_include if parameter.producer else self
            reason = chooser.unselected(block.program, parameter.name)
            if reason is not None:
                return f"{parameter.name} {'is ' if reason.startswith('excluded') else ''}{reason}"
        return None


def rounded_scale(scale: Tensor) -> Tensor:
    """The nearest powers of two."""
    return torch.exp2(scale.log2().round())


def make_target(
    name: str, bits: int, group_size: int, symmetric: bool, activation: tuple[str, int] | None
) -> Target:
    """The target of a pass's options.

    Raises:
        FormatError, RecipeError: an option is out of range.
    """
    try:
        weights = IntFormat(bits=bits, symmetric=symmetric, group_size=group_size)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None
    if activation is None:
        return Target(weights, None)
    mode, width = activation
    if mode not in ("dynamic", "static") or type(width) is not int or not 2 <= width <= 8:
        raise RecipeError(
            f"{name}: activations of {width!r} bits, {mode!r}; expected 2…8 bits, 'dynamic' or 'static'."
        )
    return Target(weights, width, mode == "static")


def check_target(name: str, target: Target, later: Sequence[Pass]) -> None:
    """Refuse a recipe that goes on with other number formats than a search was told.

    Raises:
        RecipeError: naming the first pass that differs; a recipe without known formats is accepted.
    """
    check_weight_format(name, target.weights, later)
    inputs = [(item.name, found) for item in later if (found := item.activation_format()) is not None]
    wanted = ("static" if target.static else "dynamic", target.activation_bits)
    if inputs and all(found != wanted for _, found in inputs):
        prepared = (
            "inputs that stay as they are" if wanted[1] is None else f"{wanted[0]} {wanted[1]}-bit inputs"
        )
        raise RecipeError(
            f"{name} prepares for {prepared}, but {inputs[0][0]!r} makes them"
            f" {inputs[0][1][0]} {inputs[0][1][1]}-bit.",
            fix="give both the same activation options.",
        )


def check_weight_format(name: str, weights: IntFormat, later: Sequence[Pass]) -> None:
    """Refuse a recipe in which no later pass gives matrices the format that was prepared for.

    Raises:
        RecipeError: naming the first pass that gives another; a recipe without known formats is accepted.
    """
    formats = [(item.name, fmt) for item in later if (fmt := item.matrix_format()) is not None]
    if formats and all(fmt != weights for _, fmt in formats):
        raise RecipeError(
            f"{name} prepares weights for {describe(weights)}, but {formats[0][0]!r} makes them"
            f" {describe(formats[0][1])}.",
            fix=f"give both the same bits, group_size and symmetric; {name} takes"
            f" bits={formats[0][1].bits}, group_size={formats[0][1].group_size},"
            f" symmetric={str(formats[0][1].symmetric).lower()}.",
        )


def _analyze(block: BlockContext, fold_linear: bool) -> tuple[SmoothingAnalysis, list[Site]]:
    """Groups that lie wholly inside the block (producer, path, all sites), and the sites of the program."""
    program = block.program
    mine = {site.node for site in block.sites}
    others = [site for site in find_sites(program) if site.node not in mine]
    inside = nodes_inside(block) - {site.node for site in others}
    sites = [*block.sites, *others]
    return find_smoothing_groups(program, sites, inside, fold_linear=fold_linear), sites


def _overlap(one: SmoothingGroup, two: SmoothingGroup) -> bool:
    """Whether two groups scale the same input channel of a site."""
    held = {consumer.site: consumer.columns for consumer in one.consumers}
    return any(
        bool(((held[consumer.site] >= 0) & (consumer.columns >= 0)).any())
        for consumer in two.consumers
        if consumer.site in held
    )
