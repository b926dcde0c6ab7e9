"""Cut the least important units out of a model: channels, attention heads, experts.

    y = f(W₁ x + b),  z = W₂ y   →   rows of W₁ and b, columns of W₂ removed

A unit is whatever must go together (:mod:`fxcompress.analysis.channel_group`): a hidden channel of a
feed-forward layer with its rows and columns, or an attention head with the queries that share its keys and
values. The cut computes what masking the units computes; that is proven. What remains is a smaller model of
the same kind, faster everywhere.

Three decisions are made one after the other: what a unit is worth (:mod:`._unit_importance`), how many of
which group go (:mod:`._pruning_budget`), and how the weights that read them make up for it
(:mod:`._least_squares`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.edits import Edit, KeepUnits, Refuse, StructuralEdit
from fxcompress.errors import RecipeError
from fxcompress.pass_base import BlockContext, ModelContext, StructuralPass
from fxcompress.passes._least_squares import MakeUp
from fxcompress.passes._pruning_budget import TARGETS, Budget, Target
from fxcompress.passes._selection import SelectivePass
from fxcompress.passes._unit_importance import COMBINE, GRADIENTS, IMPORTANCE

__all__ = ["PruneChannels"]

KINDS = ("channels", "heads", "experts")


@dataclass(frozen=True)
class PruneChannels(SelectivePass, StructuralPass):
    """Cut units of channel groups.

    Args:
        amount: Share of the target to cut, above 0 and below 1. Default 0.25.
        target: What ``amount`` is a share of: ``"units"`` (default) of the groups that may be cut;
            ``"block-parameters"``, the parameters of the repeated blocks; ``"parameters"``, ``"flops"`` and
            ``"memory"`` of the whole model; ``"latency"`` as a roofline of products models it.
        importance: What a unit is kept for. Without data: ``"l1"`` (default) and ``"l2"``, the magnitude of
            the weights that compute and read it. From activations: ``"wanda"``, ``"flap"``. From gradients of
            the loss: ``"taylor"``, ``"taylor-vector"``, ``"taylor-second"``, ``"taylor-mixed"``. Those from
            activations judge an expert by the rows that its own matrices are given.
        scope: ``"group"``: every group loses the same share of its units. ``"global"``: units of all groups
            compete. Default: ``"global"`` for FLAP, else ``"group"``.
        standardize: (global) Compare ``(score − mean) / deviation`` within each group. Default: for FLAP.
        combine: (Taylor) How the scores of the weights of a group become one: ``"sum"`` (default),
            ``"mean"``, ``"max"`` or ``"prod"``.
        granularity: Kinds of units to cut. Default ``("channels",)``; also ``"heads"``, ``"experts"``.
            As many experts stay as the router chooses at once.
        round_to: The number of units kept is a multiple of this, rounded up; kernels like multiples of 8 to
            64. Default 1.
        max_amount: No group loses more than this share of its units. Default 1: each keeps a unit.
        protect_first, protect_last: Number of repeated blocks at either end to leave alone. Default 0.
        compensate: Add what the cut units gave on average to the bias of what read them, also where there is
            no bias yet. Default: for FLAP.
        recover: Fit what reads the cut units to its old outputs by least squares, using its bias if it has
            one or ``compensate`` is set. Default False.
        damping: (recover) As a part of the mean second moment of the inputs that stay. Default 0.01.
        samples: (Taylor) Calibration batches to take gradients of. Default 10 (LLM-Pruner); None uses all.
        steps: Rounds; each scores anew and cuts an equal part. Default 1.
        tokens: (latency) Tokens of a call: 1 (default) for decoding, the prompt's length for prefill.
        balance: (latency) Operations the machine does while it reads one byte of weights. Default 16.
        include, exclude: Patterns of parameter names, see :class:`SelectivePass`. A group is cut when one of
            its parameters is included and none excluded.

    Raises:
        RecipeError: an option is out of range; every group is protected or frozen; ``round_to`` is larger
            than every group; the target cannot be reached.
        CalibrationError: no data for a criterion that needs them; NaN or inf in a gradient.

    Example:
        >>> PruneChannels(0.2, target="block-parameters", importance="flap", recover=True).needs_calibration
        True
    """

    amount: float = 0.25
    target: Target = "units"
    importance: str = "l1"
    scope: Literal["group", "global"] | None = None
    standardize: bool | None = None
    combine: Literal["sum", "mean", "max", "prod"] = "sum"
    granularity: tuple[Literal["channels", "heads", "experts"], ...] = ("channels",)
    round_to: int = 1
    max_amount: float = 1.0
    protect_first: int = 0
    protect_last: int = 0
    compensate: bool | None = None
    recover: bool = False
    damping: float = 0.01
    samples: int | None = 10
    steps: int = 1
    tokens: int = 1
    balance: float = 16.0

    name: ClassVar[str] = "prune-channels"
    summary: ClassVar[str] = "Cut the least important channels, heads or experts out of the model."
    source: ClassVar[str] = (
        "Li et al., 2017 (arXiv:1608.08710); Ma et al., 2023 (LLM-Pruner, arXiv:2305.11627);"
        " An et al., 2024 (FLAP, arXiv:2312.11983); Sun et al., 2024 (Wanda, arXiv:2306.11695);"
        " groups as in Fang et al., 2023 (DepGraph, arXiv:2301.12900)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given: object = self.granularity
        if isinstance(given, str | list):
            object.__setattr__(self, "granularity", (given,) if isinstance(given, str) else tuple(given))
        self._check_names()
        self._check_numbers()
        needs = self.importance not in ("l1", "l2") or self.recover or bool(self.compensate)
        object.__setattr__(self, "needs_calibration", needs)

    def _check_names(self) -> None:
        choices = {
            "target": TARGETS,
            "importance": (*IMPORTANCE, *GRADIENTS),
            "combine": tuple(COMBINE),
            "scope": ("group", "global", None),
        }
        for option, allowed in choices.items():
            value = getattr(self, option)
            if value not in allowed:
                raise RecipeError(
                    f"{self.name}: {option}={value!r}, expected {', '.join(map(repr, allowed))}."
                )
        if not self.granularity or not set(self.granularity) <= set(KINDS):
            raise RecipeError(
                f"{self.name}: granularity={self.granularity!r},"
                f" expected some of {', '.join(map(repr, KINDS))}."
            )
        if self.granularity == ("experts",) and (self.recover or self.compensate):
            option = "recover" if self.recover else "compensate"
            raise RecipeError(
                f"{self.name}: {option}=true has nothing to refit: no weight reads the experts one by one.",
                fix=f"leave out {option}, or cut channels or heads as well.",
            )
        for option in ("standardize", "compensate", "recover"):
            if getattr(self, option) not in ((True, False) if option == "recover" else (True, False, None)):
                raise RecipeError(f"{self.name}: {option}={getattr(self, option)!r}, expected true or false.")

    def _check_numbers(self) -> None:
        shares = {"amount": (0, 1), "max_amount": (0, 1 + 1e-12), "damping": (0, float("inf"))}
        for option, (low, high) in shares.items():
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
                told = "a share above 0 and below 1" if option == "amount" else "a share above 0, at most 1"
                told = "a positive number" if option == "damping" else told
                raise RecipeError(f"{self.name}: {option}={value!r}, expected {told}.")
        balance: object = self.balance
        if isinstance(balance, bool) or not isinstance(balance, int | float) or not 0 < balance < 1e9:
            raise RecipeError(f"{self.name}: balance={balance!r}, expected a positive number.")
        least = {"round_to": 1, "steps": 1, "tokens": 1, "samples": 1, "protect_first": 0, "protect_last": 0}
        for option, low_ in least.items():
            value = getattr(self, option)
            if option == "samples" and value is None:
                continue
            if type(value) is not int or value < low_:
                kind = "a positive integer" if low_ else "an integer, at least 0"
                raise RecipeError(f"{self.name}: {option}={value!r}, expected {kind}.")

    @property
    def rounds(self) -> int:
        """One per step."""
        return self.steps

    def choose(self, model: ModelContext) -> Iterator[StructuralEdit | Refuse]:
        """Score every group, share the budget out, keep the best units of each."""
        self.check_patterns(model.program)
        chosen, refused = self.selected(model)
        self._check_some(chosen, refused)
        yield from refused
        scores = self.scores(model, chosen)
        unscored = [
            Refuse(_anchor(group), f"no weight that reads its {group.kind} could be measured")
            for group in chosen
            if group.name not in scores
        ]
        yield from unscored
        scored = [group for group in chosen if group.name in scores]
        self._check_some(scored, unscored)
        counts = self.budget().counts(model, scored, self._comparable(scores))
        for group in scored:
            count = counts[group.name]
            if count == group.units:
                yield Refuse(_anchor(group), f"the target leaves all {group.units} {group.kind}")
            else:
                yield keep(group, best(scores[group.name], count), self.importance)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Cut, and let what read the cut units make up for them."""
        made_up = MakeUp(self.recover, self._flag(self.compensate), self.damping)
        for edit in sorted(block.decisions, key=lambda edit: _place(block, edit)):
            if isinstance(edit, KeepUnits) and (self.recover or self._flag(self.compensate)):
                yield from made_up.carry_out(block, block.groups[edit.group], edit)
            else:
                yield edit

    def budget(self) -> Budget:
        """What is taken away."""
        everywhere = (self.scope or ("global" if self.importance == "flap" else "group")) == "group"
        return Budget(
            self.amount,
            self.target,
            everywhere,
            self.round_to,
            self.max_amount,
            self.steps,
            self.tokens,
            self.balance,
            self.name,
        )

    def scores(self, model: ModelContext, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
        """``[units]`` float64 by group; groups that cannot be scored are missing."""
        if self.importance in GRADIENTS:
            return GRADIENTS[self.importance].scores(model, groups, self.combine, self.samples)
        return IMPORTANCE[self.importance](model, groups)

    def selected(self, model: ModelContext) -> tuple[list[ChannelGroup], list[Refuse]]:
        """Groups that may be cut, and a refusal for each of the others."""
        protected = self._protected_blocks(model)
        chosen, refused = [], []
        for group in model.groups.values():
            reason = self._protected(model, group)
            if not reason and group.block in protected:
                reason = "its block is protected"
            if not reason and self.round_to > group.units:
                reason = f"round_to={self.round_to} exceeds its {group.units} {group.kind}"
            if reason:
                refused.append(Refuse(_anchor(group), reason))
            else:
                chosen.append(group)
        return chosen, refused

    def _flag(self, given: bool | None) -> bool:
        """The value of an option that FLAP has on by default."""
        return self.importance == "flap" if given is None else given

    def _comparable(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self._flag(self.standardize):
            return scores
        return {name: standardized(values) for name, values in scores.items()}

    def _protected_blocks(self, model: ModelContext) -> set[int]:
        repeated = [block.index for block in model.blocks if block.name.startswith("block ")]
        count = len(repeated)
        return {*repeated[: self.protect_first], *repeated[max(0, count - self.protect_last) :]}

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
        if chosen:
            return
        telling = [refusal for refusal in refused if "cannot be cut" not in refusal.reason] or refused
        first = f" {telling[0].name}: {telling[0].reason}." if telling else ""
        raise RecipeError(
            f"{self.name}: none of {len(refused)} channel groups can be cut.{first}",
            fix="check granularity, round_to, include, exclude and the protected blocks.",
        )


def standardized(scores: Tensor) -> Tensor:
    """``(scores − mean) / deviation``; zeros where all are equal."""
    spread = scores - scores.mean()
    deviation = spread.square().mean().sqrt()
    return spread / deviation if float(deviation) > 0 else torch.zeros_like(scores)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices ``[count]`` of the highest scores, ascending; of equal ones the first are taken."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


def keep(group: ChannelGroup, kept: Tensor, by: str) -> KeepUnits:
    """The edit that keeps some units of a group."""
    return KeepUnits(group.name, kept, f"{kept.numel()} of {group.units} {group.kind} kept by {by}")


def _place(block: BlockContext, edit: StructuralEdit) -> int:
    """Where in a block the units of an edit are read first, so that cuts follow the order of the graph."""
    if not isinstance(edit, KeepUnits):
        return -1
    readers = {member.name for member in block.groups[edit.group].consumers()}
    places = [place for place, site in enumerate(block.sites) if site.name in readers]
    return min(places, default=len(block.sites))


def _anchor(group: ChannelGroup) -> str:
    return group.name.rpartition(":")[0]
