from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.apply import apply_state
from fxcompress.calibration import as_calibration
from fxcompress.edits import SetEdge
from fxcompress.errors import RecipeError
from fxcompress.form_inputs import form_tensor
from fxcompress.forms import (
    DynamicPerGroup,
    DynamicPerToken,
    EdgeQuantizer,
    QuantizedWeight,
    StaticPerCluster,
    StaticPerTensor,
)
from fxcompress.manager import run_recipe
from fxcompress.ops import apply_quantizer
from fxcompress.passes import InsertQuantDequant
from tests.passes.models import Attention, Autoencoder, Convolutions
from tests.passes.one_block import OneBlock, block_of, refusals

X = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0))
KINDS = {
    "token": DynamicPerToken,
    "group": DynamicPerGroup,
    "tensor": StaticPerTensor,
    "channel": StaticPerCluster,
}


def attention() -> OneBlock:
    return block_of(Attention(), (X,))


def rewritten(block: OneBlock) -> Tensor:
    applied = apply_state(block.program, block.state)
    call: list[Any] = []
    for node in applied.module.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in applied.form_inputs:
            call.append(form_tensor(block.state, applied.form_inputs[node.name]))
        else:
            name = block.program.weight_of.get(node.name)
            call.append(block.data[0][0] if name is None else block.program.weights[name])
    with torch.no_grad():
        value: Tensor = applied.module(*call)[0]
    return value


@torch.no_grad()
def by_hand(block: OneBlock) -> Tensor:
    """The model with every quantizer written out."""

    def linear(x: Tensor, name: str) -> Tensor:
        quantizer = block.state.form(f"{name}.weight").activation
        assert quantizer is not None
        bias = block.program.weights.get(f"{name}.bias")
        return F.linear(apply_quantizer(x, quantizer), block.dense(f"{name}.weight"), bias)

    def edge(x: Tensor, anchor: str, argument: str) -> Tensor:
        found = [e for e in block.state.form(f"{anchor}.weight").edges if e.argument == argument]
        assert len(found) == 1
        return apply_quantizer(x, found[0].quantizer)

    x = block.data[0][0]
    values = [edge(linear(x, n), n, a) for n, a in (("q", "query"), ("k", "key"), ("v", "value"))]
    x = x + linear(F.scaled_dot_product_attention(*values), "o")  # the model's input has no name
    weights = block.program.weights
    h = F.layer_norm(x, (20,), weights["norm.weight"], weights["norm.bias"])
    down = linear(F.silu(linear(h, "gate")) * linear(h, "up"), "down")
    return edge(x, "o", "self") + edge(down, "down", "other")


