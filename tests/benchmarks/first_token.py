"""Seconds from a new process to the first tokens of a saved model: nothing compiled before, and again.

Three processes per recipe: with empty caches (of generated kernels and of Inductor), and twice with what the
first has left. Each imports, loads the saved model, generates one token from a prompt, then two more (which
compiles the step). What Dynamo, AOTAutograd and Inductor took is read from torch's own counters; they nest.

Run: python -m tests.benchmarks.first_token [--recipes w4a8 w4a16] [--prompt 64]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PHASES = {
    "whole graphs (Dynamo, with all below)": "_compile.compile_inner",
    "our backend (with Inductor)": "OutputGraph.call_user_compiler",
    "Inductor": "compile_fx.<locals>.fw_compiler_base",
}


def child(folder: str, prompt: int) -> None:
    """One process; prints what it measured."""
    started = time.perf_counter()
    import torch

    import fxcompress

    torch.manual_seed(0)
    imported = time.perf_counter()
    small = fxcompress.load(folder)
    ids = torch.randint(1000, (1, prompt))
    loaded = time.perf_counter()
    tokens = small.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
    first = time.perf_counter()
    small.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    second = time.perf_counter()
    from torch._dynamo.utils import compilation_time_metrics

    spent = {name: sum(compilation_time_metrics.get(key, [])) for name, key in PHASES.items()}
    result = {
        "import": imported - started,
        "load": loaded - imported,
        "first token": first - loaded,
        "step and two more": second - first,
        "to the first token": first - started,
        "compiling": spent,
    }
    assert tokens.shape[1] == prompt + 1
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")


def run(folder: Path, prompt: int, caches: Path) -> dict[str, Any]:
    """A process of :func:`child` with these caches."""
    environment = {
        **os.environ,
        "FXCOMPRESS_CACHE_DIR": str(caches / "kernels"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    code = f"from tests.benchmarks.first_token import child; child({str(folder)!r}, {prompt})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]


def main() -> None:
    import fxcompress
    from tests.benchmarks.common import environment, packaged_model, write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="*", default=["w4a8", "w4a16"])
    parser.add_argument("--prompt", type=int, default=64)
    options = parser.parse_args()
    model, _ = packaged_model()
    rows: dict[str, Any] = {}
    for recipe in options.recipes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fxcompress.compress(model, recipe, verify="off", progress=False).save(folder / "small")
            for state in ("empty caches", "warm", "warm again"):
                rows[f"{recipe}, {state}"] = run(folder / "small", options.prompt, folder / "caches")
                sys.stderr.write(f"{recipe}, {state}: {rows[f'{recipe}, {state}']}\n")
    command = ["-m", "tests.benchmarks.first_token", *sys.argv[1:]]
    write("first-token", {"environment": environment(command), "rows": rows})


if __name__ == "__main__":
    main()
