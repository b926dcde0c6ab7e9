"""The zoo keeps its own promises: it builds, repeats, runs, generates and exports as its entries say."""

from __future__ import annotations

import pytest
import torch

from tests.zoo import SMOKE, ZOO, ZooEntry, entry, generate_tokens, scores, select

ALL = pytest.mark.parametrize("animal", ZOO.values(), ids=lambda animal: animal.name)


@ALL
@torch.no_grad()
def test_builds_twice_alike_and_runs(animal: ZooEntry) -> None:
    first, second = animal.build(), animal.build()
    assert not first.training
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    inputs = animal.inputs()
    output = scores(first(**inputs))
    assert output.isfinite().all()
    assert output.std() > 0.01
    torch.testing.assert_close(scores(second(**inputs)), output, rtol=0, atol=0)


@pytest.mark.parametrize("animal", [a for a in ZOO.values() if a.generates], ids=lambda animal: animal.name)
def test_generates_four_tokens(animal: ZooEntry) -> None:
    assert generate_tokens(animal.build(), animal.tensors(), 4).shape == (2, 4)


@pytest.mark.parametrize("animal", SMOKE, ids=lambda animal: animal.name)
@torch.no_grad()
def test_exports_with_dynamic_sizes(animal: ZooEntry) -> None:
    model, exported = animal.build(), animal.export().module()
    seq = 8 if "fixed-length" in animal.tags else 11
    inputs = animal.inputs(3, seq)
    torch.testing.assert_close(scores(exported(**inputs)), scores(model(**inputs)), rtol=1e-5, atol=1e-6)


def test_select_refuses_unknown_tags() -> None:
    assert entry("falcon") in select("parallel-residual", without=("moe",))
    with pytest.raises(ValueError, match="no zoo entry carries"):
        select("no-such-tag")
    with pytest.raises(KeyError, match="no zoo entry 'unicorn'"):
        entry("unicorn")


def test_notes_and_tags_agree() -> None:
    limited = {animal.name for animal in ZOO.values() if animal.tags & {"fixed-length", "length-multiple"}}
    assert limited <= {animal.name for animal in ZOO.values() if animal.export_note}
