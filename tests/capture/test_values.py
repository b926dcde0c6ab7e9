from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcompress.capture import capture_model
from fxcompress.capture.values import infer_values


class Twice(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x) + torch.relu(y)


def inserted() -> tuple[fx.Graph, list[fx.Node]]:
    """A captured graph with two equal chains of nodes that nobody gave a type."""
    graph = capture_model(Twice(), (torch.randn(2, 6), torch.randn(2, 6))).graph
    made = []
    for relu in [node for node in graph.nodes if node.target is torch.ops.aten.relu.default]:
        with graph.inserting_after(relu):
            pair = graph.call_function(torch.ops.fxcompress.quantize_per_token.default, (relu, 8))
        with graph.inserting_after(pair):
            codes = graph.call_function(operator.getitem, (pair, 0))
        with graph.inserting_after(codes):
            made.append(graph.call_function(torch.ops.aten.t.default, (codes,)))
    return graph, made


def test_inserted_nodes_get_types_with_symbolic_sizes_and_strides() -> None:
    graph, (one, _) = inserted()
    infer_values(graph)
    value = one.meta["val"]
    assert value.dtype == torch.int8
    assert value.shape[0] == 6
    assert not isinstance(value.shape[1], int)  # the batch stays symbolic
    assert value.stride() == (1, 6)


def test_equal_nodes_have_values_of_their_own() -> None:
    graph, (one, two) = inserted()
    infer_values(graph)
    assert one.meta["val"] is not two.meta["val"]
    assert one.meta["val"].shape == two.meta["val"].shape


def test_known_types_stay() -> None:
    graph, _ = inserted()
    before = {node: node.meta["val"] for node in graph.nodes if "val" in node.meta}
    infer_values(graph)
    assert all(node.meta["val"] is value for node, value in before.items())


def test_tensors_of_forms_lie_where_the_graph_computes() -> None:
    """Known by shape only, on the meta device, they must not meet the graph's values on another one."""
    graph = fx.Graph()
    x, scale = graph.placeholder("x"), graph.placeholder("form_0")
    product = graph.call_function(torch.ops.aten.mul.Tensor, (x, scale))
    graph.output(product)
    with FakeTensorMode():
        x.meta["val"] = torch.empty(2, 3, device="cuda")
    scale.meta["val"] = torch.empty(3, device="meta")
    infer_values(graph)
    assert product.meta["val"].device.type == "cuda"
