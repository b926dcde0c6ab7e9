"""A compression killed with SIGKILL and started again writes the same bytes as one left alone."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
import torch, fxcompress
from tests.zoo import entry

folder, out, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = entry("llama-tied-odd").build()
seen = 0

def step(event):
    global seen
    seen += 1
    if seen == stop:
        os.kill(os.getpid(), signal.SIGKILL)

data = [torch.arange(24).view(1, 24) % 100, torch.arange(24).view(1, 24) % 90]
recipe = ["smooth-activations", {"gptq": {"group_size": 16}},
          {"quantize-weights": {"bits": 4, "group_size": 16, "only_remaining": True}},
          {"quantize-activations": {"mode": "static"}}, "fuse-siblings"]
small = fxcompress.compress(model, recipe, data, progress=step, checkpoint=folder)
small.save(out)
print(seen)
"""


def run(folder: Path, out: Path, stop: int) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT, str(folder), str(out), str(stop)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_killed_runs_end_in_the_same_artifact(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", tmp_path / "expected", 0)
    assert whole.returncode == 0, whole.stderr
    steps = int(whole.stdout.split()[-1])
    assert steps >= 4
    for stop in (1, steps // 3, 2 * steps // 3):
        folder, out = tmp_path / f"checkpoint-{stop}", tmp_path / f"out-{stop}"
        assert run(folder, out, stop).returncode == -signal.SIGKILL
        assert not out.exists()
        again = run(folder, out, 0)
        assert again.returncode == 0, again.stderr
        assert digest(out) == digest(tmp_path / "expected")
