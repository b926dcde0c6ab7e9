"""The benchmark for GPUs runs from end to end, tiny, in Triton's interpreter, and its results render."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import gpu, write_results

ROOT = Path(__file__).parents[2]


def test_the_gpu_benchmark_runs_and_renders(tmp_path: Path) -> None:
    target = tmp_path / "gpu.json"
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from tests.benchmarks import gpu\n"
        "gpu.checks = lambda device, examples: {'codes': None}  # test_triton_interpreted.py runs them\n"
        "gpu.main()\n"
    )
    environment = {**os.environ, "FXCOMPRESS_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", code, "--interpret", "--output", str(target)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(target.read_text(encoding="utf-8"))
    assert not content["left out"]
    assert {row["decoder"] for row in content["decoder"]} == {"bf16 Inductor", "w4a16 g128, 4-bit cache"}
    assert {row["cache"] for row in content["attention"]} == {"torch bf16", "int8", "int4", "int2"}
    formats = {row["format"] for row in content["products"] if row["seconds"] is not None}
    assert {
        "w4a16 g128",
        "w8a8",
        "fp8",
        "w4a8 g128",
        "nf4 g64",
        "mxfp4",
        "2:4 generated",
        "torch bf16",
    } <= formats
    lines = write_results.gpu(content)
    assert lines[0] == "### Triton's interpreter"
    assert any(line.startswith("| 48×256 (tiny) | 5 | w4a16 g128 |") for line in lines)
    columns = [line.count("|") for line in lines[lines.index("") :] if line.startswith("| ")]
    assert min(columns) >= 4


def test_without_a_gpu_the_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main()
