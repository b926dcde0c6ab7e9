"""The manager: runs a recipe pass by pass and block by block, checks promises and keeps checkpoints."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fxcompress.accounting import account_for, account_for_structure
from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.calibration.context import Context, Feed
from fxcompress.calibration.inputs import CalibrationData, as_calibration
from fxcompress.calibration.walk import Plan, Walk
from fxcompress.calibration.whole_model import SurveyModel
from fxcompress.capture.program import Program
from fxcompress.checkpoint import CheckpointStore, canonical, run_key, step_key
from fxcompress.edit_checks import check_edit
from fxcompress.edit_types import names_of
from fxcompress.edits import (
    CompressionState,
    Edit,
    KeepUnits,
    Refuse,
    ReviseWeight,
)
from fxcompress.errors import CalibrationError, CoverageError, RecipeError, told_where
from fxcompress.pass_base import Pass, StructuralPass
from fxcompress.progress import ProgressEvent, ProgressOption, Reporter
from fxcompress.recipe import Recipe
from fxcompress.report import Report
from fxcompress.sparsity import check_masks, zeros_check
from fxcompress.structure.commit import Committed, mask
from fxcompress.structure.record import follow
from fxcompress.structure.rounds import Round
from fxcompress.verify import SiteAudit, check_weights, measure_end_to_end, prove_unchanged

__all__ = ["RunResult", "Verify", "run_recipe"]

Verify = Literal["each", "end", "off"]

_COMPRESSES = "quantized-weights"
_PROOF_BATCHES = 1
_END_BATCHES = 4


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run gives.

    Args:
        state: The sum of all edits, over the weights of ``program``.
        report: The account of the run.
        program: The program, cut if the recipe cut it.
        rounds: What was cut, in order: changes, and the sizes of the groups they concern.
    """

    state: CompressionState
    report: Report
    program: Program
    rounds: tuple[Committed, ...] = ()


