"""Artifacts of cut models: what they record, what they rebuild, and structures that must be refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import CompressedModel
from fxcompress.artifact import read_artifact
from fxcompress.errors import ArtifactError, BindingError, FxCompressError
from tests.engine.models import Decoder, build, tokens
from tests.engine.structural import DropBlocks, KeepFirst
from tests.zoo import entry, scores

Edit = Callable[[dict[str, Any]], None]


def compress(model: nn.Module, recipe: Any, inputs: Any) -> CompressedModel:
    small = fxcompress.compress(model, recipe, example_inputs=inputs, progress=False, verify="off")
    small.set_backend("eager")
    return small


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """An artifact of a transformers model whose layers differ, and its output."""
    animal = entry("llama-tied-odd")
    small = compress(animal.build(), [KeepFirst(fewer=2), DropBlocks((1,))], animal.inputs())
    folder = tmp_path_factory.mktemp("llama") / "out"
    small.save(folder)
    return folder, scores(small(**animal.inputs()))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """An artifact of a module of the user's own, and its output."""
    small = compress(build(), [KeepFirst(kinds=("channels",)), DropBlocks((1,))], {"input_ids": tokens()})
    folder = tmp_path_factory.mktemp("decoder") / "out"
    small.save(folder)
    return folder, small(tokens())


def test_a_transformers_model_is_rebuilt_from_the_artifact(llama: tuple[Path, Tensor]) -> None:
    folder, expected = llama
    animal = entry("llama-tied-odd")
    for model in (None, animal.build()):
        again = fxcompress.load(folder, model, backend="eager")
        assert torch.equal(scores(again(**animal.inputs())), expected)
        assert len(again.model.model.layers) == again.config.num_hidden_layers == 2
        widths = [layer.mlp.up_proj.out_features for layer in again.model.model.layers]
        assert widths[0] != widths[1]
        ids = animal.inputs()["input_ids"]
        assert again.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_a_module_is_given_and_follows(decoder: tuple[Path, Tensor]) -> None:
    folder, expected = decoder
    again = fxcompress.load(folder, build(seed=5), backend="eager")  # any weights
    assert torch.equal(again(tokens()), expected)
    assert len(again.model.layers) == 2
    assert again.model.layers[1].up.out_features == 16
    with pytest.raises(ArtifactError, match="cannot be built from a file"):
        fxcompress.load(folder)


def test_another_module_is_refused(decoder: tuple[Path, Tensor]) -> None:
    other = build()
    other.head = nn.Linear(16, 41, bias=False)
    with pytest.raises(BindingError, match=r"head\.weight: \(41, 16\)"):
        fxcompress.load(decoder[0], other)
    already = fxcompress.load(decoder[0], build(), backend="eager").model
    with pytest.raises(BindingError, match="does not fit"):
        fxcompress.load(decoder[0], already)


def test_the_manifest_says_what_happened(decoder: tuple[Path, Tensor], llama: tuple[Path, Tensor]) -> None:
    structure = json.loads((decoder[0] / "manifest.json").read_text())["structure"]
    assert structure["changes"][0]["kept"]["layers.0.up.weight:0"] == list(range(16))
    assert structure["changes"][1]["removed"] == [{"container": "layers", "index": 1}]
    assert structure["original"]["layers.2.down.weight"]["shape"] == [16, 32]
    changed = {(change["owner"], change["name"]) for change in structure["attributes"]}
    assert ("layers.1.up", "out_features") in changed
    loaded = read_artifact(decoder[0])
    assert loaded.structure is not None
    assert loaded.structure.rename("layers.2.up.weight") == "layers.1.up.weight"
    assert json.loads((llama[0] / "manifest.json").read_text())["format_version"] == 2


def test_saving_again_changes_nothing(decoder: tuple[Path, Tensor], tmp_path: Path) -> None:
    fxcompress.load(decoder[0], build(), backend="eager").save(tmp_path / "copy")
    for file in decoder[0].iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes(), file.name


