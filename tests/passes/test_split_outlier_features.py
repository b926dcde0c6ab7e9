from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.apply import apply_state
from fxcompress.errors import RecipeError
from fxcompress.forms import FixedOutliers, OutlierColumns, OutlierSplit, QuantizedWeight
from fxcompress.ops import apply_quantizer
from fxcompress.passes import QuantizeActivations, QuantizeWeights, SplitOutlierFeatures
from tests.passes.models import Attention, Autoencoder, Convolutions, Language
from tests.passes.one_block import OneBlock, block_of, refusals

X = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0))
X[..., 7] *= 40
OPS = torch.ops.fxcompress


def attention() -> OneBlock:
    return block_of(Attention(), (X,))


def rewritten(block: OneBlock) -> tuple[set[Any], Tensor, Tensor]:
    """Operators of the rewritten graph, its output, and what the forms mean: x̂ times the effective weight."""
    applied = apply_state(block.program, block.state)
    call = []
    for node in applied.module.graph.nodes:
        if node.op == "placeholder":
            if node.name in applied.form_inputs:
                ref = applied.form_inputs[node.name]
                value: Any = block.state.forms[ref.name]
                for step in ref.path.split("."):
                    value = value[int(step)] if isinstance(value, tuple) else getattr(value, step)
                call.append(value)
            elif node.name in block.program.weight_of:
                call.append(block.program.weights[block.program.weight_of[node.name]])
            else:
                call.append(block.data[0][0])
    targets = {node.target for node in applied.module.graph.nodes}
    with torch.no_grad():
        return targets, applied.module(*call)[0], reference(block)


@torch.no_grad()
def reference(block: OneBlock) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        form = block.state.form(f"{name}.weight")
        x = x if form.activation is None else apply_quantizer(x, form.activation)
        bias = block.program.weights.get(f"{name}.bias")
        return nn.functional.linear(x, block.dense(f"{name}.weight"), bias)

    x = block.data[0][0]
    q, k, v = (linear(x, name) for name in "qkv")
    x = x + linear(nn.functional.scaled_dot_product_attention(q, k, v), "o")
    weights = block.program.weights
    h = nn.functional.layer_norm(x, (20,), weights["norm.weight"], weights["norm.bias"])
    return x + linear(nn.functional.silu(linear(h, "gate")) * linear(h, "up"), "down")


def test_found_at_run_time() -> None:
    block = attention()
    assert refusals(block.run(SplitOutlierFeatures())) == {}
    form = block.state.form("q.weight")
    assert isinstance(form.terms[0], QuantizedWeight)
    assert isinstance(form.activation, OutlierSplit)
    targets, value, expected = rewritten(block)
    assert OPS.outlier_product.default in targets
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_fixed_columns_are_the_largest_and_keep_their_weights() -> None:
    block = attention()
    before = block.weight("q.weight").detach().clone()
    assert refusals(block.run(SplitOutlierFeatures(columns=3))) == {}
    form = block.state.form("q.weight")
    assert isinstance(form.activation, FixedOutliers)
    top = X.flatten(0, 1).abs().amax(0).topk(3).indices
    assert set(form.activation.columns.tolist()) == set(top.tolist())
    assert 7 in form.activation.columns
    main, side = form.terms
    assert isinstance(side, OutlierColumns)
    assert torch.equal(side.values, before[:, form.activation.columns])
    assert not main.dense(torch.float32)[:, form.activation.columns].any()
    targets, value, expected = rewritten(block)
    assert OPS.outlier_product.default not in targets
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_it_beats_plain_w8a8_when_a_channel_has_outliers() -> None:
    original = reference(attention())

    def error(*passes: Any) -> float:
        block = attention()
        for method in passes:
            block.run(method)
        return float((reference(block) - original).norm() / original.norm())

    plain = error(QuantizeWeights(bits=8), QuantizeActivations(bits=8))
    assert error(SplitOutlierFeatures()) < 0.6 * plain
    assert error(SplitOutlierFeatures(columns=1)) < 0.6 * plain


