"""``fxcompress inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxcompress.cli.common import DebugOption, JsonOption, command, emit
from fxcompress.cli.compress import show_report


@command
def inspect(
    path: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A compressed model.")],
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check a compressed model's files and show what happened to every weight."""
    from fxcompress import Report
    from fxcompress.artifact import read_artifact

    artifact = read_artifact(path)
    files = {f.relative_to(path).as_posix(): f.stat().st_size for f in sorted(path.rglob("*")) if f.is_file()}
    replaced = sum(artifact.is_replaced(name) for name in artifact.parameters)
    data = {
        "model": artifact.identity.class_name,
        "kind": artifact.identity.kind,
        "recipe": artifact.recipe,
        "fingerprint": artifact.fingerprint,
        "weights": len(artifact.parameters),
        "replaced": replaced,
        "bytes_on_disk": sum(files.values()),
        "files": files,
        "report": artifact.report,
    }
    if json_output:
        emit(data, True)
        return
    show_report(Report.from_dict(artifact.report))
    typer.echo(
        f"{artifact.identity.class_name}: {replaced} of {len(artifact.parameters)} weights are replaced,"
        f" {sum(files.values()) / 1e6:.1f} MB on disk in {len(files)} files, all intact"
    )