@pytest.mark.parametrize("weights", ["tensor", "channel", "group"])
@pytest.mark.parametrize("activations", KINDS)
def test_structure_and_numerics(weights: Any, activations: Any) -> None:
    block = attention()
    method = InsertQuantDequant(weights=weights, activations=activations, group_size=8)
    edits = block.run(method)
    assert refusals(edits) == {}
    term = block.state.form("q.weight").terms[0]
    assert isinstance(term, QuantizedWeight)
    assert term.group_size == {"tensor": -1, "channel": 0, "group": 8}[weights]
    edges = [edit for edit in edits if isinstance(edit, SetEdge)]
    assert [edit.edge.argument for edit in edges] == ["query", "key", "value", "self", "other"]
    assert {type(edit.edge.quantizer) for edit in edges} == {KINDS[activations]}
    torch.testing.assert_close(rewritten(block), by_hand(block), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", KINDS)
def test_the_calibration_walk_agrees_with_the_rewritten_graph(activations: Any) -> None:
    block = attention()
    data = as_calibration([(X,)], block.program)
    method = InsertQuantDequant(activations=activations, activation_bits=4)
    found = run_recipe(block.program, [method], data, verify="end")
    block.state = found.state
    exact = block.program.run_flat([X])[0]
    error = float((rewritten(block) - exact).norm() / exact.norm())
    assert found.report.relative_error == pytest.approx(error, rel=1e-3)
    assert 0 < error < 0.5


def test_groups_have_scales_of_their_own() -> None:
    x = torch.randn(3, 10) * torch.tensor([1.0] * 4 + [100.0] * 4 + [0.01] * 2)
    value = apply_quantizer(x, DynamicPerGroup(8, 4))
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
        assert torch.equal(value[:, part], apply_quantizer(x[:, part], DynamicPerToken(8)))
    assert torch.equal(apply_quantizer(x, DynamicPerGroup(8, 64)), apply_quantizer(x, DynamicPerToken(8)))


def test_what_is_not_asked_for_stays() -> None:
    block = attention()
    edits = block.run(InsertQuantDequant(weights=None, edges=("attention",)))
    assert all(not form.terms for form in block.state.forms.values())
    assert sum(isinstance(edit, SetEdge) for edit in edits) == 3
    assert set(refusals(edits).values()) == {"weights are left alone (weights=null)"}
    bare = attention()
    bare.run(InsertQuantDequant(activations=None))
    assert all(form.activation is None and not form.edges for form in bare.state.forms.values())


def test_convolutions_take_one_scale() -> None:
    x = torch.randn(2, 3, 13, 12)
    reasons = refusals(block_of(Convolutions(), (x,)).run(InsertQuantDequant()))
    assert all("use activations='tensor'" in reason for reason in reasons.values())
    assert refusals(block_of(Convolutions(), (x,)).run(InsertQuantDequant(activations="tensor"))) == {}


def test_a_weight_read_in_two_directions() -> None:
    x = torch.randn(4, 20)
    assert refusals(block_of(Autoencoder(), (x,)).run(InsertQuantDequant(activations="tensor"))) == {}
    reasons = refusals(block_of(Autoencoder(), (x,)).run(InsertQuantDequant(activations="channel")))
    assert reasons == {
        "code.weight": "input: the weight is used in two directions, which one scale per channel cannot serve"
    }


def test_second_run_changes_nothing_and_an_edge_is_set_once() -> None:
    block = attention()
    block.run(InsertQuantDequant())
    before = dict(block.state.forms)
    reasons = block.run(InsertQuantDequant())
    assert all("quantized already" in edit.reason for edit in reasons)
    assert block.state.forms == before
    held = block.state.form("q.weight").edges[0]
    with pytest.raises(RecipeError, match="'query' of this edge is quantized already"):
        block.state.apply(SetEdge("q.weight", held), "test")


def test_an_edge_that_no_graph_has_is_refused_or_reported(caplog: pytest.LogCaptureFixture) -> None:
    block = attention()
    block.state.apply(SetEdge("q.weight", EdgeQuantizer("query", "0" * 24, DynamicPerToken(8))), "test")
    apply_state(block.program, block.state)
    assert "q.weight: this graph has no query to quantize" in caplog.text


def test_saved_edges_come_back(tmp_path: Any) -> None:
    model = Attention().eval()
    small = fxcompress.compress(
        model, [InsertQuantDequant(activations="tensor")], [(X,)], example_inputs=(X,), progress=False
    )
    small.set_backend("eager")
    value = small(X)
    small.save(tmp_path / "small")
    loaded = fxcompress.load(tmp_path / "small", Attention().eval(), backend="eager")
    assert torch.equal(loaded(X), value)
    assert "query: int8 activations static" in str(small.report.to_dict())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_blocks_with_edges_compile_alike() -> None:
    small = fxcompress.compress(Stack().eval(), [InsertQuantDequant()], example_inputs=(X,), progress=False)
    compiled = small(X)
    small.set_backend("eager")
    torch.testing.assert_close(compiled, small(X), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "row"}, "weights='row'"),
        ({"activations": "row"}, "activations='row'"),
        ({"weight_bits": 1}, "weight_bits=1"),
        ({"activation_bits": 9}, "activation_bits=9"),
        ({"group_size": 0}, "group_size=0"),
        ({"edges": "attention"}, "edges='attention'"),
        ({"edges": ("norm",)}, "edges="),
        ({"heads": 1}, "heads=1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        InsertQuantDequant(**options)
