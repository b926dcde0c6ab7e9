"""How many units each channel group keeps: a share of something the model costs, spread over the groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.errors import RecipeError
from fxcompress.pass_base import ModelContext
from fxcompress.structure.cost import Cost

__all__ = ["TARGETS", "Budget", "Target"]

Target = Literal["units", "block-parameters", "parameters", "flops", "memory", "latency"]
Counts = dict[str, int]

_OF_COST: Mapping[str, Callable[[Cost], float]] = {
    "block-parameters": lambda cost: cost.block_parameters,
    "parameters": lambda cost: cost.parameters,
    "flops": lambda cost: cost.flops,
    "memory": lambda cost: cost.bytes,
}
TARGETS = ("units", *_OF_COST, "latency")
"""What an amount can be a share of."""


@dataclass(frozen=True)
class Budget:
    """What to take away.

    Args:
        amount: Share to take in all rounds together.
        target: What of, see :data:`TARGETS`.
        everywhere: Every group loses the same share of its units; else units of all groups compete.
        round_to: Units kept are a multiple of this, rounded up.
        max_amount: No group loses more than this share of its units.
        rounds: Number of rounds; each takes an equal part of what the model has before the first.
        tokens: Of a call, for latency.
        balance: Operations per byte, for latency.
        name: Of the pass, for messages.
    """

    amount: float
    target: str
    everywhere: bool
    round_to: int
    max_amount: float
    rounds: int
    tokens: int
    balance: float
    name: str

    def counts(
        self, model: ModelContext, groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor]
    ) -> Counts:
        """Units kept of each group after this round.

        Args:
            model: The model as it is now.
            groups: Those that may lose units.
            scores: ``[units]`` by group, comparable across groups unless all lose the same share.

        Raises:
            RecipeError: so much cannot be taken from these groups; says what can.
        """
        allowed = self._allowed(model)
        if self.target == "units" and self.everywhere:
            for group in groups:
                self._check_reachable(group, 1 - allowed)
            return {group.name: self.kept(group.units, 1 - allowed, group.least) for group in groups}
        at_level, levels = self._same_share(groups) if self.everywhere else self._ranked(groups, scores)
        low, high = 0, levels
        least = self._left(model, groups, at_level(levels))
        if least > allowed + 1e-9:
            done = 1 - least * self._have(model)
            raise RecipeError(
                f"{self.name}: amount={self.amount:g} of {self.target} cannot be taken: the groups that may"
                f" be cut hold too little, at most {max(0.0, done):.3f} can go.",
                fix="lower amount, raise max_amount, or widen granularity, include or the protected blocks.",
            )
        while low < high:
            middle = (low + high) // 2
            if self._left(model, groups, at_level(middle)) <= allowed:
                high = middle
            else:
                low = middle + 1
        return at_level(low)

    def kept(self, units: int, share: float, least: int = 1) -> int:
        """How many of ``units`` stay when a share goes, and ``least`` cannot."""
        wanted = max(round(units * (1 - share)), round(units * (1 - self.max_amount)), least)
        return min(units, -(-wanted // self.round_to) * self.round_to)

    def _check_reachable(self, group: ChannelGroup, share: float) -> None:
        """Refuse a share that would leave fewer experts than the router chooses."""
        wanted = max(round(group.units * (1 - share)), round(group.units * (1 - self.max_amount)), 1)
        if wanted < group.least:
            raise RecipeError(
                f"{self.name}: amount={self.amount:g} of units would leave {wanted} of {group.units}"
                f" {group.kind} in {group.name}, but {group.least} are chosen at once: at most"
                f" {1 - group.least / group.units:.3f} can go.",
                fix="lower amount or max_amount, or exclude this group.",
            )

    def _have(self, model: ModelContext) -> float:
        """What of the model before the first round is still there, as a share."""
        if self.target in _OF_COST:
            of = _OF_COST[self.target]
            return of(model.cost) / of(model.first_cost)
        return 1 - self.amount * model.round / self.rounds

    def _allowed(self, model: ModelContext) -> float:
        """What of the model as it is now may stay, as a share."""
        return (1 - self.amount * (model.round + 1) / self.rounds) / self._have(model)

    def _left(self, model: ModelContext, groups: Sequence[ChannelGroup], counts: Counts) -> float:
        """What of the model as it is now stays, as a share."""
        if self.target == "units":
            return sum(counts.values()) / sum(group.units for group in groups)
        if self.target == "latency":
            whole = model.cut_cost.latency({}, self.tokens, self.balance)
            return model.cut_cost.latency(counts, self.tokens, self.balance) / whole
        of = _OF_COST[self.target]
        return of(model.cut_cost.of(counts)) / of(model.cost)

    def _same_share(self, groups: Sequence[ChannelGroup]) -> tuple[Callable[[int], Counts], int]:
        """Level → counts, and the highest level: the share that goes is ``level / highest``."""
        levels = max(group.units for group in groups)

        def at_level(level: int) -> Counts:
            return {group.name: self.kept(group.units, level / levels, group.least) for group in groups}

        return at_level, levels

    def _ranked(
        self, groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor]
    ) -> tuple[Callable[[int], Counts], int]:
        """Level → counts, and the highest level: the ``level`` units of lowest score go.

        A group that may lose no more keeps the rest, whatever its scores.
        """
        flat = torch.cat([scores[group.name] for group in groups])
        owner = torch.repeat_interleave(
            torch.arange(len(groups)), torch.tensor([group.units for group in groups])
        )
        owner = owner[torch.argsort(flat, stable=True)]

        def at_level(level: int) -> Counts:
            gone = torch.bincount(owner[:level], minlength=len(groups)).tolist()
            return {
                group.name: self.kept(group.units, less / group.units, group.least)
                for group, less in zip(groups, gone, strict=True)
            }

        return at_level, int(flat.numel())
