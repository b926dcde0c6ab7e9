"""``fxcompress export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxcompress.cli.common import DebugOption, JsonOption, command, emit, is_artifact, note
from fxcompress.errors import FxCompressError


@command
def export(
    path: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A compressed model.")],
    out: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    cache: Annotated[
        bool, typer.Option("--cache", help="Keys and values as inputs and outputs, files for generators.")
    ] = False,
    opset: Annotated[int, typer.Option(help="Version of the ONNX standard, 21 to 24.")] = 21,
    target: Annotated[
        str, typer.Option(help="onnxruntime, or portable: standard operators only.")
    ] = "onnxruntime",
    external_data: Annotated[
        str, typer.Option(help="Weights in a file of their own: yes, no, or auto (from 2 GiB on).")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    attention: Annotated[str, typer.Option(help="With --cache: fused, or plain operators.")] = "fused",
    accuracy_level: Annotated[
        int | None, typer.Option(help="Of MatMulNBits: 4 (fast), 1 (exact). Default: as measured.")
    ] = None,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a compressed model as ONNX and check it in ONNX Runtime."""
    import fxcompress

    if not is_artifact(path):
        raise FxCompressError(f"{path}: not a compressed model.", fix="run fxcompress compress first.")
    choices: dict[str, bool | str] = {"yes": True, "no": False, "auto": "auto"}
    if external_data not in choices:
        raise FxCompressError(f"--external-data {external_data!r}: expected yes, no or auto.")
    note("exporting and checking in ONNX Runtime")
    report = fxcompress.load(path, backend="eager").export_onnx(
        out,
        cache=cache,
        opset=opset,
        target=target,
        external_data=choices[external_data],
        overwrite=overwrite,
        attention=attention,
        accuracy_level=accuracy_level,
    )
    if json_output:
        emit(report.to_dict(), True)
        return
    typer.echo(str(report))
