"""One round of a structural pass: what it sees of the model, what it decided, and the cut at its end."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.analysis.channel_groups import find_channel_groups
from fxcompress.calibration.context import Context, Feed
from fxcompress.calibration.inputs import CalibrationData
from fxcompress.calibration.model_loss import ModelLoss
from fxcompress.calibration.plan import Plan
from fxcompress.edits import CompressionState, Edit, KeepUnits, Refuse, RemoveBlock, StructuralEdit
from fxcompress.errors import RecipeError, told_where
from fxcompress.pass_base import BlockContext, StructuralPass
from fxcompress.structure.commit import Committed, check_forms, check_structural, commit, prove_cut
from fxcompress.structure.cost import Cost, cost_of
from fxcompress.structure.cut_cost import CutCost
from fxcompress.structure.removal import block_of, find_removal

__all__ = ["Model", "Round"]


class Model:
    """The manager's :class:`fxcompress.pass_base.ModelContext`.

    Args:
        current: The round.
        blocks: The model's blocks, in graph order.
        feed: Where activations come from.
        seed: Of :attr:`generator`.
    """

    def __init__(self, current: Round, blocks: Sequence[Context], feed: Feed, seed: int) -> None:
        self.program = current.plan.program
        self.state = current.state
        self.round = current.number
        self.groups: Mapping[str, ChannelGroup] = current.groups
        self.blocks: Sequence[BlockContext] = blocks
        self.generator = torch.Generator().manual_seed(seed)
        self.cost, self.first_cost = current.cost, current.first_cost
        self._plan, self._feed, self._seed = current.plan, feed, seed
        self._name, self._found = current.item.name, current.found

    def weight(self, name: str) -> Tensor:
        """Current dense tensor of a parameter; read only."""
        return self.state.weight(name)

    def cannot_remove(self, index: int) -> str:
        """Why a block cannot be removed; empty when it can."""
        found = find_removal(self.program, self._plan.blocks, index)
        return found if isinstance(found, str) else ""

    def whole(self, samples: int | None = None) -> ModelLoss:
        """The model as a whole on calibration data.

        Raises:
            CalibrationError: there are no calibration data.
        """
        asked_by = f"pass {self._name!r}"
        self._feed.start(asked_by)
        return ModelLoss(
            self._plan,
            self.state,
            lambda double: self._feed.start(asked_by, double=double),
            samples,
            self._seed,
        )

    @functools.cached_property
    def cut_cost(self) -> CutCost:
        """What the model would cost with fewer units."""
        return CutCost(self.program, self._plan.blocks, self._found)


class Round:
    """One round of a structural pass.

    Args:
        plan: Of the program before the cut.
        state: The run's state, in which the pass then makes its edits.
        item: The pass.
        number: 0-based number of the round.
        first_cost: What the model cost before the first round; None in the first.

    Attributes:
        found: The program's channel groups.
        groups: The same by name.
        decisions: Structural edits by block, once decided.
        refused: What was left alone, and why.
        checks: Report entries of the proof.
        committed: The cut model, None before the end or when nothing was cut.
        new_plan: Of the cut program.
    """

    def __init__(
        self, plan: Plan, state: CompressionState, item: StructuralPass, number: int, first_cost: Cost | None
    ) -> None:
        check_forms(state, item.name)
        self.plan, self.state, self.item, self.number = plan, state, item, number
        self.found = find_channel_groups(plan.program)
        self.groups = {group.name: group for group in (*self.found.groups, *self.found.frozen)}
        self.cost = cost_of(plan.program, plan.blocks)
        self.first_cost = first_cost or self.cost
        self.decisions: dict[int, list[StructuralEdit]] = {}
        self.refused: list[Refuse] = []
        self.checks: list[dict[str, Any]] = []
        self.committed: Committed | None = None
        self.new_plan = plan

    def choose(self, feed: Feed, seed: int) -> Iterator[StructuralEdit | Refuse]:
        """Let the pass decide, on the model as it is."""
        name = self.item.name
        blocks = [
            Context(self.plan, block.index, self.state, feed, name, seed, groups=self.groups)
            for block in self.plan.blocks
        ]
        with torch.random.fork_rng(devices=[]), torch.no_grad(), told_where(f"pass {name!r}"):
            torch.manual_seed(seed)
            yield from self.item.choose(Model(self, blocks, feed, seed))

    def decide(self, edits: Sequence[Edit]) -> None:
        """Take the decisions, block by block, and the refusals among them.

        Raises:
            RecipeError: an edit that is none of structure, or that cannot be carried out.
        """
        trial = self.state.copy()
        for edit in edits:
            if isinstance(edit, Refuse):
                self.refused.append(edit)
                continue
            if not isinstance(edit, KeepUnits | RemoveBlock):
                raise RecipeError(
                    f"pass {self.item.name!r}: choose() yielded a {type(edit).__name__}.",
                    fix="yield KeepUnits, RemoveBlock or Refuse there, and other edits in solve().",
                )
            with told_where(f"pass {self.item.name!r}"):
                check_structural(edit, self.plan, trial, self.groups)
                trial.apply(edit, self.item.name)
            self.decisions.setdefault(self._block(edit), []).append(edit)

    def _block(self, edit: StructuralEdit) -> int:
        """The block that carries an edit out: the first one that reads a tensor it concerns."""
        if isinstance(edit, KeepUnits):
            names = [member.name for member in self.groups[edit.group].members]
        else:
            index = block_of(self.plan.program, self.plan.blocks, edit.name)
            assert index is not None  # check_structural
            return index
        users = [
            user for name in names for node in self.plan.program.weight_node(name) for user in node.users
        ]
        return min((self.plan.block_of[user] for user in users if user in self.plan.block_of), default=0)

    def commit(self, state: CompressionState, sample: CalibrationData | None) -> Committed | None:
        """Cut what was masked, and prove it on ``sample`` if there is one.

        Raises:
            RecipeError: the pass decided something and did not carry it out.
            VerificationError: the cut model differs from the masked one.
        """
        for edit in (edit for edits in self.decisions.values() for edit in edits):
            done = edit.group in state.kept if isinstance(edit, KeepUnits) else edit.name in state.removed
            if not done:
                raise RecipeError(
                    f"pass {self.item.name!r}: {edit.name} was decided on, but solve() did not yield it.",
                    fix="let solve() yield everything in block.decisions.",
                )
        if not state.kept and not state.removed:
            return None
        self.committed = commit(self.plan, state, self.found)
        self.new_plan = Plan(self.committed.program)
        if sample is not None:
            self.checks.append(
                prove_cut(self.plan, state, self.new_plan, self.committed.state, sample, self.item.name)
            )
        return self.committed
