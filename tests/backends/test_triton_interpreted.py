"""Every family of generated Triton kernels computes what the reference computes, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.triton_checks import CHECKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Errors by check; one process runs them all, since the interpreter is chosen when triton is imported."""
    folder = tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FXCOMPRESS_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.triton_checks"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_matches_the_reference(results: dict[str, str | None], check: str) -> None:
    assert results[check] is None, results[check]
