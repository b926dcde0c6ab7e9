"""``fxcompress compress``."""

from __future__ import annotations

import shutil
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from fxcompress.artifact import check_target
from fxcompress.cli.common import (
    DebugOption,
    DeviceOption,
    DType,
    DTypeOption,
    JsonOption,
    command,
    emit,
    is_artifact,
    need_tokenizer,
    note,
    read_text,
)
from fxcompress.errors import CalibrationError, RecipeError


class Verify(StrEnum):
    """When passes are proved and errors are measured."""

    EACH = "each"
    END = "end"
    OFF = "off"


@command
def compress(
    model: Annotated[Path, typer.Argument(exists=True, help="A Hugging Face model folder or a GGUF file.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name or YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to create.")],
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            "-c",
            exists=True,
            dir_okay=False,
            help="UTF-8 text like what the model will see. Without it, recipes that need data use text which"
            " the model writes itself.",
        ),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DTypeOption = DType.AUTO,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens per calibration sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    verify: Annotated[Verify, typer.Option(help="When to prove passes and measure errors.")] = Verify.END,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Directory for finished steps; run again to continue.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a compressed model at OUT.")
    ] = False,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Save a checkpoint that transformers loads without fxcompress (pruned models with dense"
            " weights).",
        ),
    ] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compress MODEL by a recipe and save it."""
    import fxcompress
    from fxcompress.hf import load_hf_model
    from fxcompress.machine import torch_device

    chosen = fxcompress.Recipe.load(recipe)
    check_target(output, overwrite=overwrite and not plain)
    if is_artifact(model):
        raise RecipeError(
            f"{model}: is already compressed.", fix="compress the original with one longer recipe."
        )
    note(f"loading {model}")
    loaded, tokenizer = load_hf_model(model, dtype=dtype.torch, device=torch_device(device))
    data = None
    if calibration is not None:
        windows = sequences(read_text(calibration), need_tokenizer(model, tokenizer), samples, length)
        names = ["input_ids"] + ["decoder_input_ids"] * bool(loaded.config.is_encoder_decoder)
        data = [dict.fromkeys(names, ids) for ids in windows.to(device)]
    started = time.perf_counter()
    small = fxcompress.compress(
        loaded,
        chosen,
        data,
        tokenizer=tokenizer,
        verify=verify.value,
        seed=seed,
        progress=True,
        checkpoint=checkpoint,
        samples=samples,
    )
    seconds = time.perf_counter() - started
    del loaded
    if plain:
        small.save_pretrained(output)
    else:
        small.save(output, overwrite=overwrite)
    summary = {
        "output": str(output),
        "seconds": round(seconds, 1),
        "bytes_on_disk": sum(f.stat().st_size for f in output.rglob("*") if f.is_file()),
        "report": small.report.to_dict(),
    }
    if json_output:
        emit(summary, True)
    else:
        show_report(small.report)
        note(f"saved to {output} after {seconds:.0f} s")


def sequences(text: str, tokenizer: Any, samples: int, length: int) -> Tensor:
    """Calibration sequences ``[S, 1, T]`` spread evenly over ``text``, each in the tokenizer's own marks.

    Raises:
        CalibrationError: the text has less than one sequence.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    before, after = full[:at], full[at + len(plain) :]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = length - len(before) - len(after)
    count = len(ids) // room if room > 0 else 0
    if not count:
        raise CalibrationError(
            f"calibration: the text has {len(ids)} tokens, one sequence of {length} needs {max(room, 1)}.",
            fix="give a longer text, or a smaller --length.",
        )
    kept = min(samples, count)
    starts = [i * count // kept * room for i in range(kept)]
    return torch.tensor([[[*before, *ids[start : start + room], *after]] for start in starts])


def show_report(report: Any) -> None:
    """Print a report as wide as its names need, also where there is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(160, shutil.get_terminal_size().columns))
    report.show(console)
