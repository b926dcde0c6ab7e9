"""``fxcompress distill``: a compressed model is trained, saved and better than before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fxcompress
from tests.cli.conftest import Run

SHORT = ("--steps", "6", "--batch-size", "2", "--length", "32", "--learning-rate", "1e-3")


@pytest.fixture(scope="module")
def rounded(decoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fxcompress.hf import load_hf_model

    model, tokenizer = load_hf_model(decoder_dir)
    recipe = [{"quantize-weights": {"bits": 3, "group_size": 8}}]
    small = fxcompress.compress(model, recipe, tokenizer=tokenizer, progress=False, verify="off")
    path = tmp_path_factory.mktemp("rounded") / "small"
    small.save(path)
    return path


def test_a_student_learns_and_is_saved(
    run: Run, rounded: Path, decoder_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "healed"
    arguments = ("distill", rounded, "--teacher", decoder_dir, "--data", text_file, "-o", out, *SHORT)
    done = run(*arguments, "--json", "--checkpoint", tmp_path / "snapshots", "--log-dir", tmp_path / "runs")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["steps"] == 6
    assert len(found["losses"]) == 6
    first, *others = (loss for _, loss in found["held_out"])
    assert min(others) < first
    assert fxcompress.load(out).report is not None
    assert any((tmp_path / "snapshots").iterdir())
    assert any((tmp_path / "runs").rglob("*events*"))
    assert run(*arguments).exit_code == 1  # the output exists


def test_the_table_names_what_was_kept(
    run: Run, rounded: Path, decoder_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    objective = json.dumps({"kd": {"hard_ratio": 0.5}, "reverse-kl": {"weight": 0.1}})
    options = ("--objective", objective, "--train", "scales", "--train", "floats", "--held-out", text_file)
    done = run(
        *("distill", rounded, "--teacher", decoder_dir, "--data", text_file, "-o", tmp_path / "healed"),
        *(*SHORT, *options),
    )
    assert done.exit_code == 0, done.output
    assert "held-out loss" in done.stdout
    assert "kept" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--objective", "kd"), ("needs a teacher", "--teacher")),
        (("--objective", "kds"), ("unknown objective", "kd")),
        (("--objective", "{kd: 1}"), ("objective:", "write")),
        (("--objective", "ce", "--train", "wheels"), ("unknown part", "weights")),
        (("--objective", "ce", "--length", "100000"), ("100000",)),
    ],
)
def test_mistakes_are_told(
    run: Run, rounded: Path, text_file: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = run("distill", rounded, "--data", text_file, "-o", tmp_path / "healed", *options)
    assert done.exit_code == 1
    assert all(word in done.output for word in words), done.output
    assert not (tmp_path / "healed").exists()
