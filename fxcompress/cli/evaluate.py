"""``fxcompress eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fxcompress.cli.common import (
    BackendOption,
    DebugOption,
    DeviceOption,
    DType,
    DTypeOption,
    ExistingPath,
    JsonOption,
    command,
    emit,
    load_any,
    need_tokenizer,
    note,
    read_text,
)
from fxcompress.errors import FxCompressError


@command
def evaluate(
    path: ExistingPath,
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Held-out UTF-8 text.")],
    reference: Annotated[
        Path | None, typer.Option(exists=True, help="The model before compression, to compare with.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    windows: Annotated[int, typer.Option(min=0, help="Windows, spread over the text; 0 for all.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Windows per call.")] = 1,
    device: DeviceOption = "cpu",
    dtype: DTypeOption = DType.AUTO,
    backend: BackendOption = "inductor",
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure the quality of PATH: perplexity, and agreement with --reference.

    Encoders have no perplexity: with --reference, the cosine similarity of their outputs is measured.
    """
    from fxcompress.evaluate import agreement, perplexity, similarity, text_windows

    note(f"loading {path}")
    model, tokenizer = load_any(path, device=device, dtype=dtype, backend=backend)
    other, other_tokenizer = (
        load_any(reference, device=device, dtype=dtype, backend=backend) if reference else (None, None)
    )
    tokenizer = need_tokenizer(path, tokenizer or other_tokenizer)
    ids = text_windows(read_text(text), tokenizer, length=length, windows=windows or None).to(device)
    result: dict[str, Any] = {"model": str(path), "text": str(text), "window": length, "windows": len(ids)}
    if model.config.is_encoder_decoder:
        raise FxCompressError(f"{path}: encoder-decoders cannot be evaluated on plain text.")
    if not generates(model):
        if other is None:
            raise FxCompressError(f"{path}: not a language model with logits.", fix="give --reference.")
        result["similarity"] = similarity(model, other, ids.split(batch)).to_dict()
    else:
        result["quality"] = perplexity(model, ids, batch=batch, progress=True).to_dict()
        if other is not None:
            result["reference"] = str(reference)
            result["reference_quality"] = perplexity(other, ids, batch=batch, progress=True).to_dict()
            result["agreement"] = agreement(model, other, ids, batch=batch, progress=True).to_dict()
    emit(result, json_output, _table(result))


def generates(model: Any) -> bool:
    """Whether it is a language model that can generate text."""
    able = getattr(model, "can_generate", None) or getattr(
        getattr(model, "model", None), "can_generate", None
    )
    return bool(able()) if callable(able) else False


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['windows']} windows of {result['window']} tokens of {Path(result['text']).name}"
    table = Table("measure", "value", title=title, title_justify="left")
    if "quality" in result:
        table.add_row("perplexity", _number(result["quality"]["perplexity"]))
    if "reference_quality" in result:
        before, after = result["reference_quality"]["perplexity"], result["quality"]["perplexity"]
        table.add_row("perplexity of the reference", _number(before))
        if before and after:
            table.add_row("change", f"{after / before - 1:+.2%}")
        table.add_row("KL to the reference, nats per token", _number(result["agreement"]["kl"], 3))
        table.add_row("same most likely token", f"{result['agreement']['top1']:.2%}")
    if "similarity" in result:
        table.add_row("mean cosine similarity", _number(result["similarity"]["mean"], 6))
        table.add_row("smallest cosine similarity", _number(result["similarity"]["worst"], 6))
    return table


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
