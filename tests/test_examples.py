"""The examples run as written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_pass_runs_and_is_reported() -> None:
    command = [sys.executable, str(EXAMPLES / "own_pass.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "zero" in done.stdout
    assert "quantize" in done.stdout
