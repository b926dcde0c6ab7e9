"""What precedes timing on a GPU, on all processors side by side: checks, and compiling what will be timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARDS = 13
"""Processes that compile kernels of products."""


def prepare(
    device: str, examples: int, programs: dict[str, list[str]], limit: float
) -> dict[str, dict[str, Any]]:
    """Run programs side by side.

    Args:
        device: Where they run.
        examples: Of every check.
        programs: Arguments of Python by name.
        limit: Seconds after which a program is stopped.

    Returns:
        By name: ``seconds``, and ``found`` (the JSON of the last line printed) or ``error``.
    """
    environment = {
        **os.environ,
        "FXCOMPRESS_CHECK_DEVICE": device,
        "FXCOMPRESS_CHECK_EXAMPLES": str(examples),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        "OMP_NUM_THREADS": "2",
    }

    def run(arguments: list[str]) -> dict[str, Any]:
        started = time.monotonic()
        command = [sys.executable, *arguments]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired as error:
            said = error.stderr if isinstance(error.stderr, str) else (error.stderr or b"").decode()
            return {"seconds": limit, "error": f"stopped after {limit:.0f} s\n{said[-4000:]}"}
        row: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
        try:
            return {**row, "found": json.loads(done.stdout.splitlines()[-1])}
        except (IndexError, ValueError):
            return {**row, "error": done.stderr[-6000:]}

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return dict(zip(programs, pool.map(run, programs.values()), strict=True))


def checks() -> dict[str, list[str]]:
    """Programs that compare kernels, and whole models on them, with the reference."""
    from tests.backends import triton_checks, triton_decoders, triton_models

    found = {
        f"kernels: {name}": ["-m", "tests.backends.triton_checks", name] for name in triton_checks.CHECKS
    }
    for part, module, names in (
        ("layers", "tests.backends.triton_models", [*triton_models.RECIPES, "cache"]),
        ("decoder", "tests.backends.triton_decoders", [*triton_decoders.RECIPES, "torch.compile"]),
    ):
        found |= {f"{part}: {name}": ["-m", module, name] for name in names}
    return found


def compilers(arguments: list[str]) -> dict[str, list[str]]:
    """Programs that compile the kernels of ``gpu.py``'s products; ``arguments`` are its own."""
    module = "tests.benchmarks.gpu_compile"
    return {f"compile: {n}": ["-m", module, f"--shard={n}/{SHARDS}", *arguments] for n in range(SHARDS)}


LARGEST_ERROR = 2e-2
"""Relative, of logits in float16 beside the reference; the checks of kernels bound theirs by themselves.

Where activations are rounded to codes, sums in another order give some of them the next code: the reference
is then one of several equally good results, and the difference must be smaller than what compression costs.
"""


def largest(row: dict[str, Any]) -> float:
    """The error from which a model is wrong."""
    return max(LARGEST_ERROR, 0.75 * row.get("compression", 0.0))


def verdicts(prepared: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """Error or None by check."""
    found: dict[str, str | None] = {}
    for name, row in prepared.items():
        if name.startswith("compile"):
            continue
        if "error" in row:
            found[name] = row["error"]
        elif name.startswith("kernels"):
            found |= {f"kernels: {check}": error for check, error in row["found"].items()}
        else:
            rows = row["found"].values()
            wrong = [row["error"] for row in rows if "error" in row and not row["error"] < largest(row)]
            wrong += [row["loaded"] for row in rows if row.get("loaded")]
            found[name] = f"differs from the reference: {wrong}" if wrong else None
    return found