class Fixed(nn.Module):
    """Code that no attribute can change, with a constant and a buffer it computes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)
        self.register_buffer("shift", torch.arange(12.0), persistent=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        hidden = torch.relu(self.up(x)).view(x.shape[0], 10)
        return self.down(hidden) * scale + self.shift


def test_graphs_are_captured_again(tmp_path: Path) -> None:
    x = torch.randn(4, 12)
    torch.manual_seed(0)
    model = Fixed().eval()
    small = compress(model, [KeepFirst(), "quantize-weights"], {"x": x, "scale": 2.0})
    assert small.artifact.structure is not None
    assert small.artifact.structure.graph
    small.save(tmp_path / "out")
    again = fxcompress.load(tmp_path / "out", Fixed().eval(), backend="eager")
    expected = small(x=x, scale=2.0)
    assert torch.equal(again(x=x, scale=2.0), expected)
    assert not torch.equal(expected, model(x, 2.0))
    with pytest.raises(FxCompressError, match="it cannot generate"):
        again.model.generate(x)


DAMAGE: list[tuple[Edit, str]] = [
    (lambda s: s["changes"][0]["kept"].update({"layers.0.up.weight:0": [3, 2]}), "not ascending"),
    (lambda s: s["changes"][0]["kept"].update({"layers.0.up.weight:0": []}), "not ascending"),
    (lambda s: s["changes"][0]["kept"].update({"layers.0.up.weight:0": [-1]}), "greater than or equal to 0"),
    (lambda s: s["changes"][0].update(run="rm"), "Extra inputs"),
    (lambda s: s["changes"][1].update(removed=[]), "is only among the original weights"),
    (lambda s: s["changes"][1]["removed"].append({"container": "layers", "index": 0}), "not ascending"),
    (lambda s: s["original"].pop("head.weight"), r"head\.weight is only among the stored weights"),
    (lambda s: s["original"]["head.weight"].update(shape=[4, 16]), r"head\.weight is \(40, 16\), cut from"),
    (lambda s: s["original"]["head.weight"].update(dtype="F3"), "unknown dtype"),
    (lambda s: s["original"]["head.weight"].update(shape="big"), "valid list"),
    (lambda s: s["attributes"][0].update(new=10**12), "changes from"),
    (lambda s: s["attributes"][0].update(new=0), "changes from"),
    (lambda s: s["attributes"][0].update(new=[1]), "changes its type"),
    (lambda s: s["attributes"][0].update(new="import os"), "int"),
    (lambda s: s["attributes"][0].update(name="__class__"), "no attribute that holds a size"),
    (lambda s: s["attributes"][0].update(owner="layers.7.up"), "has no part 'layers.7.up'"),
    (lambda s: s["attributes"][0].update(name="forward", owner=""), r"forward is None, expected"),
    (lambda s: s["attributes"].pop(), ""),
    (lambda s: s.update(config=[{"owner": "", "name": "n", "old": 3, "new": 2}]), "no configuration"),
    (lambda s: s["buffers"].update({"cache": {"0": [1]}}), "no buffer cache"),
    (lambda s: s["buffers"].update({"cache": {"x": [1]}}), "no such dimensions"),
    (lambda s: s.update(cache=[[1, 2, 3]]), "not pairs"),
    (lambda s: s.update(graph="because", call=[]), "cannot be repeated"),
    (lambda s: s.update(from_config=True), "cannot be built from a file"),
]


@pytest.mark.parametrize(("edit", "message"), DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_structures(edit: Edit, message: str, decoder: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(decoder[0], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest["structure"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if not message:  # an attribute that only describes: the shapes are right without it
        assert torch.equal(fxcompress.load(folder, build(), backend="eager")(tokens()), decoder[1])
        return
    with pytest.raises(ArtifactError, match=message):
        fxcompress.load(folder, build())


def test_a_structure_for_another_model(decoder: tuple[Path, Tensor], tmp_path: Path) -> None:
    class Tuple(Decoder):
        """The same names, but its layers are no list that entries can be taken from."""

        def __init__(self) -> None:
            super().__init__()
            layers = self.layers
            self.layers = nn.Module()  # type: ignore[assignment]
            for index, layer in enumerate(layers):
                self.layers.add_module(str(index), layer)

    with pytest.raises(ArtifactError, match="layers is no list with entry 1"):
        fxcompress.load(decoder[0], Tuple())
