"""Train the compressed model to give what the original gives, as a whole and on calibration data.

    min over weights, scales or branches of  Σ tokens D(original(x) ‖ compressed(x; rounded, masked, cut))

What is trained stays in its form: codes are rounded anew in every step and gradients pass straight through
(Liu et al., 2023, LLM-QAT, arXiv:2305.17888; learned steps: Esser et al., 2020, LSQ, arXiv:1902.08153),
scales alone (Kim et al., 2023, PEQA, arXiv:2305.14152), or low-rank branches beside frozen weights (Hu et
al., 2021, LoRA, arXiv:2106.09685; Dettmers et al., 2023, QLoRA, arXiv:2305.14314). Keeps: every shape, masks,
number formats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from fxcompress.calibration.plan import Plan
from fxcompress.edits import CompressionState, Edit
from fxcompress.errors import CalibrationError, RecipeError, TrainingError
from fxcompress.pass_base import BlockContext, SurveyContext
from fxcompress.passes._selection import SelectivePass
from fxcompress.training.catalogue import objective_from
from fxcompress.training.data import as_training
from fxcompress.training.graph import TrainingGraph
from fxcompress.training.loop import train
from fxcompress.training.objective import Objective
from fxcompress.training.options import TrainingOptions
from fxcompress.training.trainable import PARTS, Steps, What


@dataclass(frozen=True)
class Distill(SelectivePass):
    """Fine-tune what earlier passes made, the original model as teacher.

    Part of the calibration data is held out; the best parameters on it are kept. Use a few hundred sequences
    (``compress(..., samples=…)``).

    Args:
        objective: A name, or ``{name: {option: value}}``; several names are summed, each with its ``weight``.
            Default ``"kd"``: the teacher's distribution of the next token.
        train: What: any of ``"weights"``, ``"embeddings"``, ``"scales"``, ``"lora"``, ``"floats"`` and
            ``"activations"``, see :class:`fxcompress.training.trainable.What`. Default weights.
        scale_steps: Scales of codes trained with ``"weights"``: ``"learned"`` (default, LSQ), ``"fixed"`` or
            ``"range"`` (the weight's range in every step, LLM-QAT).
        rank: Of LoRA branches. Default 16.
        alpha: Their scaling is alpha/rank. Default 16 (a scaling of 1).
        steps: Optimiser steps, one batch each. Default 200.
        batch_size: Sequences per step. Default 8.
        accumulation: Micro-batches per step and process. Default 1.
        learning_rate: Of AdamW. Default 1e-4.
        schedule: ``"cosine"`` (default), ``"linear"`` or ``"constant"``.
        warmup: Share of steps with a rising rate. Default 0.03.
        weight_decay: Default 0.
        clip_norm: Largest norm of the gradients, 0 for none. Default 1.
        precision: ``"no"`` (default), ``"bf16"`` or ``"fp16"``.
        held_out: Share of the sequences that is held out. Default 0.1.
        patience: Looks at held-out data without improvement before stopping; None (default) never.
        top_k: Keep the teacher's likeliest outcomes instead of asking it in every step; 0 (default) asks.
        log_dir: Folder for TensorBoard; None (default) writes nothing.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: fewer than two sequences.
        TrainingError: nothing to train, or the loss is NaN or inf.

    Example:
        >>> Distill(objective={"kd": {"hard_ratio": 0.5}}, train=("lora",), rank=8).rank
        8
    """

    objective: str | dict[str, dict[str, Any] | None] = "kd"
    train: tuple[str, ...] = ("weights",)
    scale_steps: Literal["learned", "fixed", "range"] = "learned"
    rank: int = 16
    alpha: float = 16.0
    steps: int = 200
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    held_out: float = 0.1
    patience: int | None = None
    top_k: int = 0
    log_dir: str | None = field(default=None)

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "Train the compressed model to give what the original gives."
    source: ClassVar[str] = "Hinton et al., 2015 (arXiv:1503.02531); Liu et al., 2023 (arXiv:2305.17888)"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [part for part in self.train if part not in PARTS]
        if unknown or not self.train:
            found = unknown[0] if unknown else self.train
            raise RecipeError(f"{self.name}: train={found!r}, expected any of {', '.join(PARTS)}.")
        if type(self.rank) is not int or self.rank < 1:
            raise RecipeError(f"{self.name}: rank={self.rank!r}, expected a positive integer.")
        if not 0 < self.held_out < 1:
            raise RecipeError(f"{self.name}: held_out={self.held_out!r}, expected a share between 0 and 1.")
        try:
            self.made_objective()
            self.options(0)
        except TrainingError as error:
            raise RecipeError(f"{self.name}: {error}") from None

    def made_objective(self) -> Objective:
        """The objective that the options name."""
        return objective_from(self.objective)

    def options(self, seed: int) -> TrainingOptions:
        """The loop's options."""
        names = {field.name for field in dataclasses.fields(TrainingOptions)}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
        return TrainingOptions(**own, seed=seed)

    def what(self, model: SurveyContext, seed: int) -> What:
        """What is trained of a model."""
        steps: Steps = self.scale_steps
        return What(
            parts=tuple(self.train),
            steps=steps,
            rank=self.rank,
            alpha=self.alpha,
            chosen=lambda name: self.unselected(model.program, name) is None,
            seed=seed,
        )

    def survey(self, model: SurveyContext) -> dict[int, list[Edit]]:
        """Train; the edits of every block."""
        self.check_patterns(model.program)
        if model.data is None:
            raise CalibrationError(
                f"{self.name}: there are no data to learn from.", fix="pass calibration=…."
            )
        seed = int(torch.randint(0, 2**31, (), generator=model.generator))
        learned, held = as_training(model.data, model.program).split(self.held_out)
        plan, original = Plan(model.program), Plan(model.original)
        student = TrainingGraph(plan, model.state, self.what(model, seed))
        teacher = TrainingGraph(original, CompressionState(model.original.weights), None)
        result = train(
            student,
            teacher,
            learned,
            self.made_objective(),
            self.options(seed),
            evaluation=held,
            checkpoint=model.folder,
            progress=model.progress,
        )
        return _by_block(plan, list(student.trainable.edits(result.describe())))

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield what training made of the block's parameters."""
        yield from block.survey.get(block.index, ())


def _by_block(plan: Plan, edits: Sequence[Edit]) -> dict[int, list[Edit]]:
    """Edits by the first block that uses their parameter."""
    found: dict[int, list[Edit]] = {}
    for edit in edits:
        users = [user for node in plan.program.weight_node(edit.name) for user in node.users]
        first = min((plan.block_of[user] for user in users if user in plan.block_of), default=0)
        found.setdefault(first, []).append(edit)
    return found
