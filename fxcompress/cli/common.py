"""What all commands share: options, output and errors."""

from __future__ import annotations

import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console, RenderableType

from fxcompress.artifact.schema import MANIFEST
from fxcompress.errors import FxCompressError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1, …")]
BackendOption = Annotated[str, typer.Option("--backend", help="How compressed models run: see `list`.")]
ExistingPath = Annotated[
    Path,
    typer.Argument(exists=True, help="A compressed model, a Hugging Face model folder, or a GGUF file."),
]


class DType(StrEnum):
    """Dtypes a model can be loaded in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def torch(self) -> torch.dtype | None:
        """The torch dtype; None for ``auto``."""
        found: torch.dtype | None = None if self is DType.AUTO else getattr(torch, self.value)
        return found


DTypeOption = Annotated[
    DType, typer.Option("--dtype", help="Dtype to load the model in; auto is that of its files.")
]

C = TypeVar("C", bound=Callable[..., None])


def command(function: C) -> C:
    """Give a command its conventions: one-line errors and exit codes, quiet libraries, JSON errors."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        debug, as_json = bool(kwargs["debug"]), bool(kwargs["json_output"])
        _configure_logs(debug)
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            _fail(InterruptedError("interrupted"), as_json, code=130)
        except Exception as error:
            if debug:
                raise
            _fail(error, as_json, code=1)

    return run  # type: ignore[return-value]


def _configure_logs(debug: bool) -> None:
    if debug:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        return
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _fail(error: BaseException, as_json: bool, *, code: int) -> None:
    message = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, FxCompressError | OSError):
        message = f"unexpected {type(error).__name__}: {message} (run again with --debug for the traceback)"
    if as_json:
        typer.echo(json.dumps({"error": {"type": type(error).__name__, "message": message}}))
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def emit(data: Any, as_json: bool, *renderables: RenderableType) -> None:
    """Print the result: ``data`` as JSON, or the renderables."""
    if as_json:
        typer.echo(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    for renderable in renderables:
        console.print(renderable)


def note(text: str) -> None:
    """Tell on standard error what is going on."""
    typer.echo(text, err=True)


def is_artifact(path: Path) -> bool:
    """Whether ``path`` looks like a saved compressed model."""
    return path.is_dir() and (path / MANIFEST).is_file()


def load_any(path: Path, *, device: str, dtype: DType, backend: str) -> tuple[Any, Any]:
    """A compressed or an ordinary model, and its tokenizer or None.

    Raises:
        FxCompressError: it cannot be loaded.
    """
    import fxcompress
    from fxcompress.hf import load_hf_model
    from fxcompress.machine import torch_device

    where = torch_device(device)
    if not is_artifact(path):
        return load_hf_model(path, dtype=dtype.torch, device=where)
    model = fxcompress.load(path, backend=backend, device=where)
    return model, model.tokenizer


def need_tokenizer(path: Path, tokenizer: Any) -> Any:
    """``tokenizer``, unless there is none.

    Raises:
        FxCompressError: the model came without one.
    """
    if tokenizer is None:
        raise FxCompressError(
            f"{path}: has no tokenizer, which text needs.", fix="put the tokenizer's files into that folder."
        )
    return tokenizer


def read_text(path: Path) -> str:
    """The content of a UTF-8 file.

    Raises:
        FxCompressError: it is no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FxCompressError(f"{path}: not UTF-8 text (byte {error.start}).") from error


def megabytes(count: float) -> str:
    """Bytes as MB (10⁶)."""
    return f"{count / 1e6:,.1f}"