def test_siblings_share_the_split() -> None:
    block = attention()
    block.run(SplitOutlierFeatures(columns=2))
    applied = apply_state(block.program, block.state)
    splits = [n for n in applied.module.graph.nodes if n.target is OPS.quantize_per_token.default]
    assert len(splits) == 4  # q, k and v; o; gate and up; down


def test_reasons() -> None:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    block = block_of(Language(tied=True), (ids,))
    assert refusals(block.run(SplitOutlierFeatures(exclude=("*.o.*",)))) == {
        "table.weight": "embedding: its input stays unquantized",
        "layer.o.weight": "excluded by '*.o.*'",
    }
    convolutions = refusals(
        block_of(Convolutions(), (torch.randn(2, 3, 13, 12),)).run(SplitOutlierFeatures())
    )
    assert all("linear layers only" in reason for reason in convolutions.values())
    both = block_of(Autoencoder(), (torch.randn(4, 20),)).run(SplitOutlierFeatures(columns=2))
    assert refusals(both) == {
        "code.weight": "used in two directions, which one choice of columns cannot serve"
    }
    wide = block_of(Attention(), (X,)).run(SplitOutlierFeatures(columns=24))
    assert refusals(wide)["q.weight"] == "columns=24 would keep all of its 20 inputs in float"
    assert "down.weight" not in refusals(wide)
    done = attention()
    done.run(QuantizeWeights(bits=8))
    assert "no column of it can be kept" in refusals(done.run(SplitOutlierFeatures(columns=2)))["q.weight"]
    done.run(SplitOutlierFeatures())
    assert isinstance(done.state.form("q.weight").activation, OutlierSplit)


def test_without_data_fixed_columns_are_refused() -> None:
    block = block_of(Attention(), (X,))
    block.data = []
    assert set(refusals(block.run(SplitOutlierFeatures(columns=2))).values()) == {
        "no calibration token reaches it"
    }


@pytest.mark.parametrize("columns", [None, 3])
def test_second_run_changes_nothing(columns: int | None) -> None:
    block = attention()
    block.run(SplitOutlierFeatures(columns=columns))
    before = dict(block.state.forms)
    assert set(refusals(block.run(SplitOutlierFeatures(columns=columns))).values()) == {
        "its input is quantized already"
    }
    assert block.state.forms == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold=0"),
        ({"threshold": float("inf")}, "threshold=inf"),
        ({"threshold": True}, "threshold=True"),
        ({"columns": 0}, "columns=0"),
        ({"columns": 2.5}, "columns=2.5"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SplitOutlierFeatures(**options)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_other_widths_and_groups(bits: int) -> None:
    block = attention()
    assert refusals(block.run(SplitOutlierFeatures(bits, group_size=8))) == {}
    form = block.state.form("q.weight")
    (term,) = form.terms
    assert isinstance(term, QuantizedWeight)
    assert isinstance(form.activation, OutlierSplit)
    assert (term.bits, term.group_size, form.activation.bits) == (bits, 8, bits)
    _, value, expected = rewritten(block)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_groups_code_the_small_weights_of_an_outlier_channel_finer() -> None:
    def error(group_size: int) -> float:
        torch.manual_seed(0)
        block = attention()
        with torch.no_grad():
            block.program.weights["q.weight"][:, 7] /= 40
            block.program.weights["q.weight"][:, 10:] *= 10
        exact = block.program.weights["q.weight"][:, 7].detach()
        block.run(SplitOutlierFeatures(group_size=group_size))
        return float((block.dense("q.weight")[:, 7].detach() - exact).norm() / exact.norm())

    assert error(10) < 0.5 * error(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 9}, "bits=9"), ({"bits": True}, "bits=True"), ({"group_size": -1}, "group_size=-1")],
)
def test_bad_widths_and_groups(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SplitOutlierFeatures(**options)
