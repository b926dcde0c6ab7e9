"""SmoothActivations with a search for α and with explicit scaling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.edits import SetTransform
from fxcompress.errors import RecipeError
from fxcompress.forms import DynamicPerToken, Scale
from fxcompress.manager import run_recipe
from fxcompress.ops.activation import apply_quantizer
from fxcompress.passes import QuantizeActivations, QuantizeWeights, SmoothActivations
from fxcompress.passes._output_error import quantized
from fxcompress.passes._selection import Role
from fxcompress.recipe import Recipe
from tests.passes.one_block import OneBlock, refusals
from tests.passes.test_smooth_activations import Two, block_of, decoder, tensors


def planted_norm() -> OneBlock:
    """A norm with loud channels before two matrices."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight[3], model[0].weight[9] = 60.0, 25.0
    return block_of(model, (torch.randn(64, 32),), (torch.randn(64, 32),))


def test_a_search_takes_the_strength_with_the_least_output_error() -> None:
    block = planted_norm()
    block.run(SmoothActivations(alpha="search", steps=10))
    (entry_,) = block.state.provenance["1.weight"]
    before, after = map(float, entry_.reason.rsplit("output error ", 1)[1].split(" → "))
    assert after < before / 10
    found = float(entry_.reason.split("α=")[1].split(" ")[0])
    errors = {}
    for alpha in (found, 0.0, 1.0):
        other = planted_norm()
        edits = tensors(other.run(SmoothActivations(alpha=alpha)))
        weights = QuantizeWeights().format_of(Role.MATRIX)
        assert weights is not None
        work = other.data[0][0]
        x = F.layer_norm(work, (32,)) * edits["0.weight"] + edits["0.bias"]
        exact = x @ edits["1.weight"].T
        rounded = apply_quantizer(x, DynamicPerToken()) @ quantized(edits["1.weight"][None], weights)[0].T
        errors[alpha] = float((rounded - exact).norm() / exact.norm())
    assert errors[found] <= 1.1 * min(errors.values())


def test_a_search_may_find_that_nothing_helps() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].weight.zero_()
    edits = block_of(model, (torch.randn(16, 8),)).run(SmoothActivations(alpha="search"))
    assert not tensors(edits)
    assert refusals(edits)["1.weight"] == "no α gives a smaller output error than the scale 1 (0)"


def test_explicit_scaling_where_nothing_folds() -> None:
    block = block_of(Two(), (torch.randn(64, 5),))
    edits = block.run(SmoothActivations(explicit=True))
    explicit = [edit for edit in edits if isinstance(edit, SetTransform)]
    assert [edit.name for edit in explicit] == ["a.weight", "c.weight"]
    for edit in explicit:
        (transform,) = edit.transform_in
        assert isinstance(transform, Scale)
        assert torch.equal(transform.factor.log2(), transform.factor.log2().round())
    assert not refusals(edits)


@pytest.mark.parametrize("name", ["gpt2-odd", "mixtral"])
def test_explicit_scaling_is_proven_too(name: str) -> None:
    program, data = decoder(name)
    result = run_recipe(program, [SmoothActivations(explicit=True)], data)
    (check,) = [entry for entry in result.report.checks if entry.get("pass") == "smooth-activations"]
    assert check["max_relative_error"] <= 1e-9


def test_a_search_must_know_what_follows() -> None:
    Recipe([SmoothActivations(alpha="search"), QuantizeWeights(), QuantizeActivations()])
    Recipe([SmoothActivations(), QuantizeWeights(bits=4)])
    with pytest.raises(
        RecipeError, match="smooth-activations prepares weights for int8 symmetric, per row, but"
    ):
        Recipe([SmoothActivations(alpha="search"), QuantizeWeights(bits=4)])
    with pytest.raises(
        RecipeError, match="prepares for dynamic 8-bit inputs, but 'quantize-activations' makes"
    ):
        Recipe([SmoothActivations(alpha="search"), QuantizeWeights(), QuantizeActivations(mode="static")])
    with pytest.raises(RecipeError, match="steps=0, expected a positive integer"):
        SmoothActivations(alpha="search", steps=0)
