"""Rotary embeddings as ONNX Runtime's operator, and where they stay plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxcompress.backends.onnx.operators import ops
from fxcompress.backends.onnx.rotary import fuse_rotary
from fxcompress.capture import capture_model
from tests.backends.onnx_models import compressed
from tests.zoo import entry


class Rotates(nn.Module):
    """Queries and keys turned by one set of angles; ``kind`` names what differs from the usual."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(4) / 4))

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., :4], x[..., 4:]
        if self.kind == "backwards":
            turned = torch.cat([second, -first], -1)
        else:
            turned = torch.cat([-second, first], -1)
        return sin * turned + x * cos if self.kind == "order" else (x * cos) + (turned * sin)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q = q.reshape(q.shape[0], 3, -1, 8)
        k = k.reshape(k.shape[0], 1, -1, 8)
        angles = positions[..., None].float() * self.frequencies
        second = 2 * angles if self.kind == "halves differ" else angles
        both = torch.cat([angles, second], -1)[:, None]
        cos, sin = both.cos() * 0.7, both.sin() * 0.7
        if self.kind == "depends on data":
            cos = cos * q.mean()
        return self.turn(q, cos, sin), self.turn(k, cos, sin)


@pytest.mark.parametrize(
    ("kind", "rows", "fused"),
    [
        ("usual", 2, 2),
        ("usual", 1, 2),  # positions shared by the batch
        ("order", 2, 2),
        ("backwards", 2, 0),
        ("halves differ", 2, 0),
        ("depends on data", 2, 2),  # whatever the angles are made of
    ],
)
def test_what_is_fused_computes_the_same(kind: str, rows: int, fused: int) -> None:
    model = Rotates(kind)
    generator = torch.Generator().manual_seed(0)
    given = {
        "q": torch.randn(2, 3, 5, 8, generator=generator),
        "k": torch.randn(2, 1, 5, 8, generator=generator),
        "positions": torch.tensor([[0, 1, 2, 3, 4], [0, 0, 7, 8, 100]])[-rows:],
    }
    program = capture_model(model, (), given)
    want = model(**given)
    graph = program.graph_module.graph
    values = dict(zip(program.inputs, given.values(), strict=True))
    weights = {node: program.weights[name] for node, name in program.weight_of.items()}
    assert fuse_rotary(graph, [{**weights, **values}]) == fused
    assert fuse_rotary(graph, [{**weights, **values}]) == 0
    graph.eliminate_dead_code()
    graph.lint()
    assert sum(node.target is ops.row_numbers.default for node in graph.nodes) == min(fused, 1)
    everything = {**weights, **values}
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    found = fx.GraphModule(program.graph_module, graph)(*(everything[name] for name in placeholders))
    for one, two in zip(found, want, strict=True):
        torch.testing.assert_close(one, two)


def test_angles_that_no_call_tells_stay() -> None:
    model = Rotates("usual")
    given = {"q": torch.ones(2, 3, 5, 8), "k": torch.ones(2, 1, 5, 8), "positions": torch.ones(2, 5).long()}
    program = capture_model(model, (), given)
    graph = program.graph_module.graph
    assert fuse_rotary(graph, [dict(zip(program.inputs, given.values(), strict=True))]) == 0  # no weights


@pytest.mark.parametrize(("name", "cache"), [("phi", True), ("gemma2", False)])
def test_models_export_with_the_operator(name: str, cache: bool, tmp_path: Path) -> None:
    inputs = entry(name).inputs()
    small = compressed(entry(name).build(), "w8a16", inputs)
    report = small.export_onnx(tmp_path / "m.onnx", cache=cache, example_inputs=inputs)  # checks parity
    assert report.kernels["RotaryEmbedding"] == 2 * small.config.num_hidden_layers
