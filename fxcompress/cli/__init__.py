"""The command line: ``fxcompress compress | distill | eval | bench | generate | export | inspect | list``.

Results go to standard output, as tables or, with ``--json``, as one JSON document; progress and errors go to
standard error. Exit codes: 0 success, 1 failure (the message says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import typer

from fxcompress.cli.bench import bench
from fxcompress.cli.catalogue import list_all
from fxcompress.cli.compress import compress
from fxcompress.cli.distill import distill
from fxcompress.cli.evaluate import evaluate
from fxcompress.cli.export import export
from fxcompress.cli.generate import generate
from fxcompress.cli.inspect import inspect

__all__ = ["app"]

app = typer.Typer(
    name="fxcompress",
    help="Compress PyTorch models by their graph, and measure what it cost.\n\n"
    "Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress")(compress)
app.command("distill")(distill)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.command("generate")(generate)
app.command("export")(export)
app.command("inspect")(inspect)
app.command("list")(list_all)


def _version(value: bool) -> None:
    if value:
        from fxcompress import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Compress PyTorch models by their graph, and measure what it cost."""
