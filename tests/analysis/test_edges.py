from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis.edges import Edge, find_edges
from fxcompress.capture import capture_model


class Layer(nn.Module):
    """Attention over an optional cache, with rotated queries; a gated residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        q = q * 0.5 + q.flip(-1) * 0.5
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v))
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, ids: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x, None if k is None or v is None else (k, v))
        return x


IDS = torch.zeros(2, 5, dtype=torch.int64)


def named(edges: list[Edge]) -> list[tuple[str, str, str]]:
    return [(edge.role, edge.argument, edge.anchor) for edge in edges]


def test_edges_and_their_anchors() -> None:
    edges = find_edges(capture_model(Model().eval(), (IDS,)))
    first = [
        ("attention", "query", "layers.0.q.weight"),
        ("attention", "key", "layers.0.k.weight"),
        ("attention", "value", "layers.0.v.weight"),
        ("sum", "self", "table.weight"),
        ("sum", "other", "layers.0.o.weight"),
        ("sum", "self", "layers.0.o.weight"),
        ("sum", "other", "layers.0.down.weight"),
    ]
    assert named(edges)[:7] == first
    assert named(edges)[7 + 3] == ("sum", "self", "layers.0.down.weight")
    assert len(edges) == 14
    assert not any(edge.reason for edge in edges)
    assert len({edge.signature for edge in edges}) == 14


def test_a_graph_with_a_cache_has_the_same_names() -> None:
    model = Model().eval()
    cache = torch.zeros(2, 3, 8)
    one = find_edges(capture_model(model, (IDS,)))
    two = find_edges(capture_model(model, (IDS[:, :1], cache, cache)))
    assert named(one) == named(two)
    assert [edge.signature for edge in one] == [edge.signature for edge in two]


def test_products_of_activations_are_edges_and_products_with_weights_are_none() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return torch.softmax(a @ b.transpose(1, 2), -1) @ b

    edges = find_edges(capture_model(Products(), (torch.randn(2, 5, 8),)))
    assert [(edge.role, edge.argument) for edge in edges] == [("product", "self"), ("product", "other")] * 2
    assert len({edge.signature for edge in edges}) == 4


def test_what_cannot_be_told_apart_is_refused() -> None:
    class Twice(Layer):
        def forward(self, x: Tensor, past: Any = None) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q + 1, k, v)

    edges = find_edges(capture_model(Twice(), (torch.randn(2, 5, 8),)))
    assert len(edges) == 6
    assert all("2 ops read" in edge.reason for edge in edges)


def test_values_of_no_weight_have_no_edge() -> None:
    class Inputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.a(x) + mask + 1

    assert find_edges(capture_model(Inputs(), (torch.randn(2, 8), torch.randn(2, 8)))) == []
