from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxcompress.calibration import as_calibration
from fxcompress.capture.export import capture_model
from fxcompress.edits import SetTensor, SetWeight
from fxcompress.errors import FormatError, RecipeError
from fxcompress.formats import IntFormat
from fxcompress.formats.integer import decode, encode, find_parameters
from fxcompress.forms import FloatWeight, QuantizedWeight, Scale, WeightLayout
from fxcompress.manager import run_recipe
from fxcompress.passes import QuantizeWeights
from fxcompress.passes.quantize_weights import column_factor
from tests.passes.models import Attention, Autoencoder, Convolutions, Language, Products
from tests.passes.one_block import OneBlock, block_of, compressed, refusals

IDS = torch.arange(12).reshape(2, 6)


def attention() -> OneBlock:
    return block_of(Attention(), (torch.randn(2, 5, 20),))


def term(block: OneBlock, name: str) -> QuantizedWeight:
    (found,) = block.state.form(name).terms
    assert isinstance(found, QuantizedWeight)
    return found


def nearest(w: torch.Tensor, fmt: IntFormat, search: bool = False) -> torch.Tensor:
    parameters = find_parameters(w[None], fmt, search=search)
    return decode(encode(w[None], *parameters, fmt), *parameters, fmt, w.dtype)[0]


def test_structure_every_linear_weight_once() -> None:
    block = attention()
    edits = block.run(QuantizeWeights())
    assert compressed(edits) == [f"{name}.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert len(edits) == 7
    assert all(isinstance(edit, SetWeight) and edit.reason == "int8 symmetric, per row" for edit in edits)


@pytest.mark.parametrize(
    ("options", "fmt"),
    [
        ({}, IntFormat(8, True, 0)),
        ({"bits": 4, "group_size": 8}, IntFormat(4, False, 8)),
        ({"bits": 4}, IntFormat(4, False, 0)),  # the default group of 64 exceeds a row
        ({"bits": 3, "symmetric": True, "group_size": 7}, IntFormat(3, True, 7)),
        ({"bits": 8, "symmetric": False, "group_size": -1}, IntFormat(8, False, -1)),
        ({"bits": 2, "group_size": 8, "search": True}, IntFormat(2, False, 8)),
    ],
)
def test_numerics_equal_rounding_to_nearest(options: dict[str, Any], fmt: IntFormat) -> None:
    block = attention()
    before = {name: tensor.clone() for name, tensor in block.program.weights.items()}
    block.run(QuantizeWeights(**options))
    for name in ("q.weight", "down.weight"):
        assert term(block, name).format == fmt
        expected = nearest(before[name], fmt, bool(options.get("search")))
        torch.testing.assert_close(block.state.effective(name), expected, rtol=0, atol=0)
    torch.testing.assert_close(dict(block.program.weights), before, rtol=0, atol=0)


def test_eight_bits_hardly_change_the_output() -> None:
    block = attention()
    x = torch.randn(2, 5, 20)
    output = list(block.program.graph.nodes)[-1].args[0][0]
    before = block.values((x,), [output])[output.name]
    block.run(QuantizeWeights())
    after = block.values((x,), [output])[output.name]
    assert 0 < (after - before).norm() < 0.01 * before.norm()


def test_second_run_is_refused_or_changes_nothing() -> None:
    block = attention()
    block.run(QuantizeWeights())
    with pytest.raises(RecipeError, match=r"q\.weight: already compressed by quantize-weights.*reorder"):
        block.run(QuantizeWeights(bits=4))
    assert block.run(QuantizeWeights(bits=4, only_remaining=True)) == []


def test_the_rest_is_taken_after_a_partial_pass() -> None:
    block = attention()
    assert compressed(block.run(QuantizeWeights(bits=4, group_size=4, include=("q.*",)))) == ["q.weight"]
    rest = compressed(block.run(QuantizeWeights(only_remaining=True)))
    assert "q.weight" not in rest
    assert len(rest) == 6


def test_patterns_give_reasons() -> None:
    block = attention()
    edits = block.run(QuantizeWeights(include=("*.weight",), exclude=("o.*",)))
    assert refusals(edits) == {"o.weight": "excluded by 'o.*'"}
    other = attention()
    assert refusals(other.run(QuantizeWeights(include=("q.*", "k.*"))))["v.weight"] == (
        "matches none of the include patterns"
    )


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"exclude pattern 'mpl\.\*' matches no parameter"):
        attention().run(QuantizeWeights(exclude=("mpl.*",)))


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_get_their_own_format(tied: bool) -> None:
    block = block_of(Language(tied), (IDS,))
    block.run(QuantizeWeights(bits=4, group_size=10, embedding_bits=6, head_bits=5))
    assert term(block, "table.weight").format == IntFormat(6, True, 0)
    assert term(block, "layer.k.weight").format == IntFormat(4, False, 10)  # also a graph output: no head
    assert term(block, "layer.up.weight").format == IntFormat(4, False, 10)
    if not tied:
        assert term(block, "head.weight").format == IntFormat(5, True, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_can_be_left_alone(tied: bool) -> None:
    block = block_of(Language(tied), (IDS,))
    reasons = refusals(block.run(QuantizeWeights(embedding_bits=None, head_bits=None)))
    assert reasons.pop("table.weight") == "embedding, left alone by embedding_bits=None"
    assert reasons == ({} if tied else {"head.weight": "output head, left alone by head_bits=None"})


def test_a_tied_weight_is_treated_at_its_first_use_only() -> None:
    first = block_of(
        Language(tied=True), (IDS,), only=lambda site: site.node.target is torch.ops.aten.embedding.default
    )
    assert compressed(first.run(QuantizeWeights())) == ["table.weight"]
    later = block_of(
        Language(tied=True),
        (IDS,),
        only=lambda site: site.node.target is not torch.ops.aten.embedding.default,
    )
    assert "table.weight" not in [edit.name for edit in later.run(QuantizeWeights())]


def test_a_weight_read_in_two_directions_keeps_the_layout_of_its_first_use() -> None:
    block = block_of(Autoencoder(), (torch.randn(4, 20),))
    assert compressed(block.run(QuantizeWeights())) == ["code.weight"]
    assert term(block, "code.weight").layout == WeightLayout.rows((12, 20))


def test_every_kind_of_site_is_taken_in_its_layout() -> None:
    block = block_of(Convolutions(), (torch.randn(2, 3, 13, 12),))
    assert len(compressed(block.run(QuantizeWeights()))) == 5
    assert term(block, "up.weight").scale.shape == (1, 6, 1)
    assert term(block, "depthwise.weight").format == IntFormat(8, True, 0)
    products = block_of(Products(), (torch.randn(2, 5, 20),))
    edits = products.run(QuantizeWeights(bits=4, group_size=8))
    assert set(compressed(edits)) == {"query", "output", "kn", "many", "after"}
    assert refusals(edits)["scaled"] == "consumed by aten::sum, which only a dense weight serves"
    assert term(products, "many").scale.shape == (4, 9, 2)


def test_a_weight_that_would_not_shrink_is_left_alone() -> None:
    block = block_of(nn.Conv1d(4, 4, 2, groups=4), (torch.randn(2, 4, 7),))
    assert compressed(block.run(QuantizeWeights())) == ["weight"]  # 24 bits instead of 32
    half = block_of(nn.Conv1d(4, 4, 2, groups=4).bfloat16(), (torch.randn(2, 4, 7).bfloat16(),))
    assert refusals(half.run(QuantizeWeights())) == {
        "weight": "int8 symmetric, per row would take 24 bits per weight, torch.bfloat16 takes 16"
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 9}, FormatError, "quantize-weights: IntFormat: bits=9"),
        ({"group_size": -2}, FormatError, "group_size=-2"),
        ({"embedding_bits": 1}, FormatError, "bits=1"),
        ({"search": "yes"}, RecipeError, "search='yes', expected true or false"),
        ({"symmetric": 1}, RecipeError, "symmetric=1"),
        ({"include": (1,)}, RecipeError, "expected a list of name patterns"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantizeWeights(**options)


def test_lists_and_single_patterns_become_tuples() -> None:
    assert QuantizeWeights(include=["a", "b"], exclude="c").include == ("a", "b")  # type: ignore[arg-type]
    assert QuantizeWeights(exclude="c").exclude == ("c",)  # type: ignore[arg-type]


def outlying_table(tied: bool = True) -> OneBlock:
    """A language model with one column of the table far larger than the others."""
    block = block_of(Language(tied), (IDS,))
    block.state.apply(
        SetTensor("table.weight", block.weight("table.weight") * torch.tensor([1.0] * 19 + [50.0])), "test"
    )
    return block


@pytest.mark.parametrize("tied", [True, False])
def test_a_factor_per_column_keeps_outlying_columns_from_setting_every_scale(tied: bool) -> None:
    errors = []
    for option in (False, True):
        block = outlying_table(tied)
        before = block.weight("table.weight").detach()
        block.run(QuantizeWeights(column_scales=option))
        form = block.state.form("table.weight")
        after = block.state.effective("table.weight")
        if option:
            (transform,) = form.transform_in
            assert isinstance(transform, Scale)
            assert transform.factor.argmax() == 19
            after = after * transform.factor
            assert bool(block.state.form("head.weight").transform_in) != tied
        else:
            assert not form.transform_in
        assert not block.state.form("layer.q.weight").transform_in
        errors.append(float((after - before)[:, :19].norm()))
    assert errors[1] < errors[0] / 5


def test_the_factor_keeps_the_meaning_of_the_weight() -> None:
    program = capture_model(Language(tied=True).eval(), (IDS,))
    data = as_calibration([(IDS,)], program)
    found = [
        run_recipe(program, [QuantizeWeights(column_scales=option)], data).report.relative_error
        for option in (False, True)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[1] < 0.02


def test_no_factor_where_a_use_could_not_take_it() -> None:
    class Both(nn.Module):
        """A table that is also multiplied from the other side."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 9)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids) @ self.table.weight

    block = OneBlock(capture_model(Both().eval(), (IDS % 9,)), [(IDS % 9,)])
    assert compressed(block.run(QuantizeWeights())) == ["table.weight"]
    assert not block.state.form("table.weight").transform_in


def test_column_factors_of_odd_matrices() -> None:
    assert torch.equal(column_factor(torch.zeros(1, 3, 4)), torch.ones(4))
    matrix = torch.tensor([[[0.0, 1e-30, 1e30, 1.0]]])
    factor = column_factor(matrix)
    assert factor[0] == 1
    assert bool((factor > 0).all())
    assert bool(torch.isfinite(matrix / factor).all())
    equal = column_factor(torch.full((1, 2, 5), 3.0, dtype=torch.float16))
    torch.testing.assert_close(equal, torch.ones(5))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize(("group_size", "blocks"), [(None, (1, 0)), (-1, (0, 0)), (8, (8, 8))])
def test_floating_point_weights(kind: str, group_size: int | None, blocks: tuple[int, int]) -> None:
    block = block_of(Language(tied=False), (torch.zeros(2, 5, dtype=torch.int64),))
    edits = block.run(QuantizeWeights(format=f"fp8-{kind}", group_size=group_size))
    term = block.state.form("layer.down.weight").terms[0]
    assert isinstance(term, FloatWeight)
    assert (term.format_kind, term.block_rows, term.block_columns) == (kind, *blocks)
    weight = block.program.weights["layer.down.weight"].detach()
    bound = 0.04 if kind == "e4m3" else 0.08
    assert float((term.dense(weight.dtype) - weight).norm() / weight.norm()) < bound
    # What is looked up stays integer.
    assert all(
        isinstance(block.state.form(n).terms[0], QuantizedWeight) for n in ("table.weight", "head.weight")
    )
    assert refusals(edits) == {}
    with pytest.raises(RecipeError, match="already compressed"):
        block.run(QuantizeWeights(format="fp8-e4m3"))


def test_floating_point_weights_of_every_kind_of_site() -> None:
    block = block_of(Products(), (torch.randn(2, 5, 20),))
    block.run(QuantizeWeights(format="fp8-e4m3"))
    assert isinstance(block.state.form("many").terms[0], FloatWeight)
    assert block.state.form("many").terms[0].codes.shape == (4, 9, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fp9"}, "format='fp9', expected 'int', 'fp8-e4m3', 'fp8-e5m2'"),
        ({"format": "fp8-e4m3", "bits": 4}, "has 8 bits, but bits=4"),
        ({"format": "fp8-e4m3", "symmetric": True}, "symmetric does not apply"),
        ({"format": "fp8-e4m3", "search": True}, "search does not apply"),
    ],
)
def test_floating_point_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeWeights(**options)
