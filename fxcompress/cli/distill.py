"""``fxcompress distill``."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fxcompress.artifact import check_target
from fxcompress.cli.common import (
    DebugOption,
    DType,
    DTypeOption,
    JsonOption,
    command,
    emit,
    load_any,
    need_tokenizer,
    note,
)
from fxcompress.errors import TrainingError

if TYPE_CHECKING:
    from fxcompress.training.result import TrainingResult


@command
def distill(
    student: Annotated[
        Path, typer.Argument(exists=True, help="A compressed model, or the folder of a small one.")
    ],
    data: Annotated[
        Path, typer.Option("--data", exists=True, dir_okay=False, help="UTF-8 text to learn from.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to create.")],
    teacher: Annotated[
        Path | None,
        typer.Option("--teacher", "-t", exists=True, help="What the student learns from."),
    ] = None,
    objective: Annotated[
        str, typer.Option(help='A name of `list`, or JSON: \'{"kd": {"hard_ratio": 0.5}}\'.')
    ] = "kd",
    train: Annotated[
        list[str] | None,
        typer.Option("--train", help="What is trained (may be repeated): weights, lora, scales, …"),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text to look at only; else a tenth of the data."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Parts a step is computed in.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW; 2e-5 suits weights, 1e-4 LoRA.")] = 1e-4,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    samples: Annotated[int, typer.Option(min=1, help="Sequences of the text to use.")] = 1024,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Looks at held-out text without gain before it stops.")
    ] = None,
    top_k: Annotated[
        int,
        typer.Option(min=0, help="Ask the teacher once and keep its K likeliest outcomes; 0 asks always."),
    ] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Directory of snapshots; run again to continue.")
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Directory for TensorBoard.")] = None,
    dtype: DTypeOption = DType.AUTO,
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a compressed model at OUT.")
    ] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train STUDENT in its compressed form to give what TEACHER gives, and save it."""
    import fxcompress
    from fxcompress.training.catalogue import objective_from

    check_target(output, overwrite=overwrite)
    chosen = objective_from(parsed_objective(objective))
    if "teacher" in chosen.needs and teacher is None:
        raise TrainingError(f"objective {chosen.describe()!r} needs a teacher.", fix="give --teacher.")
    note(f"loading {student}")
    small, tokenizer = load_any(student, device="cpu", dtype=dtype, backend="eager")
    original = None
    if teacher is not None:
        original, tokens = load_any(teacher, device="cpu", dtype=dtype, backend="eager")
        tokenizer = tokenizer if tokenizer is not None else tokens
    results: list[TrainingResult] = []
    started = time.perf_counter()
    healed = fxcompress.distill(
        *(small, original, data),
        objective=chosen,
        train_parts=tuple(train or ("weights",)),
        held_out=0.1 if held_out is None else held_out,
        tokenizer=need_tokenizer(student, tokenizer),
        samples=samples,
        sequence_length=length,
        checkpoint=checkpoint,
        on_result=results.append,
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        patience=patience,
        top_k=top_k,
        log_dir=None if log_dir is None else str(log_dir),
        seed=seed,
    )
    healed.save(output, overwrite=overwrite)
    summary = {"output": str(output), "seconds": round(time.perf_counter() - started, 1)}
    emit({**summary, **dataclasses.asdict(results[0])}, json_output, looks(results[0]))
    note(f"saved to {output} after {summary['seconds']:.0f} s")


def looks(result: TrainingResult) -> Table:
    """Losses on held-out text, and what was learned on the way."""
    table = Table("step", "held-out loss", "", box=None, padding=(0, 2, 0, 0), title=result.describe())
    for step, loss in result.held_out:
        table.add_row(str(step), f"{loss:.4f}", "kept" if step == result.best else "")
    return table


def parsed_objective(text: str) -> Any:
    """A name, or the content of JSON.

    Raises:
        TrainingError: it looks like JSON and is none.
    """
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TrainingError(
            f"objective: {error} in {text!r}.", fix='write \'{"kd": {"hard_ratio": 0.5}}\'.'
        ) from error
