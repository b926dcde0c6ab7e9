"""Artifacts that are cut off, edited, too new or hostile are refused, and the file is named."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxcompress.artifact import read_artifact
from fxcompress.errors import ArtifactError
from tests.artifact.made import write

WEIGHTS = "weights-00001.safetensors"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write(tmp_path / "out")
    return tmp_path / "out"


def edit_manifest(out: Path, change: Change) -> None:
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def seal(out: Path) -> None:
    """Make hashes and sizes right again, as somebody who means harm would."""

    def change(manifest: dict[str, Any]) -> None:
        for name in manifest["files"]:
            data = (out / name).read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_manifest(out, change)


def first_term(manifest: dict[str, Any]) -> dict[str, Any]:
    term: dict[str, Any] = manifest["forms"]["first.weight"]["terms"][0]["component"]
    return term


@pytest.mark.parametrize("name", [WEIGHTS, "report.json", "recipe.yaml", "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped", "empty", "directory", "fifo"])
def test_damaged_file_is_named(out: Path, name: str, harm: str) -> None:
    path = out / name
    data = bytearray(path.read_bytes())
    path.unlink()
    if harm == "truncated":
        path.write_bytes(data[:-3])
    elif harm == "flipped":
        data[len(data) // 2] ^= 0x80
        path.write_bytes(data)
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "directory":
        path.mkdir()
    elif harm == "fifo":
        os.mkfifo(path)
    with pytest.raises(ArtifactError, match=name):
        read_artifact(out)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        read_artifact(tmp_path / "nothing")


def test_other_directory(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json: missing"):
        read_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ArtifactError, match="mapping was expected"):
        read_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(ArtifactError, match="not an fxcompress artifact"):
        read_artifact(tmp_path)


def test_newer_version_asks_for_an_upgrade(out: Path) -> None:
    edit_manifest(out, lambda m: m.update(format_version=3, forms_of_the_future=[]))
    with pytest.raises(
        ArtifactError, match=r"format version 3, this fxcompress reads up to 2\. Fix: upgrade"
    ):
        read_artifact(out)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../x", "C:\\x", ".hidden", "a//b", "a\0b", ""]
)
def test_paths_that_leave_are_refused(out: Path, name: str) -> None:
    edit_manifest(out, lambda m: m["files"].update({name: m["files"]["report.json"]}))
    with pytest.raises(ArtifactError, match="no plain path below the artifact"):
        read_artifact(out)
    edit_manifest(out, lambda m: m["files"].pop(name))
    edit_manifest(out, lambda m: next(iter(m["tensors"].values())).update(file=name))
    with pytest.raises(ArtifactError, match="no plain path below the artifact"):
        read_artifact(out)


@pytest.mark.parametrize("name", [WEIGHTS, "manifest.json", "recipe.yaml"])
def test_links_that_leave_are_refused(out: Path, tmp_path: Path, name: str) -> None:
    (out / name).rename(tmp_path / "outside")
    (out / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="leads out of the artifact"):
        read_artifact(out)


def test_links_within_are_followed(out: Path) -> None:
    (out / WEIGHTS).rename(out / "blob")
    (out / WEIGHTS).symlink_to("blob")
    assert read_artifact(out).tensors["steps"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["weights"]["steps"].update(shape=[2]), "steps is missing or of another shape"),
        (lambda m: m["weights"]["steps"].update(dtype="F32"), "steps is missing or of another shape"),
        (lambda m: m["weights"]["steps"].update(dtype="pickle"), "dtype 'pickle' is unknown"),
        (lambda m: m["weights"]["steps"].update(tensor=None), "steps must have either"),
        (lambda m: m["weights"]["steps"].update(tensor="dense/nothing"), "tensor of steps is missing"),
        (lambda m: m["weights"]["steps"].update(sha256="0"), "weights.steps.sha256"),
        (lambda m: m["weights"]["steps"].update(extra=1), "weights.steps.extra"),
        (lambda m: m["weights"].pop("steps"), "fingerprint disagree"),
        (lambda m: m["aliases"].update(other="nothing"), "'nothing' is used but not among"),
        (lambda m: m["aliases"].update(other="steps"), "fingerprint disagree"),
        (lambda m: m["fused"].append(["nothing"]), "'nothing' is used but not among"),
        (lambda m: m["forms"].pop("first.weight"), "first.weight must have either"),
        (lambda m: m["forms"].update(steps=m["forms"]["first.weight"]), "steps: .* a term of shape"),
        (lambda m: m["forms"]["first.weight"].update(kind="os.system"), "'os.system' is unknown"),
        (lambda m: m["forms"]["first.weight"].update(kind=["x"]), r"\['x'\] is unknown"),
        (lambda m: m["forms"]["first.weight"].update(terms=[3]), "terms holds int, no WeightTerm"),
        (lambda m: m["forms"]["first.weight"].update(terms={}), "neither a tensor nor a component"),
        (lambda m: m["forms"]["first.weight"].update(bias="b"), "bias is no floating vector"),
        (lambda m: first_term(m).pop("perm"), "fields .* expected"),
        (lambda m: first_term(m).update(perm=[0, 0]), "no permutation"),
        (lambda m: first_term(m).update(perm=[0, True]), r"perm is \(0, True\), expected tuple"),
        (lambda m: first_term(m).update(bits=16), "bits=16"),
        (lambda m: first_term(m).update(bits="4"), "bits='4'"),
        (lambda m: first_term(m).update(bits=8), "codes is"),
        (lambda m: first_term(m).update(group_size=4), "scale is"),
        (lambda m: first_term(m).update(symmetric=True), "zero is given"),
        (lambda m: first_term(m).update(zero=None), "zero is given"),
        (lambda m: first_term(m).update(codes={"tensor": "dense/first.bias"}), r"codes is \(10,\)"),
        (lambda m: first_term(m).update(codes={"tensor": "nowhere"}), "'nowhere' is missing"),
        (lambda m: first_term(m).update(shape=[10, 13]), "codes is"),
        (lambda m: first_term(m).update(shape=[10.0, 12]), "shape is .* expected tuple"),
        (lambda m: first_term(m).update(batch_dims=-1), "batch_dims"),
        (lambda m: m["tensors"].popitem(), "is missing"),
        (lambda m: m["tensors"]["dense/steps"].update(dtype="F64"), "dense/steps.* F64"),
        (lambda m: m["tensors"]["dense/steps"].update(shape=[-1]), r"tensors.dense/steps.shape"),
        (lambda m: m["files"].pop("report.json"), "report.json is not among its files"),
        (lambda m: m["files"].pop(WEIGHTS), "is not among its files"),
        (lambda m: m["computed"].update(cache="object"), "dtype 'object' is unknown"),
        (lambda m: m.update(weights=[]), "weights: "),
        (lambda m: m["identity"].update(kind="pickle"), "identity.kind"),
    ],
)  # fmt: skip
def test_edited_manifest_is_refused(out: Path, change: Change, message: str) -> None:
    edit_manifest(out, change)
    with pytest.raises(ArtifactError, match=message):
        read_artifact(out)


def test_deeply_nested_form_is_refused(out: Path) -> None:
    text = (out / "manifest.json").read_text()
    deep = '{"kind": "site-form", "bias": ' + "[" * 50_000 + "]" * 50_000 + "}"
    (out / "manifest.json").write_text(text.replace('"forms": {', f'"forms": {{"steps": {deep},', 1))
    with pytest.raises(ArtifactError):
        read_artifact(out)


def test_recipe_cannot_run_code(out: Path) -> None:
    (out / "recipe.yaml").write_text("a: !!python/object/apply:os.system ['false']")
    seal(out)
    with pytest.raises(ArtifactError, match=r"recipe\.yaml"):
        read_artifact(out)


def test_smaller_tensor_behind_a_sealed_manifest(out: Path) -> None:
    tensors = load_file(out / WEIGHTS)
    tensors["form/first.weight.terms.0.codes"] = torch.zeros(1, 1, 1, dtype=torch.uint8)
    save_file(tensors, out / WEIGHTS)
    seal(out)
    with pytest.raises(ArtifactError, match="codes"):
        read_artifact(out)
    key = "form/first.weight.terms.0.codes"
    edit_manifest(out, lambda m: m["tensors"][key].update(shape=[1, 1, 1]))
    with pytest.raises(ArtifactError, match=r"first\.weight: .*codes is \(1, 1, 1\)"):
        read_artifact(out)


def header(out: Path, change: Change) -> None:
    data = (out / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    content = json.loads(data[8 : 8 + length])
    change(content)
    raw = json.dumps(content).encode()
    (out / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    seal(out)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["dense/steps"].update(data_offsets=[0, 10**12]),
        lambda h: h["dense/steps"].update(data_offsets=[-8, 0]),
        lambda h: h["dense/steps"].update(data_offsets=[8]),
        lambda h: h["dense/steps"].update(shape=[10**9]),
        lambda h: h["dense/steps"].update(dtype="X"),
        lambda h: h["dense/steps"].pop("dtype"),
        lambda h: h.pop("dense/steps"),
        lambda h: h.update({"dense/steps": 5}),
    ],
)
def test_false_header_is_refused(out: Path, change: Change) -> None:
    header(out, change)
    with pytest.raises(ArtifactError, match=WEIGHTS):
        read_artifact(out)


def test_overlong_header_is_refused(out: Path) -> None:
    data = (out / WEIGHTS).read_bytes()
    (out / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + data[8:])
    seal(out)
    with pytest.raises(ArtifactError, match="truncated or not a safetensors file"):
        read_artifact(out)


def test_file_that_vanishes_after_loading(out: Path) -> None:
    artifact = read_artifact(out)
    (out / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match="cannot read tensor"):
        _ = artifact.tensors["steps"]
