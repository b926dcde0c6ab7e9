"""Cut the least important units out of a model: channels, attention heads, experts.

    y = f(W₁ x + b),  z = W₂ y   →   rows of W₁ and b, columns of W₂ removed

A unit is whatever must go together (:mod:`fxcompress.analysis.channel_group`): a hidden channel of a
feed-forward layer with its rows and columns, or an attention head with the queries that share its keys and
values. The cut computes what masking the units computes; that is proven. What remains is a smaller model of
the same kind, faster everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.edits import KeepUnits, Refuse, StructuralEdit
from fxcompress.errors import RecipeError
from fxcompress.pass_base import ModelContext, StructuralPass
from fxcompress.passes._selection import SelectivePass
from fxcompress.passes._unit_importance import IMPORTANCE

__all__ = ["PruneChannels"]


@dataclass(frozen=True)
class PruneChannels(SelectivePass, StructuralPass):
    """Cut a share of the units of every channel group.

    Args:
        amount: Share of the units of each group to cut, above 0 and below 1. Default 0.25.
        importance: What a unit is kept for. ``"l1"`` (default) and ``"l2"``: the magnitude of the weights
            that compute and read it.
        granularity: Kinds of units to cut. Default ``("channels",)``; also ``"heads"``, ``"experts"``.
        round_to: The number of units kept is a multiple of this, rounded up; kernels like multiples of 8 to
            64. Default 1.
        include, exclude: Patterns of parameter names, see :class:`SelectivePass`. A group is cut when one of
            its parameters is included and none excluded.

    Raises:
        RecipeError: an option is out of range; every group is protected or frozen; ``round_to`` is larger
            than every group.

    Example:
        >>> PruneChannels(amount=0.5, round_to=8).kept_units(100)
        56
    """

    amount: float = 0.25
    importance: str = "l1"
    granularity: tuple[Literal["channels", "heads", "experts"], ...] = ("channels",)
    round_to: int = 1

    name: ClassVar[str] = "prune-channels"
    summary: ClassVar[str] = "Cut the least important channels, heads or experts out of the model."
    source: ClassVar[str] = (
        "Li et al., 2017 (arXiv:1608.08710), section 3;"
        " groups as in Fang et al., 2023 (DepGraph, arXiv:2301.12900)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        amount = self.amount
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < 1:
            raise RecipeError(f"{self.name}: amount={amount!r}, expected a share above 0 and below 1.")
        if self.importance not in IMPORTANCE:
            raise RecipeError(
                f"{self.name}: importance={self.importance!r}, expected {', '.join(map(repr, IMPORTANCE))}."
            )
        kinds = ("channels", "heads", "experts")
        if not self.granularity or not set(self.granularity) <= set(kinds):
            raise RecipeError(
                f"{self.name}: granularity={self.granularity!r},"
                f" expected some of {', '.join(map(repr, kinds))}."
            )
        if type(self.round_to) is not int or self.round_to < 1:
            raise RecipeError(f"{self.name}: round_to={self.round_to!r}, expected a positive integer.")

    def kept_units(self, units: int) -> int:
        """How many of ``units`` stay."""
        wanted = max(1, round(units * (1 - self.amount)))
        return min(units, -(-wanted // self.round_to) * self.round_to)

    def choose(self, model: ModelContext) -> Iterator[StructuralEdit | Refuse]:
        """Decide for each group by itself."""
        self.check_patterns(model.program)
        chosen, refused = self.selected(model)
        yield from refused
        self._check_some(chosen, refused)
        for group in chosen:
            scores = IMPORTANCE[self.importance](model, group)
            count = self.kept_units(group.units)
            if self.round_to > group.units:
                yield Refuse(
                    _anchor(group), f"round_to={self.round_to} exceeds its {group.units} {group.kind}"
                )
            elif count == group.units:
                yield Refuse(
                    _anchor(group), f"too few {group.kind} to cut {self.amount:.0%} of {group.units}"
                )
            else:
                yield keep(group, best(scores, count), f"{self.importance}")

    def selected(self, model: ModelContext) -> tuple[list[ChannelGroup], list[Refuse]]:
        """Groups that may be cut, and a refusal for each of the others."""
        chosen, refused = [], []
        for group in model.groups.values():
            reason = self._protected(model, group)
            if reason:
                refused.append(Refuse(_anchor(group), reason))
            else:
                chosen.append(group)
        return chosen, refused

    def _protected(self, model: ModelContext, group: ChannelGroup) -> str:
        """Why a group is left alone; empty when it is not."""
        if group.frozen:
            return f"its {group.kind} cannot be cut: {group.frozen}"
        if group.kind not in self.granularity:
            return f"granularity leaves {group.kind} alone"
        reasons = {member.name: self.unselected(model.program, member.name) for member in group.members}
        for name, reason in reasons.items():
            if reason is not None and reason.startswith("excluded"):
                return f"{name} is {reason}"
        if all(reason is not None for reason in reasons.values()):
            return next(reason for reason in reasons.values() if reason is not None)
        return ""

    def _check_some(self, chosen: Sequence[ChannelGroup], refused: Sequence[Refuse]) -> None:
        if not chosen:
            first = f" {refused[0].name}: {refused[0].reason}." if refused else ""
            raise RecipeError(
                f"{self.name}: none of {len(refused)} channel groups can be cut.{first}",
                fix="check granularity, include and exclude.",
            )
        largest = max(group.units for group in chosen)
        if self.round_to > largest:
            raise RecipeError(
                f"{self.name}: round_to={self.round_to} is larger than every group (at most {largest}).",
                fix=f"use a multiple up to {largest}.",
            )


def best(scores: Tensor, count: int) -> Tensor:
    """Indices ``[count]`` of the highest scores, ascending; of equal ones the first are taken."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


def keep(group: ChannelGroup, kept: Tensor, by: str) -> KeepUnits:
    """The edit that keeps some units of a group."""
    return KeepUnits(group.name, kept, f"{kept.numel()} of {group.units} {group.kind} kept by {by}")


def _anchor(group: ChannelGroup) -> str:
    return group.name.rpartition(":")[0]
