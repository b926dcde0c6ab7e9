"""Methods of several kinds in one recipe: legal orders work and survive saving, others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxcompress
from fxcompress.errors import RecipeError
from fxcompress.forms import LowRank, QuantizedWeight, SparseQuantizedWeight
from fxcompress.recipe import Recipe
from tests.zoo import entry, scores

CUT: dict[str, Any] = {"prune-channels": {"amount": 0.25}}
HALF = {"wanda": {"sparsity": 0.5}}
TWO_OF_FOUR = {"wanda": {"pattern": "2:4"}}
SPLIT = {"svd-llm": {"keep": 0.6, "multiple": 1}}
INT8 = {"quantize-weights": {"bits": 8}}
INT4 = {"quantize-weights": {"bits": 4, "group_size": 16}}
W8A8 = [{"quantize-weights": {"bits": 8, "group_size": 0}}, {"quantize-activations": {"bits": 8}}]
GPTQ = [{"gptq": {"bits": 4, "group_size": 16}}, {"quantize-weights": {"only_remaining": True}}]
RESIDUAL = {"low-rank-residual": {"rank": 2, "bits": 8}}
KV8 = {"quantize-kv-cache": {"bits": 8}}

LEGAL: dict[str, list[Any]] = {
    "cut, 2:4, w8a8": [CUT, TWO_OF_FOUR, *W8A8, "pack-sparse", "fuse-siblings"],
    "cut, factors, int8": [CUT, SPLIT, INT8, "fuse-siblings"],
    "factors by gptq": [SPLIT, *GPTQ, "fuse-siblings"],
    "factors, w8a8, cache": [SPLIT, *W8A8, "fuse-siblings", KV8],
    "int4, factors of its error": [INT4, RESIDUAL, "fuse-siblings"],
    "half, gptq": [HALF, *GPTQ, "pack-sparse"],
}

ILLEGAL: dict[str, tuple[list[Any], str]] = {
    "factors of a sparse weight": ([HALF, SPLIT], "svd-llm.*sparse-weights.*wanda"),
    "mask over factors": ([SPLIT, HALF], "wanda.*low-rank.*svd-llm"),
    "stored factors by laser, then a mask": (
        [{"laser": {"factored": True}}, HALF],
        "wanda.*low-rank.*laser",
    ),
    "shares for a mask over factors": ([SPLIT, {"allocate-sparsity": {}}], "allocate-sparsity.*low-rank"),
    "order for a mask over factors": (
        [SPLIT, {"permute-channels": {"pattern": "2:4"}}],
        "permute-channels.*low-rank",
    ),
    "dense residual over a mask": ([HALF, INT4, RESIDUAL], "low-rank-residual.*sparse-weights.*wanda"),
    "cut behind factors": ([SPLIT, CUT], "prune-channels.*low-rank.*svd-llm"),
    "cut behind a mask": ([HALF, CUT], "prune-channels.*sparse-weights.*wanda"),
    "blocks out behind a mask": ([HALF, {"remove-blocks": {"amount": 0.5}}], "remove-blocks.*sparse-weights"),
    "cut behind a cache": ([KV8, CUT], "prune-channels.*quantized-cache.*quantize-kv-cache"),
    "table codes of factors": ([SPLIT, "quantize-codebook"], "quantize-codebook.*low-rank.*svd-llm"),
    "factors of codes": ([INT4, SPLIT], "svd-llm.*quantized-weights.*quantize-weights"),
}


@pytest.fixture(scope="module")
def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 100, (2, 8), generator=generator)} for _ in range(3)]


@pytest.mark.parametrize("recipe", LEGAL)
@torch.no_grad()
def test_legal_combinations(recipe: str, data: list[dict[str, Tensor]], tmp_path: Path) -> None:
    animal = entry("llama")
    small = fxcompress.compress(animal.build(), LEGAL[recipe], data, progress=False)
    small.set_backend("eager")
    forms = small.artifact.forms
    terms = [term for form in forms.values() for term in form.terms]
    factors = [term for term in terms if isinstance(term, LowRank)]
    assert all(isinstance(part, QuantizedWeight) for term in factors for part in (term.u, term.v))
    assert bool(factors) == ("factors" in recipe)
    assert any(isinstance(term, SparseQuantizedWeight) for term in terms) == ("pack-sparse" in LEGAL[recipe])
    assert (small.artifact.structure is not None) == recipe.startswith("cut")
    assert any(form.cache is not None for form in forms.values()) == recipe.endswith("cache")
    assert 0 < small.report.relative_error < 1
    found = scores(small(**animal.inputs()))
    small.save(tmp_path / "small")
    again = fxcompress.load(tmp_path / "small", backend="eager")
    assert torch.equal(scores(again(**animal.inputs())), found)


@pytest.mark.parametrize("order", ILLEGAL)
def test_illegal_orders_are_refused_by_name(order: str) -> None:
    recipe, message = ILLEGAL[order]
    with pytest.raises(RecipeError, match=message):
        Recipe.load(recipe)
