"""What is written comes back: forms, tensors, ties and companions, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fxcompress.artifact import Identity, build_artifact, read_artifact, save_artifact
from fxcompress.artifact import write as write_module
from fxcompress.artifact.storage import tensor_sha256
from fxcompress.edits import CompressionState, SetActivation, SetTensor
from fxcompress.errors import ArtifactError, BindingError
from fxcompress.forms import DynamicPerToken, QuantizedWeight, Scale, StaticPerTensor
from tests.artifact.made import RECIPE, REPORT, small, state_of, write


def content(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_everything_comes_back(tmp_path: Path) -> None:
    module = small()
    written = write(tmp_path / "out", module)
    read = read_artifact(tmp_path / "out")
    assert read.recipe == RECIPE
    assert read.report == REPORT
    assert read.aliases == {"head.weight": "table.weight"}
    assert read.fused == (("first.weight", "second.weight"),)
    assert read.parameters == written.parameters
    assert read.computed == {"cache": torch.float32}
    assert read.identity == Identity("module", "tests.artifact.made.Small")
    assert set(read.forms) == {"first.weight", "second.weight", "table.weight", "last.weight"}
    for name, form in read.forms.items():
        original = written.forms[name]
        assert form.tensors().keys() == original.tensors().keys()
        for key, tensor in form.tensors().items():
            torch.testing.assert_close(tensor, original.tensors()[key], rtol=0, atol=0)
        if form.terms:
            torch.testing.assert_close(
                form.dense(torch.float32), original.dense(torch.float32), rtol=0, atol=0
            )


def test_fields_of_forms_keep_their_types(tmp_path: Path) -> None:
    write(tmp_path / "out")
    forms = read_artifact(tmp_path / "out").forms
    (term,) = forms["first.weight"].terms
    assert isinstance(term, QuantizedWeight)
    assert (term.bits, term.group_size, term.shape, term.perm) == (4, 8, (10, 12), (0, 1))
    assert isinstance(forms["first.weight"].activation, DynamicPerToken)
    last = forms["last.weight"]
    assert isinstance(last.activation, StaticPerTensor)
    assert last.activation.zero.dtype == torch.int32
    assert isinstance(last.transform_in[0], Scale)
    assert last.bias is not None


def test_dense_values(tmp_path: Path) -> None:
    module = small()
    write(tmp_path / "out", module)
    artifact = read_artifact(tmp_path / "out")
    kept = {"first.bias", "last.weight", "last.bias", "steps", "empty"}
    assert set(artifact.tensors) == kept, "no replaced, tied or non-persistent tensor is stored"
    assert torch.equal(artifact.tensors["first.bias"], module.first.bias + 1)
    assert artifact.parameters["first.bias"].edited
    assert artifact.parameters["first.bias"].sha256 == tensor_sha256(module.first.bias)
    assert artifact.tensors["last.weight"].dtype == torch.bfloat16
    assert torch.equal(artifact.tensors["last.weight"], module.last.weight)
    assert artifact.tensors["steps"].shape == ()
    assert artifact.parameters["steps"].role == "buffer"
    assert artifact.is_replaced("table.weight")
    assert not artifact.is_replaced("last.weight")


def test_same_content_gives_same_bytes(tmp_path: Path) -> None:
    module = small()
    state = state_of(module)
    write(tmp_path / "one", module, state=state)
    write(tmp_path / "two", module, state=state)
    save_artifact(read_artifact(tmp_path / "one"), tmp_path / "three")
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "three")


def test_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_module, "SHARD_BYTES", 100)
    module = small()
    write(tmp_path / "out", module)
    assert len(list((tmp_path / "out").glob("weights-*.safetensors"))) > 3
    assert torch.equal(read_artifact(tmp_path / "out").tensors["last.bias"], module.last.bias)


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    module = small()
    state = state_of(module)
    (shared,) = (form for form in [state.forms["last.weight"].activation] if form is not None)
    for name in ("first.weight", "second.weight"):
        state.apply(SetActivation(name, shared), "by-hand")
    write(tmp_path / "out", module, state=state)
    activation = read_artifact(tmp_path / "out").forms["second.weight"].activation
    assert isinstance(activation, StaticPerTensor)
    assert activation.scale.item() == 0.5


def test_ties_the_caller_did_not_name_are_found(tmp_path: Path) -> None:
    module = small()
    artifact = write(tmp_path / "out", module, aliases={})
    assert artifact.aliases == {"head.weight": "table.weight"}


def test_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out)
    before = content(out)
    with pytest.raises(ArtifactError, match="already exists"):
        write(out, small(1))
    assert content(out) == before
    loaded = read_artifact(out)
    old_bias = loaded.tensors["last.bias"].clone()
    write(out, small(1), overwrite=True)
    assert content(out) != before
    assert torch.equal(loaded.tensors["last.bias"], old_bias), "mapped tensors outlive the replacement"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_spares_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"1")
    with pytest.raises(ArtifactError, match="not an artifact"):
        write(tmp_path / "photos", overwrite=True)
    assert content(tmp_path / "photos") == {"one.jpg": b"1"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = tmp_path / "deep" / "out"
    if overwrite:
        write(out)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    before = content(tmp_path)
    monkeypatch.setattr(write_module, "save_file", full)
    with pytest.raises(ArtifactError, match="No space left"):
        write(out, overwrite=overwrite)
    assert content(tmp_path) == before
    assert [p.name for p in out.parent.iterdir()] == (["out"] if overwrite else [])


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write(tmp_path / "file" / "out")


def test_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write_module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_companion_files(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, directory: Path) -> None:
            (directory / "tokenizer.json").write_text("{}")

    identity = Identity("transformers", "AnyModel", {"hidden_size": 4}, {"eos_token_id": 2})
    write(tmp_path / "out", identity=identity, tokenizer=Tokenizer())
    save_artifact(read_artifact(tmp_path / "out"), tmp_path / "copy")
    assert content(tmp_path / "out") == content(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == {"hidden_size": 4}
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == {"eos_token_id": 2}
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "{}"
    assert read_artifact(tmp_path / "copy").identity == identity


def test_module_of_another_make_is_refused(tmp_path: Path) -> None:
    artifact = write(tmp_path / "out")
    artifact.check_module(small(5))
    other = small()
    other.first = torch.nn.Linear(12, 11)
    with pytest.raises(BindingError, match=r"first.weight: \(11, 12\) .* \(10, 12\) .* expected"):
        artifact.check_module(other)
    del other.first
    other.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(BindingError, match=r"first\.weight: missing"):
        artifact.check_module(other)


def test_buffers_are_restored(tmp_path: Path) -> None:
    write(tmp_path / "out")
    other = small(3).double()
    other.steps = torch.tensor(9)
    read_artifact(tmp_path / "out").restore_buffers(other)
    assert other.steps == 3
    assert other.cache.dtype == torch.float32
    assert torch.equal(other.cache, torch.ones(4))
    assert other.first.weight.dtype == torch.float64


def test_edit_of_what_is_not_stored_is_refused() -> None:
    module = small()
    state = CompressionState(dict(module.named_parameters()) | dict(module.named_buffers()))
    state.apply(SetTensor("cache", torch.zeros(4)), "by-hand")
    with pytest.raises(ArtifactError, match="cache: edited, but the module does not store it"):
        build_artifact(
            recipe={}, state=state, report={}, module=module, identity=Identity("module", "x"), aliases={}
        )


def test_report_with_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="JSON"):
        write(tmp_path / "out", report={"kl": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64, torch.bfloat16])
def test_hash_reads_values_and_not_layout(dtype: torch.dtype) -> None:
    tensor = (torch.arange(12) % 5).reshape(3, 4).to(dtype)
    assert tensor_sha256(tensor.t().contiguous().t()) == tensor_sha256(tensor)
    assert tensor_sha256(torch.zeros(0, dtype=dtype)) == tensor_sha256(torch.zeros(0, 2, dtype=dtype))
    assert tensor_sha256(torch.tensor(1).to(dtype)) != tensor_sha256(torch.tensor(0).to(dtype))
