"""ClipWeights: which ranges shrink, which weights are left, the error it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.calibration import as_calibration
from fxcompress.capture.export import capture_model
from fxcompress.errors import FormatError, RecipeError
from fxcompress.formats import IntFormat
from fxcompress.manager import run_recipe
from fxcompress.passes import Awq, ClipWeights, QuantizeWeights
from fxcompress.passes._input_rows import Rows
from fxcompress.passes._output_error import quantized
from fxcompress.passes.clip_weights import best_bounds
from fxcompress.recipe import Recipe
from tests.passes.models import Attention, Autoencoder, Experts, Language
from tests.passes.one_block import block_of, refusals
from tests.passes.test_smooth_activations import tensors

BITS3 = IntFormat(bits=3, symmetric=True, group_size=0)


def outlying() -> torch.Tensor:
    """Rows of small weights with one large weight, whose input is silent."""
    torch.manual_seed(0)
    matrix = torch.randn(1, 4, 32)
    matrix[..., 7] = 8.0
    return matrix


def test_a_large_weight_that_meets_no_input_is_clipped() -> None:
    x = torch.randn(1, 50, 32)
    x[..., 7] = 0.0
    bound = best_bounds(outlying(), [Rows(x, None)], BITS3, 10)
    assert bool((bound <= 8 * 0.7).all())
    assert bool((bound >= 8 * 0.55 - 1e-5).all())


def test_a_large_weight_that_matters_is_kept() -> None:
    x = torch.randn(1, 50, 32)
    x[..., 7] = 100.0
    bound = best_bounds(outlying(), [Rows(x, None)], BITS3, 10)
    torch.testing.assert_close(bound, torch.full((1, 4, 1), 8.0))


@settings(deadline=None, max_examples=25)
@given(
    columns=st.integers(1, 23),
    group=st.integers(0, 9),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    batches=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_group_is_no_worse_than_unclipped(
    columns: int, group: int, bits: int, symmetric: bool, batches: int, seed: int
) -> None:
    torch.manual_seed(seed)
    group = min(group, columns)
    fmt = IntFormat(bits=bits, symmetric=symmetric, group_size=group)
    matrix, x = torch.randn(batches, 5, columns) ** 3, torch.randn(batches, 9, columns)
    matrix[:, 0] = 0.0  # a dead row
    bound = best_bounds(matrix, [Rows(x, 0)], fmt, 10)
    assert bound.shape == (batches, 5, fmt.groups(columns))
    size = group or columns
    for index, part in enumerate(matrix.split(size, -1)):
        rows = x[..., index * size : index * size + part.shape[-1]]
        own = IntFormat(bits=bits, symmetric=symmetric, group_size=0)
        limit = bound[..., index : index + 1]
        clipped = torch.minimum(torch.maximum(part, -limit), limit)
        errors = [((rows @ (quantized(w, own) - part).mT) ** 2).sum(1) for w in (clipped, part)]  # [B, N]
        assert bool((errors[0] <= errors[1] * (1 + 1e-4) + 1e-6).all())


def test_queries_and_keys_are_left_unless_asked_for() -> None:
    x = torch.randn(4, 9, 20)
    reasons = refusals(block_of(Attention(), (x,)).run(ClipWeights(bits=3, group_size=4)))
    assert reasons["q.weight"] == reasons["k.weight"] == "makes queries or keys (scores=False)"
    assert "v.weight" not in reasons
    asked = tensors(block_of(Attention(), (x,)).run(ClipWeights(bits=3, group_size=4, scores=True)))
    assert {"q.weight", "k.weight"} <= set(asked)


def test_what_it_leaves_alone() -> None:
    ids = torch.arange(12).reshape(2, 6)
    reasons = refusals(block_of(Language(tied=False), (ids,)).run(ClipWeights(group_size=4)))
    assert reasons["table.weight"].startswith("embedding, rounded at 8 bits")
    assert reasons["head.weight"].startswith("output head")
    assert "used at several places" in reasons["layer.k.weight"]
    both = refusals(block_of(Autoencoder(), (torch.randn(4, 20),)).run(ClipWeights(group_size=4)))
    assert "used at several places" in both["code.weight"]


def test_experts_are_clipped_by_the_rows_they_get() -> None:
    inputs = (torch.randn(7, 16), torch.tensor([3, 3, 7], dtype=torch.int32))
    block = block_of(Experts(), inputs)
    edits = tensors(block.run(ClipWeights(bits=2, group_size=8)))
    assert "grouped" in edits
    assert torch.equal(edits["grouped"][1], block.program.weights["grouped"][1]), "no row reached it"


def test_it_lowers_the_error_of_rounding_and_promises_no_unchanged_function() -> None:
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(200, 32)
    program = capture_model(model.eval(), (x,))
    data = as_calibration([(x[:100],), (x[100:],)], program)
    rounding = QuantizeWeights(bits=2, group_size=0)
    plain = run_recipe(program, [rounding], data).report.relative_error
    clipped = run_recipe(program, [ClipWeights(bits=2, group_size=0), rounding], data)
    assert plain is not None
    assert clipped.report.relative_error is not None
    assert clipped.report.relative_error < plain
    assert not [entry for entry in clipped.report.checks if entry.get("pass") == "clip-weights"]


def test_order_and_formats() -> None:
    Recipe([Awq(), ClipWeights(), QuantizeWeights(bits=4, group_size=64)])
    with pytest.raises(RecipeError, match="clip-weights prepares weights for int4"):
        Recipe([ClipWeights(), QuantizeWeights()])
    with pytest.raises(RecipeError, match="'clip-weights' cannot run after 'quantize-weights'"):
        Recipe([QuantizeWeights(bits=4), ClipWeights()])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 1}, FormatError, "clip-weights: IntFormat: bits=1"),
        ({"group_size": -1}, RecipeError, "one range per matrix is not supported"),
        ({"steps": 0}, RecipeError, "steps=0"),
        ({"scores": "no"}, RecipeError, "scores='no', expected true or false"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ClipWeights(**options)
