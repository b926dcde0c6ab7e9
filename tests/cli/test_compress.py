"""Compress a tiny model on disk, then inspect, run and measure the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxcompress.artifact import read_artifact
from fxcompress.cli import app
from fxcompress.cli.compress import sequences
from fxcompress.errors import CalibrationError
from tests.cli.conftest import Run, character_tokenizer


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def made(decoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "small"
    done = CliRunner().invoke(app, ["compress", str(decoder_dir), "-r", "w8a16", "-o", str(out)])
    assert done.exit_code == 0, done.stderr
    return out


@pytest.fixture
def small_dir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "small"))


def test_compress_reports_and_saves(run: Run, decoder_dir: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ("compress", decoder_dir, "-r", "w8a8-smooth", "-c", text_file)
    options = ("--samples", 3, "--length", 24, "--dtype", "float32", "--json")
    first = run(*arguments, "-o", tmp_path / "one", *options)
    assert first.exit_code == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["report"]["calibration"]["tokens"] == 3 * 24
    assert result["bytes_on_disk"] == sum(len(data) for data in content(tmp_path / "one").values())
    artifact = read_artifact(tmp_path / "one")
    assert artifact.identity.kind == "transformers"
    assert artifact.recipe["name"] == "w8a8-smooth"
    assert {"config.json", "tokenizer.json", "manifest.json"} <= set(content(tmp_path / "one"))
    second = run(*arguments, "-o", tmp_path / "two", *options)
    assert second.exit_code == 0, second.stderr
    assert content(tmp_path / "one") == content(tmp_path / "two"), "same seed, same bytes"


def test_existing_output_is_refused_before_any_work(run: Run, decoder_dir: Path, small_dir: Path) -> None:
    before = content(small_dir)
    done = run("compress", decoder_dir, "-r", "w8a16", "-o", small_dir)
    assert done.exit_code == 1
    assert "already exists" in done.stderr
    assert "loading" not in done.stderr
    assert content(small_dir) == before
    done = run("compress", decoder_dir, "-r", "w4a16", "-o", small_dir, "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert read_artifact(small_dir).recipe["name"] == "w4a16"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": "w8a61"}, "w8a16"),
        ({"model": "text"}, "neither a folder nor a GGUF file"),
        ({"model": "small"}, "already compressed"),
        ({"model": "empty"}, "no config.json"),
        ({"device": "warp"}, "device 'warp' cannot be used"),
        ({"calibration": "short"}, "calibration: the text has 3 tokens"),
        ({"calibration": "binary"}, "not UTF-8 text"),
    ],
)
def test_mistakes_are_told(
    run: Run,
    decoder_dir: Path,
    small_dir: Path,
    text_file: Path,
    tmp_path: Path,
    changed: dict[str, str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").write_text("abc")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    places: dict[str, Any] = {"small": small_dir, "text": text_file}
    model = changed.get("model", "")
    arguments: list[object] = ["compress", places.get(model, tmp_path / model) if model else decoder_dir]
    arguments += ["-r", changed.get("recipe", "w8a16"), "-o", tmp_path / "out"]
    arguments += ["--device", changed.get("device", "cpu")]
    if "calibration" in changed:
        arguments += ["-c", tmp_path / changed["calibration"]]
    done = run(*arguments)
    assert done.exit_code == 1
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_inspect(run: Run, small_dir: Path) -> None:
    shown = run("inspect", small_dir)
    assert shown.exit_code == 0, shown.stderr
    assert "model.layers.{0–2}.self_attn.q_proj.weight" in shown.stdout
    assert "all intact" in shown.stdout
    found = json.loads(run("inspect", small_dir, "--json").stdout)
    assert found["replaced"] == found["report"]["totals"]["compressed"] > 0
    (small_dir / "report.json").write_text("{}")
    broken = run("inspect", small_dir)
    assert broken.exit_code == 1
    assert "report.json" in broken.stderr


def test_generate(run: Run, small_dir: Path, decoder_dir: Path) -> None:
    options = ("--prompt", "The quick", "--max-new-tokens", 6, "--json")
    small = run("generate", small_dir, *options, "--backend", "eager")
    assert small.exit_code == 0, small.stderr
    assert len(json.loads(small.stdout)["tokens"]) <= 6
    original = run("generate", decoder_dir, *options)
    assert original.exit_code == 0, original.stderr
    assert json.loads(original.stdout)["prompt"] == "The quick"
    failed = run("generate", small_dir, *options, "--chat", "--backend", "eager")
    assert failed.exit_code == 1
    assert "no chat template" in failed.stderr
    unknown = run("generate", small_dir, *options, "--backend", "abacus")
    assert unknown.exit_code == 1
    assert "unknown backend 'abacus'" in unknown.stderr


def test_export(run: Run, small_dir: Path, decoder_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    done = run("export", small_dir, out, "--external-data", "yes", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bytes"] == out.stat().st_size + (tmp_path / "model.onnx.data").stat().st_size
    assert report["kernels"]["MatMulNBits"] > 0
    assert all(parity["kl"] < 0.005 for parity in report["parity"])
    for arguments, message in (
        ((small_dir, out), "exists already"),
        ((decoder_dir, tmp_path / "b.onnx"), "not a compressed model"),
        ((small_dir, tmp_path / "b.onnx", "--opset", 9), "opset 9 cannot be written"),
        ((small_dir, tmp_path / "b.onnx", "--external-data", "perhaps"), "expected yes, no or auto"),
    ):
        failed = run("export", *arguments)
        assert failed.exit_code == 1
        assert message in failed.stderr


def test_eval_of_a_language_model(run: Run, small_dir: Path, decoder_dir: Path, text_file: Path) -> None:
    options = ("--text", text_file, "--length", 20, "--windows", 4, "--backend", "eager")
    done = run("eval", small_dir, *options, "--reference", decoder_dir, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["windows"] == 4
    assert found["quality"]["tokens"] == 4 * 19
    assert found["quality"]["perplexity"] == pytest.approx(found["reference_quality"]["perplexity"], rel=0.05)
    assert 0 <= found["agreement"]["kl"] < 0.01
    shown = run("eval", decoder_dir, *options)
    assert f"{found['reference_quality']['perplexity']:.3f}" in shown.stdout
    short = run("eval", decoder_dir, "--text", text_file, "--length", 20, "--windows", 4000)
    assert short.exit_code == 1
    assert "4000 windows of 20" in short.stderr


def test_eval_of_an_encoder(run: Run, encoder_dir: Path, text_file: Path, tmp_path: Path) -> None:
    done = run("compress", encoder_dir, "-r", "w8a16", "-o", tmp_path / "small")
    assert done.exit_code == 0, done.stderr
    options = ("--text", text_file, "--length", 20, "--windows", 3, "--backend", "eager")
    compared = run("eval", tmp_path / "small", *options, "--reference", encoder_dir, "--json")
    assert compared.exit_code == 0, compared.stderr
    assert json.loads(compared.stdout)["similarity"]["worst"] > 0.99
    alone = run("eval", tmp_path / "small", *options)
    assert alone.exit_code == 1
    assert "--reference" in alone.stderr


def test_bench(run: Run, small_dir: Path, decoder_dir: Path) -> None:
    sizes = ("--rounds", 1, "--prompt", 6, "--steps", 3, "--prefill", 9, "--backend", "eager")
    done = run("bench", small_dir, "--against", decoder_dir, *sizes, "--json")
    assert done.exit_code == 0, done.stderr
    base, small = json.loads(done.stdout)["variants"]
    assert (base["decode_ratio"], base["cache"], small["cache"]) == (1.0, "dynamic", "static")
    assert small["weight_bytes"] < base["weight_bytes"]
    shown = run("bench", decoder_dir, *sizes)
    assert shown.exit_code == 0, shown.stderr
    assert "weights MB" in shown.stdout


def test_sequences_carry_the_tokenizers_marks() -> None:
    class Marked:
        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            ids = character_tokenizer()(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    found = sequences("abcdefghijklm", Marked(), 2, 5)
    assert found.tolist() == [[[1, 97, 98, 99, 2]], [[1, 103, 104, 105, 2]]]
    with pytest.raises(CalibrationError, match="13 tokens, one sequence of 16 needs 14"):
        sequences("abcdefghijklm", Marked(), 2, 16)


def test_bench_kernels_shows_every_product(run: Run, decoder_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert run("compress", str(decoder_dir), "-r", "w4a8", "-o", str(out)).exit_code == 0
    done = run("bench", str(out), "--kernels", "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["kernels"]
    assert {row["tokens"] for row in rows} == {1, 32, 512}
    assert any("q_proj" in row["weights"] and "v_proj" in row["weights"] for row in rows)  # siblings together
    for row in rows:
        assert row["milliseconds"] > 0
        done_at_once = 2 * row["tokens"] * row["outputs"] * row["inputs"]
        assert row["gigaops"] == pytest.approx(done_at_once / row["milliseconds"] / 1e6)
        assert row["read share"] > 0
        assert row["peak share"] > 0
    layers = json.loads((decoder_dir / "config.json").read_text())["num_hidden_layers"]
    assert {row["sites"] for row in rows if "q_proj" in row["weights"]} == {layers}
    shown = run("bench", str(out), "--kernels")
    assert "q_proj k_proj v_proj" in " ".join(shown.stdout.split())


def test_bench_kernels_of_an_uncompressed_model_is_refused(run: Run, decoder_dir: Path) -> None:
    done = run("bench", str(decoder_dir), "--kernels")
    assert done.exit_code == 1
    assert "is not compressed" in done.stderr
    done = run("bench", str(decoder_dir), "--kernels", "--against", str(decoder_dir))
    assert done.exit_code == 1
    assert "measures one model" in done.stderr


def test_plain_checkpoints(run: Run, decoder_dir: Path, tmp_path: Path) -> None:
    import transformers

    arguments = ("compress", decoder_dir, "-r", "prune-channels", "--plain", "-o")
    done = run(*arguments, tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "structure:" in done.stdout
    assert "87×45 → 65×45" in done.stdout
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size == 65
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = run(*arguments, tmp_path / "out")
    assert again.exit_code != 0
    assert "already exists" in again.stderr
