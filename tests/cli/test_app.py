"""Conventions of all commands: help, exit codes, one-line errors, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fxcompress
from fxcompress.cli import catalogue
from tests.cli.conftest import Run

COMMANDS = ("compress", "eval", "bench", "generate", "export", "inspect", "list")


def test_help_names_every_command_and_the_exit_codes(run: Run) -> None:
    done = run("--help")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in COMMANDS)
    assert "Exit codes: 0 success, 1 failure, 2 wrong usage" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_json_and_debug(run: Run, name: str) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout
    assert "--debug" in done.stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout.strip() == fxcompress.__version__


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("compress",),
        ("compress", "/no/such/model", "-r", "w8a16", "-o", "out"),
        ("inspect", "/no/such/folder"),
        ("generate", ".", "--prompt", "a", "--max-new-tokens", "0"),
        ("eval", "."),
        ("list", "--unknown"),
    ],
)
def test_wrong_usage_exits_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert not done.stdout
    assert "Usage:" in done.stderr


def test_failure_is_one_line_and_exits_with_1(run: Run, tmp_path: Path) -> None:
    done = run("inspect", tmp_path)
    assert done.exit_code == 1
    assert not done.stdout
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_failure_as_json(run: Run, tmp_path: Path) -> None:
    done = run("inspect", tmp_path, "--json")
    assert done.exit_code == 1
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "ArtifactError"
    assert done.stderr.strip() == f"error: {error['message']}"


def test_debug_lets_the_error_through(run: Run, tmp_path: Path) -> None:
    done = run("inspect", tmp_path, "--debug")
    assert done.exit_code == 1
    assert isinstance(done.exception, fxcompress.FxCompressError)


def test_unexpected_error_says_how_to_see_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise ZeroDivisionError("of\nnothing")

    monkeypatch.setattr(catalogue, "_passes", broken)
    done = run("list")
    assert done.exit_code == 1
    assert done.stderr == (
        "error: unexpected ZeroDivisionError: of nothing (run again with --debug for the traceback)\n"
    )


def test_interruption_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "_passes", interrupted)
    done = run("list")
    assert done.exit_code == 130
    assert done.stderr == "error: interrupted\n"


def test_list(run: Run) -> None:
    done = run("list", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["recipes"] == fxcompress.recipes()
    assert {"gptq", "quantize-weights", "smooth-activations"} <= set(found["passes"])
    assert {"inductor", "eager"} <= set(found["backends"])
    summaries = [text for entries in found.values() for text in entries.values()]
    assert all(text and not text.startswith("cannot be loaded") for text in summaries)
    shown = run("list").stdout
    assert all(name in shown for entries in found.values() for name in entries)


def test_installed_program_runs(tmp_path: Path) -> None:
    code = "import sys; from fxcompress.cli import app; sys.argv = ['fxcompress', 'inspect', '.']; app()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: manifest.json: missing")
    assert "Traceback" not in done.stderr
