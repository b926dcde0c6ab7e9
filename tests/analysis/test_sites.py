"""Weight sites: every spelling of a weight's use is recognised, by dataflow."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fxcompress.analysis.sites import SiteKind, find_sites, sites_by_parameter
from fxcompress.capture import capture_model
from tests.zoo import DECODERS, ZooEntry, entry


def kinds(name: str) -> dict[str, set[SiteKind]]:
    animal = entry(name)
    program = capture_model(animal.build(), (), animal.inputs())
    return {
        key: {site.kind for site in sites} for key, sites in sites_by_parameter(find_sites(program)).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "animal", [a for a in DECODERS if "slow" not in a.tags], ids=lambda animal: animal.name
)
def test_every_matrix_of_every_decoder_has_a_site(animal: ZooEntry) -> None:
    model = animal.build()
    program = capture_model(model, (), animal.inputs())
    found = sites_by_parameter(find_sites(program))
    read = {
        program.weight_of[n.name] for n in program.placeholders() if n.name in program.weight_of and n.users
    }
    matrices = {n for n in program.parameters & read if program.weights[n].dim() >= 2}
    assert matrices == set(found)
    for name, sites in found.items():
        for site in sites:
            batch, rows, columns = site.layout.matrix_shape
            assert batch * rows * columns == program.weights[name].numel()
            matrix = site.layout.to_matrix(program.weights[name])
            assert torch.equal(site.layout.from_matrix(matrix), program.weights[name])


def test_tied_embedding_has_both_uses() -> None:
    assert kinds("llama-tied-odd")["model.embed_tokens.weight"] == {SiteKind.EMBEDDING, SiteKind.LINEAR}


def test_conv1d_layers_store_the_weight_transposed() -> None:
    animal = entry("gpt2-odd")
    program = capture_model(animal.build(), (), animal.inputs())
    site = next(s for s in find_sites(program) if s.name.endswith("attn.c_attn.weight"))
    assert site.kind is SiteKind.LINEAR
    assert site.layout.perm == (1, 0)
    assert site.bias is not None
    assert site.bias.endswith("attn.c_attn.bias")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss", "olmoe"])
def test_experts_are_sites_not_leftovers(name: str) -> None:
    found = kinds(name)
    experts = {key: value for key, value in found.items() if "experts" in key and "bias" not in key}
    assert experts
    assert all(value == {SiteKind.EXPERTS} or value == {SiteKind.BATCHED} for value in experts.values()), (
        experts
    )


def test_convolutions_and_transposed_convolutions() -> None:
    count = Counter(kind for value in kinds("unet").values() for kind in value)
    assert count[SiteKind.CONV] > 0
    assert count[SiteKind.CONV_TRANSPOSED] > 0


def test_other_products() -> None:
    assert {kind for value in kinds("einsum").values() for kind in value} >= {SiteKind.EINSUM}
    assert {kind for value in kinds("batched-weights").values() for kind in value} >= {SiteKind.BATCHED}
