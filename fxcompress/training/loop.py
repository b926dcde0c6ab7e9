"""The fine-tune loop. Accelerate drives devices, precision and processes; everything random follows the step.

A step sums the losses of its tokens over all micro-batches and processes and divides by their number once, so
that how a step is split changes nothing but the order of additions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import TrainingError
from fxcompress.progress import ProgressEvent, ProgressOption, Reporter
from fxcompress.training.data import TrainingData
from fxcompress.training.devices import device_of, keep_buffers_local, make_accelerator, row_at
from fxcompress.training.graph import Outputs, TrainingGraph
from fxcompress.training.learner import Learner
from fxcompress.training.objective import Models, Objective, Sequences, Step
from fxcompress.training.options import TrainingOptions
from fxcompress.training.result import TrainingResult
from fxcompress.training.sampling import Sampler
from fxcompress.training.saving import (
    Checkpoints,
    read_snapshot,
    set_tensors,
    take_snapshot,
    trained_tensors,
)
from fxcompress.training.scores import TeacherScores, vocabulary_mismatch
from fxcompress.training.sharding import check_sharding, gathered, number_of, restore_whole
from fxcompress.training.teacher import TeacherCache
from fxcompress.training.views import is_causal, view

__all__ = ["TrainingResult", "train"]


def train(
    student: TrainingGraph,
    teacher: TrainingGraph | None,
    data: TrainingData,
    objective: Objective,
    options: TrainingOptions,
    *,
    evaluation: TrainingData | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    longest: int | None = None,
    progress: ProgressOption = False,
) -> TrainingResult:
    """Train ``student`` in place.

    Args:
        student: Its parameters are trained; they end at the best look at held-out data, or at the last step.
        teacher: For objectives that need one.
        data: Sequences to learn from.
        objective: What is minimised.
        options: How.
        evaluation: Held-out sequences.
        checkpoint: Folder of snapshots; a run that was stopped goes on there, exactly.
        longest: Tokens that the models take.
        progress: As for :func:`fxcompress.compress`.

    Raises:
        TrainingError: the objective needs a teacher and there is none, vocabularies differ, a loss or a
            gradient is NaN or inf (parameters stay as they were before that step), or options do not fit
            together.
    """
    if "teacher" in objective.needs and teacher is None:
        raise TrainingError(f"objective {objective.describe()!r} needs a teacher.", fix="pass teacher=….")
    run = _Run(student, teacher, data, objective, options, evaluation, checkpoint, longest)
    with Reporter(progress if run.accelerator.is_main_process else False) as reporter, run.closing():
        return run.execute(reporter)


class _Run:
    """One run's state between its steps."""

    def __init__(
        self,
        student: TrainingGraph,
        teacher: TrainingGraph | None,
        data: TrainingData,
        objective: Objective,
        options: TrainingOptions,
        evaluation: TrainingData | None,
        checkpoint: str | os.PathLike[str] | None,
        longest: int | None,
    ) -> None:
        self.data, self.evaluation, self.options, self.longest = data, evaluation, options, longest
        self.student, self.teacher = student, teacher
        self.accelerator = make_accelerator(options, device_of(student))
        check_sharding(self.accelerator)
        self.device: torch.device = self.accelerator.device
        student.to(self.device)
        if teacher is not None:
            teacher.to(self.device).eval()
        self._check_split()
        for graph in (student, teacher):
            if graph is not None and {"hidden", "attention"} & objective.needs:
                graph.tap()
        self.causal = is_causal(student, data.batch([0], self.device))
        self._check_vocabulary()
        self.example = self._example(objective)
        layers = objective.layers(Models(student, teacher), self.example)
        self.learner = Learner(student, objective, layers).to(self.device)
        keep_buffers_local(self.learner)
        self.learner.causal = self.causal
        self.key = options.fingerprint(
            data.fingerprint(), objective, [(n, tuple(p.shape)) for n, p in self.learner.named_parameters()]
        )
        self.cache: TeacherCache | None = None
        if options.top_k and teacher is not None:
            self.cache = self._make_cache(objective, checkpoint)
        self.store = None if checkpoint is None else Checkpoints(checkpoint, self.key, options.keep)
        self.result = TrainingResult(objective=objective.describe())
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.waited = math.inf, 0

    def _check_split(self) -> None:
        parts = self.accelerator.num_processes * self.options.accumulation
        if self.options.batch_size % parts:
            raise TrainingError(
                f"training: batch_size={self.options.batch_size} cannot be split into"
                f" {self.accelerator.num_processes} processes × {self.options.accumulation} micro-batches.",
                fix=f"use a multiple of {parts}.",
            )

    def _check_vocabulary(self) -> None:
        if self.teacher is None:
            return
        example = self.data.batch([0], self.device)
        with torch.no_grad():
            mine, theirs = self.student(example.inputs).scores, self.teacher(example.inputs).scores
        if mine.shape[-1] != theirs.shape[-1]:
            raise vocabulary_mismatch(theirs.shape[-1], mine.shape[-1])
        if mine.shape != theirs.shape:
            raise TrainingError(
                f"on one sequence the teacher gives {tuple(theirs.shape)}, the student {tuple(mine.shape)}."
            )

    def _make_cache(self, objective: Objective, folder: str | os.PathLike[str] | None) -> TeacherCache:
        refused = {"hidden", "attention", "scores"} & objective.needs
        if refused or objective.on_policy:
            raise TrainingError(
                f"training: top_k={self.options.top_k} keeps what the teacher says of given sequences, but"
                f" objective {objective.describe()!r} asks it for more.",
                fix="use top_k=0.",
            )
        temperature = float(getattr(objective, "temperature", 1.0))
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
        return TeacherCache(self.data, self.options.top_k, temperature, folder, self.key)

    # --- running -------------------------------------------------------------------------------------------

    def execute(self, reporter: Reporter) -> TrainingResult:
        """All steps."""
        options = self.options
        self._prepare_objective(reporter)
        model, optimizer = self._optimizer()
        self._resume(model, optimizer)
        if self.cache is not None and self.teacher is not None:
            for row in self.cache.fill(self.teacher, self.device, self.accelerator.is_main_process):
                reporter.step(ProgressEvent("teacher", f"sequence {row + 1}", row + 1, len(self.data)))
        if not self.result.steps and self.evaluation is not None:
            self._look(model)
        reporter.start("distill", options.steps)
        while self.result.steps < options.steps and not self.result.stopped:
            step = self.result.steps
            loss = self._step(model, optimizer, step)
            self.result.steps += 1
            self.result.losses.append(loss)
            done = self.result.steps
            self._log({"loss": loss, "learning rate": options.rate(step)}, done)
            if self.evaluation is not None and (done % options.look == 0 or done == options.steps):
                self._look(model)
            if self.store is not None and (done % options.save == 0 or done == options.steps):
                self._save(model, optimizer)
            reporter.step(ProgressEvent("distill", f"loss {loss:.4g}", done, options.steps))
        if self.best:
            set_tensors(model, self.best)
        else:
            self.result.best = self.result.steps
        restore_whole(model)
        return self.result

    def _prepare_objective(self, reporter: Reporter) -> None:
        models = Models(self.student, self.teacher, self.learner.layers)
        self.learner.objective = self.learner.objective.prepare(models, _Steps(self))

    def _optimizer(self) -> tuple[Any, Any]:
        decayed = [p for p in self.learner.parameters() if p.requires_grad and p.dim() >= 2]
        plain = [p for p in self.learner.parameters() if p.requires_grad and p.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": self.options.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.options.learning_rate)
        prepared: tuple[Any, Any] = self.accelerator.prepare(self.learner, optimizer)
        return prepared

    def _step(self, model: Any, optimizer: Any, step: int) -> float:
        """One optimiser step; the mean loss of its tokens."""
        for group in optimizer.param_groups:
            group["lr"] = self.options.rate(step)
        with gathered(model) if self.learner.objective.on_policy else nullcontext():
            batches = [self._drawn(rows, step) for rows in self._rows(step)]
        count = self._total(sum(self.learner.count(batch, self.example) for batch in batches))
        if not count:
            raise TrainingError(
                f"step {step + 1}: the sequences have nothing to learn.", fix="check the labels."
            )
        share = self.accelerator.num_processes / count  # processes' gradients are averaged
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.enable_grad():
            for number, batch in enumerate(batches):
                last = number == len(batches) - 1
                with nullcontext() if last else self.accelerator.no_sync(model):
                    teacher, known = self._ask(batch)
                    loss = model(batch, teacher, known, False)
                    self.accelerator.backward(loss * share)
                    total += loss.detach()
        mean = self._total(float(total)) / count
        self._check_finite(mean, step, "loss")
        norm = self._clip(model)
        if self.options.precision != "fp16":  # whose scaler skips such steps by itself
            self._check_finite(norm, step, "gradient")
        optimizer.step()
        optimizer.zero_grad()
        self.result.tokens += int(count)
        return mean

    def _clip(self, model: Any) -> float:
        limit = self.options.clip_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(model.parameters(), limit)
        return number_of(norm) if norm is not None else 0.0

    def _check_finite(self, value: float, step: int, what: str) -> None:
        if math.isfinite(value):
            return
        saved = self.store.steps() if self.store is not None else []
        kept = f" The last good checkpoint is {saved[-1]}." if saved else ""
        raise TrainingError(
            f"step {step + 1}: the {what} is {value}; its update was not made.{kept}",
            fix="use a smaller learning_rate, more warmup or precision='no'.",
        )

    def _rows(self, step: int) -> list[list[int]]:
        """This process's micro-batches of a step."""
        size, parts = self.options.batch_size, self.accelerator.num_processes * self.options.accumulation
        chosen = [row_at(step * size + i, len(self.data), self.options.seed) for i in range(size)]
        each = size // parts
        first = self.accelerator.process_index * self.options.accumulation
        return [chosen[each * (first + i) : each * (first + i + 1)] for i in range(self.options.accumulation)]

    def _drawn(self, rows: Sequence[int], step: int) -> Sequences:
        policy = Sampler(self.student, self.teacher, self.options.seed, step, self.longest)
        return self.learner.objective.draw(self.data.batch(rows, self.device), policy)

    @torch.no_grad()
    def _ask(self, batch: Sequences, cached: bool = True) -> tuple[Outputs | None, TeacherScores | None]:
        if self.teacher is None:
            return None, None
        if cached and self.cache is not None:
            length = int(batch.tokens.shape[1])
            return None, self.cache.scores(batch.rows, length, self.device)
        if "teacher" not in self.learner.objective.needs:
            return None, None
        needs = self.learner.objective.needs
        with self.accelerator.autocast():
            outputs = self.teacher(batch.inputs, "hidden" in needs, "attention" in needs)
        return outputs, TeacherScores(outputs.scores)

    def _example(self, objective: Objective) -> Step:
        batch = self.data.batch([0], self.device)
        taps = ("hidden" in objective.needs, "attention" in objective.needs)
        with torch.no_grad():
            theirs = None if self.teacher is None else self.teacher(batch.inputs, *taps)
            mine = self.student(batch.inputs, *taps)
        known = None if theirs is None else TeacherScores(theirs.scores)
        return view(mine, theirs, known, batch, self.causal, None)

    # --- looking, saving -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _look(self, model: Any) -> None:
        """Judge held-out data; keep the parameters if they are the best so far."""
        assert self.evaluation is not None
        whole = self.accelerator.unwrap_model(model)
        total, count = 0.0, 0
        size = max(1, self.options.batch_size // (self.accelerator.num_processes * self.options.accumulation))
        rows = list(
            range(self.accelerator.process_index, len(self.evaluation), self.accelerator.num_processes)
        )
        most = -(-len(self.evaluation) // self.accelerator.num_processes)  # calls of sharded models are joint
        for start in range(0, most, size):
            chosen = rows[start : start + size]
            batch = self.evaluation.batch(chosen or [0], self.device)
            with self.accelerator.autocast(), gathered(model):
                teacher, known = self._ask(batch, cached=False)
                loss = float(whole(batch, teacher, known, True))
            if chosen:
                total += loss
                count += self.learner.count(batch, self.example)
        loss = self._total(total) / max(1.0, self._total(count))
        self._check_finite(loss, self.result.steps, "held-out loss")
        self.result.held_out.append((self.result.steps, loss))
        self._log({"held-out loss": loss}, self.result.steps)
        if loss < self.best_loss:
            self.best_loss, self.waited, self.result.best = loss, 0, self.result.steps
            self.best = trained_tensors(model)
        else:
            self.waited += 1
            self.result.stopped = self.options.patience is not None and self.waited >= self.options.patience

    def _save(self, model: Any, optimizer: Any) -> None:
        state = {
            "step": self.result.steps,
            "tokens": self.result.tokens,
            "losses": self.result.losses,
            "held_out": self.result.held_out,
            "best": self.result.best,
            "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
            "waited": self.waited,
            "stopped": self.result.stopped,
        }
        snapshot = take_snapshot(model, optimizer, self.best, state)
        if self.accelerator.is_main_process and self.store is not None:
            self.store.save(snapshot)
        self.accelerator.wait_for_everyone()

    def _resume(self, model: Any, optimizer: Any) -> None:
        snapshot = self.store.last() if self.store is not None else None
        if snapshot is None:
            return
        read_snapshot(model, optimizer, snapshot)
        state = snapshot.state
        self.result.steps, self.result.tokens = state["step"], state["tokens"]
        self.result.losses = list(state["losses"])
        self.result.held_out = [(int(step), float(loss)) for step, loss in state["held_out"]]
        self.result.best, self.result.stopped = state["best"], state["stopped"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self.best, self.waited = dict(snapshot.best), state["waited"]

    def _total(self, value: float) -> float:
        """The sum over processes."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        return float(self.accelerator.reduce(tensor, "sum"))

    def _log(self, values: dict[str, float], step: int) -> None:
        if self.options.log_dir is not None:
            self.accelerator.log(values, step=step)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """End trackers however the run ends."""
        with ExitStack() as stack:
            if self.options.log_dir is not None:
                self.accelerator.init_trackers("distill")
                stack.callback(self.accelerator.end_training)
            yield


class _Steps:
    """What an objective may look at before training: the data in order, once per iteration."""

    def __init__(self, run: _Run) -> None:
        self.run = run

    def __iter__(self) -> Iterator[Step]:
        run, needs = self.run, self.run.learner.objective.needs
        size = run.options.batch_size
        for number in range(10**9):
            rows = [row_at(number * size + i, len(run.data), run.options.seed) for i in range(size)]
            batch = run.data.batch(rows, run.device)
            with torch.no_grad():
                teacher, known = run._ask(batch, cached=False)
                mine = run.student(batch.inputs, "hidden" in needs, "attention" in needs)
            yield view(mine, teacher, known, batch, run.causal, run.learner.layers)
