from __future__ import annotations

import functools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxcompress.checkpoint import CheckpointStore, canonical
from fxcompress.edits import (
    FuseSites,
    Refuse,
    SetActivation,
    SetTensor,
    SetTransform,
    SetWeight,
)
from fxcompress.errors import ArtifactError
from fxcompress.formats.integer import IntFormat, quantize_to_term
from fxcompress.forms import DynamicPerToken, Scale, StaticPerTensor, WeightLayout
from fxcompress.manager import run_recipe
from fxcompress.progress import ProgressEvent
from tests.engine.models import RoundEverything, ScaleNorm, ShiftByMean, calibration, capture, decoder
from tests.engine.test_manager import same

ROOT = Path(__file__).resolve().parents[2]
RECIPE = [ScaleNorm(), ShiftByMean(), RoundEverything()]


def run(folder: Path, progress: Any = False, recipe: Any = None, **options: Any) -> Any:
    return run_recipe(
        decoder(), recipe or RECIPE, calibration(decoder()), checkpoint=folder, progress=progress, **options
    )


@functools.cache
def uninterrupted() -> Any:
    return run_recipe(decoder(), RECIPE, calibration(decoder()))


@pytest.fixture(autouse=True)
def _fresh_counters() -> None:
    uninterrupted()
    ShiftByMean.solved.clear()
    RoundEverything.solved.clear()


def test_edits_survive_the_store(tmp_path: Path) -> None:
    term = quantize_to_term(torch.randn(4, 6), WeightLayout.rows((4, 6)), IntFormat(4, False, 4))
    edits = [
        SetTensor("a", torch.randn(3, 2).T, "why"),
        SetWeight("b", (term,), "because", 0.1 + 0.2),
        SetActivation("c", DynamicPerToken(8)),
        SetActivation("c", StaticPerTensor(8, torch.tensor(0.5), torch.tensor(3, dtype=torch.int32))),
        SetTransform("d", (Scale(torch.rand(3)),), (), torch.rand(2)),
        FuseSites(("e", "f")),
        Refuse("g", "too small"),
    ]
    made = [canonical(edit, "p") for edit in edits]
    store = CheckpointStore(tmp_path / "new" / "folder")
    store.save("key", made)
    loaded = store.load("key")
    assert loaded is not None
    assert [type(edit) for edit in loaded] == [type(edit) for edit in edits]
    first: Any = loaded[0]
    assert torch.equal(first.value, edits[0].value)  # type: ignore[union-attr]
    assert first.value.is_contiguous()
    weight: Any = loaded[1]
    assert weight.error == 0.1 + 0.2
    assert torch.equal(weight.terms[0].codes, term.codes)
    assert weight.terms[0].scale.dtype == term.scale.dtype
    assert loaded[5].names == ("e", "f")  # type: ignore[union-attr]
    assert store.load("other") is None
    assert not list(tmp_path.rglob(".*"))


def stop_after(count: int, error: type[BaseException]) -> Callable[[ProgressEvent], None]:
    events: list[ProgressEvent] = []

    def callback(event: ProgressEvent) -> None:
        events.append(event)
        if len(events) == count:
            raise error

    return callback


@pytest.mark.parametrize("steps", [1, 7, 12])
def test_an_interrupted_run_continues_to_the_same_state(tmp_path: Path, steps: int) -> None:
    whole = uninterrupted()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after(steps, KeyboardInterrupt))
    before = len(ShiftByMean.solved) + len(RoundEverything.solved)
    events: list[ProgressEvent] = []
    resumed = run(tmp_path, events.append)
    assert same(whole.state, resumed.state)
    assert whole.report.to_dict() == resumed.report.to_dict()
    assert whole.state.provenance == resumed.state.provenance
    assert sum(event.resumed for event in events) == steps
    assert len(ShiftByMean.solved) + len(RoundEverything.solved) == before + max(0, min(10, 15 - steps))


def test_a_finished_run_solves_nothing_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    RoundEverything.solved.clear()
    assert same(first.state, run(tmp_path).state)
    assert not RoundEverything.solved


def test_changed_inputs_and_options_are_computed_again(tmp_path: Path) -> None:
    run(tmp_path, verify="off")

    def solved(**options: Any) -> tuple[int, int]:
        ShiftByMean.solved.clear()
        RoundEverything.solved.clear()
        run(tmp_path, verify="off", **options)
        return len(ShiftByMean.solved), len(RoundEverything.solved)

    assert solved() == (0, 0)
    assert solved(recipe=[ScaleNorm(), ShiftByMean(), RoundEverything(bits=6)]) == (0, 5)  # only what follows
    assert solved(recipe=[ScaleNorm(), ShiftByMean(amount=0.02), RoundEverything()]) == (5, 5)
    assert solved(seed=1) == (5, 5)
    program = capture(seed=1)
    run_recipe(program, RECIPE, calibration(program), checkpoint=tmp_path, verify="off")
    assert len(RoundEverything.solved) == 10
    run_recipe(decoder(), RECIPE, calibration(decoder(), 2), checkpoint=tmp_path, verify="off")
    assert len(RoundEverything.solved) == 15


@pytest.mark.parametrize("damage", ["truncate", "flip", "json", "missing"])
def test_damaged_steps_are_computed_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path)
    for path in sorted(tmp_path.glob("*.safetensors")):
        if damage == "json":
            path.with_suffix(".json").write_text('{"sha256": ')
        elif damage == "missing":
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content[: len(content) // 2] if damage == "truncate" else content)
    RoundEverything.solved.clear()
    with caplog.at_level(logging.WARNING):
        again = run(tmp_path)
    assert same(whole.state, again.state)
    assert "is damaged" in caplog.text
    assert len(RoundEverything.solved) == 5


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be created"):
        run(tmp_path / "file" / "folder")


KILLED = """
import os, signal, sys
from pathlib import Path
from fxcompress import checkpoint
from fxcompress.manager import run_recipe
from tests.engine.models import RoundEverything, ScaleNorm, ShiftByMean, calibration, decoder

folder, moment, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls = 0
real = checkpoint._publish

def publish(aside, path):
    global calls
    calls += 1
    if calls == number and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(aside, path)
    if calls == number and moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint._publish = publish
recipe = [ScaleNorm(), ShiftByMean(), RoundEverything()]
run_recipe(decoder(), recipe, calibration(decoder()), checkpoint=folder)
"""


@pytest.mark.parametrize(("moment", "number"), [("before", 13), ("after", 13)])
def test_a_killed_process_leaves_usable_checkpoints(tmp_path: Path, moment: str, number: int) -> None:
    """Killed before or between the two renames of a step: the step is absent, those before it are whole."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment, str(number)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = uninterrupted()
    events: list[ProgressEvent] = []
    resumed = run(tmp_path, events.append)
    assert sum(event.resumed for event in events) == (number - 1) // 2
    assert same(whole.state, resumed.state)
    assert whole.report.to_dict() == resumed.report.to_dict()
