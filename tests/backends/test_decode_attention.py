"""Attention of one query equals ATen's, whatever the grouping and the mask."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcompress.backends.cpu import attention
from fxcompress.compat import trace_pre_dispatch


def traced(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: int, **options: Any
) -> fx.GraphModule:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        def repeat(x: Tensor) -> Tensor:
            batch, heads, length, width = x.shape
            x = x[:, :, None].expand(batch, heads, groups, length, width)
            return x.reshape(batch, heads * groups, length, width)

        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, **options)

    mode = FakeTensorMode()
    fakes = [None if tensor is None else mode.from_tensor(tensor) for tensor in (q, k, v, mask)]
    return trace_pre_dispatch(call, fakes, mode)


class Lowered(fx.Interpreter):
    """Runs attentions of one query as the backend does; every value is kept, as there."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.used = 0

    def run_node(self, n: fx.Node) -> Any:
        if attention.decodes(n):
            self.used += 1
            return attention.attend(n, lambda a: fx.node.map_arg(a, lambda node: self.env[node]))
        return super().run_node(n)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    length=st.integers(1, 9),
    width=st.sampled_from([4, 7]),
    mask=st.sampled_from(["none", "float", "bool", "per head"]),
    scale=st.sampled_from([None, 0.3]),
)
def test_equals_aten(
    batch: int, kv_heads: int, groups: int, length: int, width: int, mask: str, scale: float | None
) -> None:
    torch.manual_seed(0)
    heads = kv_heads * groups
    q = torch.randn(batch, heads, 1, width)
    k, v = torch.randn(2, batch, kv_heads, length, width)
    given_mask = {
        "none": None,
        "float": torch.randn(batch, 1, 1, length),
        "bool": torch.rand(batch, 1, 1, length) > 0.4,  # may mask everything
        "per head": torch.randn(batch, heads, 1, length),
    }[mask]
    module = traced(q, k, v, given_mask, groups, scale=scale)
    lowered = Lowered(module)
    torch.testing.assert_close(
        lowered.run(q, k, v, given_mask), module(q, k, v, given_mask), rtol=1e-5, atol=1e-6
    )
    assert lowered.used == 1


def test_keys_are_read_before_they_are_repeated() -> None:
    q, k, v = torch.randn(1, 6, 1, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    module = traced(q, k, v, None, 3)
    node = next(n for n in module.graph.nodes if attention.decodes(n))
    names = [attention.before_repeating(argument).name for argument in node.args[1:3]]
    assert names == ["k_1", "v_1"]


@pytest.mark.parametrize("options", [{"is_causal": True}])
def test_what_stays_with_aten(options: dict[str, Any]) -> None:
    q, k, v = torch.randn(3, 1, 2, 1, 4)
    module = traced(q, k, v, None, 1, **options)
    assert not any(attention.decodes(node) for node in module.graph.nodes)
    long = torch.randn(1, 2, 3, 4)
    assert not any(attention.decodes(node) for node in traced(long, k, v, None, 1).graph.nodes)
