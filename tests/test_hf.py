"""Loading through generic classes, and building empty models from an artifact's identity."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxcompress.artifact import Artifact, Identity, build_artifact
from fxcompress.edits import CompressionState
from fxcompress.errors import ArtifactError, BindingError, FxCompressError
from fxcompress.hf import empty_model, identity_of, load_hf_model, load_tokenizer
from fxcompress.structure.load import module_for
from tests.zoo import SMOKE, ZOO, scores


def artifact_of(model: nn.Module) -> Artifact:
    weights = {name: p.detach() for name, p in model.named_parameters()} | dict(model.named_buffers())
    return build_artifact(
        recipe={},
        state=CompressionState(weights),
        report={},
        module=model,
        identity=identity_of(model),
        aliases={},
    )


NAMES = sorted({"llama-tied-odd", "gpt2-odd", "bert", "t5", "clip", "convnext", "mamba2"})


@pytest.mark.parametrize("name", NAMES)
def test_empty_model_is_the_same_but_for_its_parameters(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    artifact = artifact_of(model)
    empty = empty_model(artifact)
    assert type(empty) is type(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in empty.parameters()}
    assert all(size <= 8 for size in storages.values()), "one element each"
    assert all(bool(p.isnan().all()) for p in empty.parameters())
    buffers = dict(empty.named_buffers())
    for key, value in model.named_buffers():
        assert torch.equal(buffers[key], value), key
    values = {key: artifact.tensors[artifact.aliases.get(key, key)] for key in empty.state_dict()}
    empty.load_state_dict(values, assign=True)
    with torch.no_grad():
        expected, found = scores(model(**entry.inputs())), scores(empty(**entry.inputs()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_dtypes_come_from_the_artifact() -> None:
    model = ZOO["llama"].build().to(torch.bfloat16)
    empty = module_for(artifact_of(model), None)
    assert {p.dtype for p in empty.parameters()} == {torch.bfloat16}
    found = dict(empty.named_buffers())
    for name, buffer in model.named_buffers():
        assert found[name].dtype == buffer.dtype
        torch.testing.assert_close(found[name], buffer)


def test_ties_are_kept() -> None:
    empty: Any = empty_model(artifact_of(ZOO["llama-tied-odd"].build()))
    assert empty.get_input_embeddings().weight is empty.get_output_embeddings().weight


def test_building_leaves_modules_as_they_were() -> None:
    before = nn.Module.register_parameter
    empty_model(artifact_of(ZOO["bert"].build()))
    assert nn.Module.register_parameter is before


def test_identity_of_a_plain_module() -> None:
    class Own(type(ZOO["bert"].build())):  # type: ignore[misc]
        pass

    own = Own(ZOO["bert"].build().config)
    assert identity_of(own).kind == "module", "a subclass that transformers does not have"
    found = identity_of(nn.Linear(2, 2))
    assert found == Identity("module", "torch.nn.modules.linear.Linear")


def test_plain_module_cannot_be_built() -> None:
    with pytest.raises(ArtifactError, match=r"pass a module of that class to load\(\)"):
        empty_model(artifact_of(nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["PreTrainedTokenizerBase", "pipeline", "os", "NoSuchModel", "__builtins__"])
def test_only_model_classes_are_built(name: str) -> None:
    artifact = artifact_of(ZOO["bert"].build())
    assert artifact.identity.config is not None
    artifact.identity = Identity("transformers", name, artifact.identity.config)
    with pytest.raises(ArtifactError, match="no model class of transformers"):
        empty_model(artifact)


def test_other_configuration_is_seen() -> None:
    artifact = artifact_of(ZOO["bert"].build())
    config = dict(artifact.identity.config or {})
    config["vocab_size"] = 99
    artifact.identity = Identity("transformers", artifact.identity.class_name, config)
    with pytest.raises(BindingError, match=r"\(99, .* expected"):
        module_for(artifact, None)


@pytest.mark.parametrize("name", sorted({"llama-tied-odd", "bert", "t5", "distilbert-classifier", "vit"}))
def test_folder_is_loaded_as_the_class_it_was_saved_from(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model: Any = entry.build()
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_hf_model(tmp_path)
    assert type(loaded) is type(model)
    assert tokenizer is None
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(scores(loaded(**entry.inputs())), scores(model(**entry.inputs())))
    half, _ = load_hf_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(FxCompressError, match="transformers cannot load it"):
        load_hf_model(tmp_path)


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FxCompressError, match="no such file or folder"):
        load_hf_model(tmp_path / "nothing")
    with pytest.raises(FxCompressError, match=r"no config\.json and 0 GGUF files"):
        load_hf_model(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(FxCompressError, match="neither a folder nor a GGUF file"):
        load_hf_model(tmp_path / "model.bin")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FxCompressError, match="transformers cannot load it"):
        load_hf_model(tmp_path)
    assert load_tokenizer(tmp_path) is None


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FxCompressError, match=r"pip install 'fxcompress\[hf\]'"):
        load_hf_model(tmp_path)


@pytest.mark.slow
@pytest.mark.real_model
def test_gguf_file(smollm_dir: Path, smollm_file: str, tmp_path: Path) -> None:
    model, tokenizer = load_hf_model(smollm_dir / smollm_file)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer is not None
    assert identity_of(model).kind == "transformers"
    model.save_pretrained(tmp_path)
    again, _ = load_hf_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_smoke_models_have_an_identity() -> None:
    for entry in SMOKE:
        model = entry.build()
        kind = "transformers" if type(model).__module__.startswith("transformers.") else "module"
        assert identity_of(model).kind == kind