def run_recipe(
    program: Program,
    recipe: Any,
    data: CalibrationData | None = None,
    *,
    examples: CalibrationData | None = None,
    seed: int = 0,
    verify: Verify = "each",
    progress: ProgressOption = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> RunResult:
    """Run a recipe over a captured program.

    Args:
        program: The captured model; not changed.
        recipe: Anything :meth:`Recipe.load` reads.
        data: Calibration data, from :func:`fxcompress.calibration.as_calibration`.
        examples: Inputs for the checks when there are no calibration data.
        seed: Of every random choice a pass makes. Equal inputs and seeds give byte-identical states.
        verify: ``"each"`` proves function-preserving passes in float64, measures every lossy pass site by
            site and the result end to end; ``"end"`` omits the per-site errors; ``"off"`` checks nothing.
        progress: True for a progress bar, or a callable that gets every step.
        checkpoint: Folder of finished steps; a run that was stopped continues there.

    Raises:
        RecipeError: the recipe is wrong, or a pass yielded something illegal.
        CalibrationError: data are missing or unusable.
        WeightError: NaN or inf in the model's weights, or in an edit.
        CoverageError: nothing was changed, or a weight is left without an account.
        VerificationError: a pass broke its promise.

    Example:
        >>> result = run_recipe(program, "w8a16")
        >>> result.report.totals["ratio"]
    """
    if verify not in ("each", "end", "off"):
        raise RecipeError(f"verify is {verify!r}, expected 'each', 'end' or 'off'.")
    run = _Run(program, Recipe.load(recipe), data, examples, seed, verify)
    run.check_needs()
    if checkpoint is not None:
        run.open_checkpoint(checkpoint)
    with Reporter(progress) as reporter:
        return run.execute(reporter)


class _Run:
    """One run's state between its steps."""

    def __init__(
        self,
        program: Program,
        recipe: Recipe,
        data: CalibrationData | None,
        examples: CalibrationData | None,
        seed: int,
        verify: Verify,
    ) -> None:
        self.program, self.recipe, self.seed, self.verify = program, recipe, seed, verify
        self.plan = self.first_plan = Plan(program)
        self.structural: list[Round] = []
        self.data = None if data is None else as_calibration(data, program)
        shown = self.data if self.data is not None else examples
        self.shown = None if shown is None else as_calibration(shown, program)
        self.state = CompressionState(program.weights)
        self.errors: dict[str, float] = {}
        self.changes = 0
        self.compresses = any(_COMPRESSES in item.provides for item in recipe)
        self.groups: Mapping[str, ChannelGroup] = {}
        self.report = Report(recipe.to_dict(), ())
        self.store: CheckpointStore | None = None
        self.key = ""

    def check_needs(self) -> None:
        """Everything that can fail is tried before the long work."""
        if not self.plan.sites:
            raise CoverageError(
                "the captured graph uses no weight matrix.", fix="check that the right model was given."
            )
        if self.data is None:
            needy = [item.name for item in self.recipe if item.needs_calibration]
            if needy:
                raise CalibrationError(
                    f"pass {needy[0]!r} needs calibration data and none were given.",
                    fix="pass calibration=….",
                )
        check_weights(self.plan)

    def open_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Use a folder of finished steps."""
        self.store = CheckpointStore(folder)
        self.key = run_key(self.program, self.data, self.seed)

    def execute(self, reporter: Reporter) -> RunResult:
        """Run all passes and checks."""
        for position, item in enumerate(self.recipe):
            started = time.perf_counter()
            if isinstance(item, StructuralPass):
                for number in range(item.rounds):
                    self._run_round(position, item, number, reporter)
            else:
                self._run_pass(position, item, reporter)
            self.report.seconds[f"{position + 1} {item.name}"] = time.perf_counter() - started
        if not self.changes:
            names = ", ".join(repr(item.name) for item in self.recipe)
            raise CoverageError(
                f"the recipe changed nothing: {names} made no edit. {self._refusals()}",
                fix="check include/exclude and the sizes the passes ask for.",
            )
        zeros = check_masks(self.state)
        if zeros:
            self.report.checks.append(zeros_check(self.state, zeros))
        rounds = tuple(done.committed for done in self.structural if done.committed is not None)
        changes = [committed.change for committed in rounds]
        self.report.rows = account_for(
            self.plan.program,
            self.state,
            self.plan.sites,
            self.errors,
            zeros=zeros,
            compresses=self.compresses,
            original=self.program,
            original_sites=self.first_plan.sites,
            changes=changes,
        )
        if changes:
            self.report.structure = account_for_structure(self.first_plan, self.plan, changes)
        self._measure_end(reporter)
        if self.data is not None:
            counts = {"batches": len(self.data), "tokens": self.data.tokens}
            self.report.calibration = {"source": self.data.source, **counts}
        return RunResult(self.state, self.report, self.plan.program, rounds)

    def _refusals(self) -> str:
        reasons = [
            f"{name}: {entry.reason}" for name, entries in self.state.provenance.items() for entry in entries
        ]
        return f"First reason: {reasons[0]}" if reasons else ""

    def _run_round(self, position: int, item: StructuralPass, number: int, reporter: Reporter) -> None:
        """Decide, mask block by block, cut."""
        first = self.structural[-number].cost if number else None
        current = Round(self.plan, self.state, item, number, first)
        feed = Feed(
            None if self.data is None else partial(Walk, self.plan, self.data.flat()),
            [self.state.copy()] * len(self.plan.blocks),
        )
        choose = partial(current.choose, feed, self._seed(position, item, f"round {number}"))
        decided, _ = self._stored(item, -1 - number, lambda: [canonical(e, item.name) for e in choose()])
        current.decide(decided)
        for refusal in current.refused:
            self._apply(refusal, item)
        self._run_pass(position, item, reporter, current)
        sample = None if self.shown is None else self.shown.sample(_PROOF_BATCHES)
        if self.verify != "off" and sample is None:
            self._unproven(item)
        committed = current.commit(self.state, None if self.verify == "off" else sample)
        self.structural.append(current)
        if committed is not None:
            self.plan, self.state = current.new_plan, committed.state
            renamed = {follow(name, [committed.change]): error for name, error in self.errors.items()}
            self.errors = {name: error for name, error in renamed.items() if name is not None}
            self.report.checks += current.checks

    def _run_pass(self, position: int, item: Pass, reporter: Reporter, current: Round | None = None) -> None:
        before = self.state.copy()
        data = self.data
        feed = Feed(None if data is None else partial(Walk, self.plan, data.flat()))
        self.groups = {} if current is None else current.groups
        folder = None if self.store is None else self.store.work_folder(step_key(self.key, item, -2))
        survey = functools.cache(lambda: self._survey(position, item, before, folder, reporter))
        lossy = self.verify == "each" and not item.preserves_function and self.shown is not None
        audit = (
            SiteAudit(self.plan, self.shown.sample(_PROOF_BATCHES))
            if lossy and self.shown is not None
            else None
        )
        edits: list[Edit] = [] if current is None else list(current.refused)
        stage = f"{position + 1}/{len(self.recipe)} {item.name}"
        reporter.start(stage, len(self.plan.blocks))
        for index, block in enumerate(self.plan.blocks):
            start = self.state.copy() if audit is not None else self.state
            made, resumed = self._step(position, item, index, feed, current, survey)
            edits += made
            if audit is not None:
                revised = {edit.name for edit in made if isinstance(edit, ReviseWeight)}
                for name, error in audit.block(start, self.state, made).items():
                    known = 0.0 if name in revised else self.errors.get(name, 0.0)
                    self.errors[name] = max(error, known)
            feed.finish_block(self.state)
            reporter.step(ProgressEvent(stage, block.name, index + 1, len(self.plan.blocks), resumed))
        self._summarize(item, edits)
        if item.preserves_function and edits:
            self._prove(item, before, edits)

    def _step(
        self,
        position: int,
        item: Pass,
        index: int,
        feed: Feed,
        current: Round | None,
        survey: Callable[[], Any],
    ) -> tuple[list[Edit], bool]:
        """Solve one block, or read what an earlier run solved."""
        seed = self._seed(position, item, index)
        decisions = () if current is None else current.decisions.get(index, ())

        def solve() -> list[Edit]:
            place = (self.plan, index, self.state, feed, item.name, seed)
            context = Context(*place, groups=self.groups, decisions=decisions, survey=survey)
            return list(self._solve(item, context, seed))

        made, resumed = self._stored(item, index, solve)
        for edit in made if resumed else ():
            self._apply(edit, item)
        return made, resumed

    def _stored(self, item: Pass, index: int, make: Callable[[], list[Edit]]) -> tuple[list[Edit], bool]:
        """The edits of a step, and whether an earlier run made them."""
        if self.store is None:
            return make(), False
        self.key = step_key(self.key, item, index)
        stored = self.store.load(self.key)
        if stored is not None:
            return stored, True
        made = make()
        self.store.save(self.key, made)
        return made, False

    def _seed(self, position: int, item: Pass, step: object) -> int:
        digest = hashlib.sha256(f"{self.seed}|{position}|{item.name}|{step}".encode()).digest()
        return int.from_bytes(digest[:7], "little")

    def _survey(
        self, position: int, item: Pass, before: CompressionState, folder: Path | None, reporter: Reporter
    ) -> Any:
        """What a pass finds out about the whole model, as it was before the pass."""
        seed = self._seed(position, item, "survey")
        model = SurveyModel(
            *(self.plan, before, None if self.data is None else self.data.flat(), item.name, seed),
            data=self.data,
            original=self.program,
            folder=folder,
            progress=reporter.step,
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            return item.survey(model)

    def _solve(self, item: Pass, context: Context, seed: int) -> Iterator[Edit]:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            with told_where(f"pass {item.name!r}, {context.name}"):
                for yielded in item.solve(context):
                    edit = canonical(yielded, item.name)
                    self._apply(edit, item)
                    context.edited(self._touched(edit))
                    yield edit

    def _apply(self, edit: Edit, item: Pass) -> None:
        check_edit(edit, self.plan, self.state, self.groups)
        self.state.apply(edit, item.name)
        if isinstance(edit, KeepUnits):
            mask(self.state, self.groups[edit.group], edit.kept)

    def _touched(self, edit: Edit) -> tuple[str, ...]:
        """Parameters whose values an edit changed."""
        if isinstance(edit, KeepUnits):
            return tuple(member.name for member in self.groups[edit.group].members)
        return names_of(edit)

    def _summarize(self, item: Pass, edits: Sequence[Edit]) -> None:
        kinds: dict[str, int] = {}
        for edit in edits:
            if not isinstance(edit, Refuse):
                kinds[type(edit).__name__] = kinds.get(type(edit).__name__, 0) + 1
        self.changes += sum(kinds.values())
        self.compresses |= "SetWeight" in kinds
        refused = sum(1 for edit in edits if isinstance(edit, Refuse))
        self.report.passes.append(
            {"name": item.name, "edits": dict(sorted(kinds.items())), "refused": refused}
        )

    def _prove(self, item: Pass, before: CompressionState, edits: Sequence[Edit]) -> None:
        if self.verify == "off":
            return
        if self.shown is None:
            self._unproven(item)
            return
        sample = self.shown.sample(_PROOF_BATCHES)
        self.report.checks.append(prove_unchanged(self.plan, before, self.state, edits, sample, item.name))

    def _unproven(self, item: Pass) -> None:
        self.report.checks.append(
            {"pass": item.name, "check": "not proven: no inputs were given", "passed": False}
        )

    def _measure_end(self, reporter: Reporter) -> None:
        if self.verify == "off":
            return
        if self.shown is None:
            self.report.checks.append(
                {"check": "end to end not measured: no inputs were given", "passed": False}
            )
            return
        if any(form.cache is not None for form in self.state.forms.values()):
            self.report.checks.append(
                {"check": "the quantized cache is not in the end-to-end figures: a first call is exact"}
            )
        started = time.perf_counter()
        reporter.start("end to end", 1)
        found = measure_end_to_end(self.plan, self.state, self.shown.sample(_END_BATCHES), self.first_plan)
        self.report.relative_error, self.report.kl = found.relative_error, found.kl
        self.report.seconds["end to end"] = time.perf_counter() - started
        reporter.step(ProgressEvent("end to end", "", 1, 1))
