"""Methods of several kinds in one recipe: legal orders work and survive saving, others are refused."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.apply import apply_state
from fxcompress.artifact import read_artifact, write_artifact
from fxcompress.calibration import as_calibration
from fxcompress.capture import capture_model
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState
from fxcompress.errors import RecipeError
from fxcompress.form_inputs import form_tensor
from fxcompress.forms import LowRank, QuantizedWeight, SiteForm, SparseQuantizedWeight
from fxcompress.hf import identity_of
from fxcompress.manager import run_recipe
from fxcompress.recipe import Recipe
from tests.end_to_end.zoo_checks import relative
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

CUT_FIRST: dict[str, list[Any]] = {
    "cut, 2:4, w8a8, cache": [CUT, TWO_OF_FOUR, *W8A8, "pack-sparse", "fuse-siblings", KV8],
    "cut, factors, int8": [CUT, SPLIT, INT8, "fuse-siblings"],
}
WHOLE: dict[str, list[Any]] = {
    "factors, gptq": [SPLIT, *GPTQ, "fuse-siblings"],
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


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 100, (2, 8), generator=generator)} for _ in range(3)]


def check_forms(recipe: str, passes: list[Any], forms: Mapping[str, SiteForm]) -> None:
    """Whether every method of the recipe left its mark, and factors are rounded where all else is."""
    terms = [term for form in forms.values() for term in form.terms]
    factors = [term for term in terms if isinstance(term, LowRank)]
    assert bool(factors) == ("factors" in recipe)
    assert all(isinstance(part, QuantizedWeight) for term in factors for part in (term.u, term.v))
    assert any(isinstance(term, SparseQuantizedWeight) for term in terms) == ("pack-sparse" in passes)
    assert any(form.cache is not None for form in forms.values()) == ("cache" in recipe)


@pytest.mark.parametrize("recipe", CUT_FIRST)
@torch.no_grad()
def test_a_cut_model_takes_every_other_method(recipe: str, tmp_path: Path) -> None:
    animal = entry("llama")
    small = fxcompress.compress(animal.build(), CUT_FIRST[recipe], batches(), progress=False, verify="end")
    small.set_backend("eager")
    check_forms(recipe, CUT_FIRST[recipe], small.artifact.forms)
    assert small.artifact.structure is not None
    assert small.report.relative_error is not None
    assert 0 < small.report.relative_error < 1
    found = scores(small(**animal.inputs()))
    small.save(tmp_path / "small")
    again = fxcompress.load(tmp_path / "small", backend="eager")
    assert torch.equal(scores(again(**animal.inputs())), found)


@functools.cache
def captured() -> tuple[nn.Module, Program]:
    animal = entry("llama")
    model = animal.build()
    return model, capture_model(model, (), animal.inputs())


@torch.no_grad()
def outputs(program: Program, state: CompressionState, inputs: Sequence[Any]) -> Tensor:
    """The rewritten graph, op by op."""
    applied = apply_state(program, state)
    given = dict(zip(program.inputs, inputs, strict=True))
    values = []
    for node in applied.module.graph.find_nodes(op="placeholder"):
        if node.name in applied.form_inputs:
            values.append(form_tensor(state, applied.form_inputs[node.name]))
        elif node.name in program.weight_of:
            values.append(state.weight(program.weight_of[node.name]))
        else:
            values.append(given[node.name])
    found: Tensor = applied.module(*values)[0]
    return found


@pytest.mark.parametrize("recipe", WHOLE)
def test_methods_share_a_model(recipe: str, tmp_path: Path) -> None:
    model, program = captured()
    data = as_calibration(batches(), program)
    result = run_recipe(program, WHOLE[recipe], data, verify="end")
    check_forms(recipe, WHOLE[recipe], result.state.forms)
    inputs = data.flat()[0]
    original = outputs(program, CompressionState(program.weights), inputs)
    found = outputs(program, result.state, inputs)
    assert 0 < relative(found, original) < 1
    given = {"recipe": Recipe.load(WHOLE[recipe]).to_dict(), "report": result.report.to_dict()}
    written = {"module": model, "identity": identity_of(model), "aliases": program.aliases}
    write_artifact(tmp_path / "small", state=result.state, **given, **written)
    read = read_artifact(tmp_path / "small")
    again = CompressionState({**program.weights, **read.tensors}, forms=dict(read.forms))
    assert torch.equal(outputs(program, again, inputs), found)


@pytest.mark.parametrize("order", ILLEGAL)
def test_illegal_orders_are_refused_by_name(order: str) -> None:
    recipe, message = ILLEGAL[order]
    with pytest.raises(RecipeError, match=message):
        Recipe.load(recipe)
