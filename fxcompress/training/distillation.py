"""``fxcompress.distill``: train a compressed (or small) model to give what a teacher gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxcompress.calibration.signature import CallSignature
from fxcompress.errors import TrainingError
from fxcompress.model import CompressedModel
from fxcompress.progress import ProgressOption
from fxcompress.training.catalogue import objective_from
from fxcompress.training.data import as_training
from fxcompress.training.graph import TrainingGraph
from fxcompress.training.loop import train
from fxcompress.training.models import Captured, capture, longest_sequence
from fxcompress.training.options import TrainingOptions
from fxcompress.training.scores import vocabulary_mismatch
from fxcompress.training.trainable import PARTS, What

__all__ = ["distill"]


def distill(
    student: CompressedModel | nn.Module,
    teacher: CompressedModel | nn.Module | None,
    data: Any,
    *,
    objective: Any = "kd",
    train_parts: Sequence[str] = ("weights",),
    what: What | None = None,
    options: TrainingOptions | None = None,
    held_out: Any = 0.1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tokenizer: Any | None = None,
    example_inputs: Any | None = None,
    samples: int = 1024,
    sequence_length: int | None = None,
    checkpoint: str | Path | None = None,
    progress: ProgressOption = True,
    on_result: Any | None = None,
    **settings: Any,
) -> CompressedModel:
    """Train a student on what a teacher gives, and return it as a compressed model.

    The student computes in its compressed form all along, so the result is what was trained, bit for bit in
    the model's own precision.

    Args:
        student: A compressed model, or a module (small, or made smaller elsewhere); not changed.
        teacher: A module or a compressed model with the same vocabulary; None for objectives without one.
        data: A text file, texts (both need ``tokenizer``), tensors, mappings of inputs (with ``labels``
            optionally), an iterable of these, or a builder ``(teacher, tokenizer) → data``, e.g.
            :class:`fxcompress.training.data.SelfGenerated`.
        objective: A name, ``{name: {option: value}}`` or an
            :class:`~fxcompress.training.objective.Objective`. Default ``"kd"``.
        train_parts: What is trained, see :class:`~fxcompress.training.trainable.What`. Default the weights.
        what: The whole choice, in place of ``train_parts``, ``include`` and ``exclude``.
        options: Of the loop; ``settings`` are its fields, e.g. ``steps=500``.
        held_out: Held-out data of any kind above, or the share of ``data`` to hold out; 0 holds out nothing.
            Default 0.1.
        include: Patterns of parameter names to train; empty takes all.
        exclude: Patterns of names to leave alone.
        tokenizer: For text; saved with the result.
        example_inputs: One call of both models. Default: made from their configuration.
        samples: At most this many sequences. Default 1024.
        sequence_length: Tokens per sequence of a text. Default 512.
        checkpoint: Folder of snapshots; the same call goes on there, exactly.
        progress: Show a progress bar.
        on_result: Called with the :class:`~fxcompress.training.result.TrainingResult` (losses, looks).
        **settings: Fields of :class:`~fxcompress.training.options.TrainingOptions`.

    Raises:
        TrainingError: models do not fit each other or the data, nothing to train, a loss that is NaN or inf.
        CalibrationError: data are missing or malformed.
        CaptureError: a model cannot be captured.

    Example:
        >>> small = fxcompress.compress(model, "w3a16-gptq", text, tokenizer=tokenizer)  # doctest: +SKIP
        >>> healed = fxcompress.distill(small, model, text, tokenizer=tokenizer, steps=500)  # doctest: +SKIP
        >>> healed.save("out")  # doctest: +SKIP
    """
    chosen = objective_from(objective)
    loop = _options(options, settings)
    what = what if what is not None else _what(tuple(train_parts), tuple(include), tuple(exclude), loop.seed)
    if "teacher" in chosen.needs and teacher is None:
        raise TrainingError(f"objective {chosen.describe()!r} needs a teacher.", fix="pass the teacher.")
    mine = capture(student, example_inputs, masks=True)
    theirs = None if teacher is None else capture(teacher, example_inputs, masks=False)
    if theirs is not None:
        _check_vocabularies(mine, theirs)
    limits = [longest_sequence(c.module) for c in (mine, theirs) if c is not None]
    longest = min((limit for limit in limits if limit is not None), default=None)
    reading: dict[str, Any] = {
        "tokenizer": tokenizer if tokenizer is not None else getattr(student, "tokenizer", None),
        "teacher": teacher,
        "samples": samples,
        "sequence_length": sequence_length,
        "longest": longest,
    }
    learned, held = as_training(data, mine.plan.program, **reading), None
    if isinstance(held_out, float | int) and not isinstance(held_out, bool):
        if held_out:
            learned, held = learned.split(float(held_out))
    elif held_out is not None:
        held = as_training(held_out, mine.plan.program, **reading)
    graph = TrainingGraph(
        mine.plan,
        mine.state,
        what,
        originals={} if theirs is None else _originals(mine, theirs),
        checkpointing=loop.checkpointing,
    )
    frozen = None if theirs is None else TrainingGraph(theirs.plan, theirs.state, None)
    result = train(
        graph,
        frozen,
        learned,
        chosen,
        loop,
        evaluation=held,
        checkpoint=checkpoint,
        longest=longest,
        progress=progress,
    )
    if on_result is not None:
        on_result(result)
    return mine.finish(list(graph.trainable.edits(result.describe())), result, tokenizer)


def _originals(student: Captured, teacher: Captured) -> dict[str, Tensor]:
    """What the student's codes were made from, if the teacher is its original: equal names and shapes."""
    own = teacher.plan.program.weights
    return {
        name: own[name]
        for name in student.state.forms
        if name in own
        and own[name].shape == student.plan.program.weights[name].shape
        and not teacher.state.is_compressed(name)
    }


def _options(options: TrainingOptions | None, settings: dict[str, Any]) -> TrainingOptions:
    known = [field.name for field in dataclasses.fields(TrainingOptions)]
    for name in settings:
        if name not in known:
            raise TrainingError(f"training: unknown option {name!r}.", fix=f"known: {', '.join(known)}.")
    return dataclasses.replace(options or TrainingOptions(), **settings)


def _what(parts: tuple[str, ...], include: tuple[str, ...], exclude: tuple[str, ...], seed: int) -> What:
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise TrainingError(f"training: unknown part {unknown[0]!r}.", fix=f"known: {', '.join(PARTS)}.")

    def chosen(name: str) -> bool:
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            return False
        return not include or any(fnmatchcase(name, pattern) for pattern in include)

    return What(parts=parts, chosen=chosen, seed=seed)


def _check_vocabularies(student: Captured, teacher: Captured) -> None:
    """Refuse tables of other sizes before anything runs."""
    sizes = [
        max((v.rows for v in CallSignature(c.plan.program).vocabularies.values()), default=0)
        for c in (student, teacher)
    ]
    if 0 not in sizes and sizes[0] != sizes[1]:
        raise vocabulary_mismatch(sizes[1], sizes[0])
