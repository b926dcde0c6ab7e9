"""``fxcompress generate``."""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer

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
)
from fxcompress.cli.evaluate import generates
from fxcompress.errors import FxCompressError


@command
def generate(
    path: ExistingPath,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What the text begins with, or the question.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    device: DeviceOption = "cpu",
    dtype: DTypeOption = DType.AUTO,
    backend: BackendOption = "inductor",
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Continue a prompt with PATH."""
    note(f"loading {path}")
    model, tokenizer = load_any(path, device=device, dtype=dtype, backend=backend)
    tokenizer = need_tokenizer(path, tokenizer)
    if not generates(model):
        raise FxCompressError(f"{path}: cannot generate text.")
    inputs = {key: value.to(device) for key, value in encode(tokenizer, prompt, chat=chat).items()}
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    seconds = time.perf_counter() - started
    ids = inputs["input_ids"].shape[1]
    fresh = found[0].tolist()
    if fresh[:ids] == inputs["input_ids"][0].tolist():  # encoder-decoders answer without the prompt
        fresh = fresh[ids:]
    answer = tokenizer.decode(fresh, skip_special_tokens=True)
    result = {"prompt": prompt, "text": answer, "tokens": fresh, "seconds": round(seconds, 2)}
    if json_output:
        emit(result, True)
    else:
        typer.echo(answer)
        note(f"{len(fresh)} tokens in {seconds:.1f} s, compilation included")


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> dict[str, torch.Tensor]:
    """Token ids and mask of a prompt.

    Raises:
        FxCompressError: a chat was asked for and the tokenizer has no template.
    """
    if not chat:
        inputs = tokenizer(prompt, return_tensors="pt")
    elif not getattr(tokenizer, "chat_template", None):
        raise FxCompressError("the tokenizer has no chat template.", fix="leave out --chat.")
    else:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
