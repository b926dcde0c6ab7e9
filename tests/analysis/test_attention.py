"""Attention sites: both spellings, in every architecture that has attention, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis.attention import AttentionSite, find_attention
from fxcompress.capture import capture_model
from tests.zoo import entry


def found_in(name: str) -> list[AttentionSite]:
    animal = entry(name)
    return find_attention(capture_model(animal.build(), (), animal.inputs()))


@pytest.mark.parametrize(
    ("name", "count", "heads", "kv_heads", "rotary", "fused"),
    [
        ("llama-tied-odd", 3, 3, 1, True, False),
        ("gpt2-odd", 3, 3, 3, False, True),
        ("falcon", 2, 4, 1, True, True),
        ("gemma2", 2, 4, 2, True, False),  # scores, soft cap, softmax, values
        ("bert", 2, 4, 4, False, False),
        ("t5", 6, 4, 4, False, False),  # encoder, decoder, and across
    ],
)
def test_attention_of_real_architectures(
    name: str, count: int, heads: int, kv_heads: int, rotary: bool, fused: bool
) -> None:
    sites = found_in(name)
    assert len(sites) == count
    for site in sites:
        assert (site.heads, site.kv_heads, site.rotary) == (heads, kv_heads, rotary)
        (query,), (key,), (value,) = site.query_weights, site.key_weights, site.value_weights
        assert (len({query, key, value}) == 1) is fused
        assert site.name == value


def test_a_key_assembled_in_a_buffer_has_both_its_sources() -> None:
    for index, site in enumerate(found_in("deepseek-v3")):
        assert site.rotary
        attention = f"model.layers.{index}.self_attn"
        assert site.key_weights == (
            f"{attention}.kv_a_proj_with_mqa.weight",
            f"{attention}.kv_b_proj.weight",
        )
        assert site.value_weights == (f"{attention}.kv_b_proj.weight",)


class Routed(nn.Module):
    """A softmax over a router's scores mixes two branches: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1).transpose(1, 2) @ self.experts(x)


class OwnAttention(nn.Module):
    """Attention without heads, in several spellings."""

    def __init__(self, style: str, dim: int = -1) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.style, self.dim = nn.LayerNorm(8), style, dim

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.norm(self.q(x)), self.k(x), self.v(x)
        if self.style == "fused":
            return self.o(F.scaled_dot_product_attention(q, k, v))
        scores = torch.einsum("bqd,bkd->bqk", q, k) if self.style == "einsum" else q @ k.mT
        scores = torch.tanh(scores / 3) + torch.ones(x.shape[1], x.shape[1]).triu(1) * -1e4
        return self.o(scores.softmax(self.dim) @ v)


@torch.no_grad()
@pytest.mark.parametrize("style", ["fused", "matmul", "einsum"])
def test_every_spelling(style: str) -> None:
    (site,) = find_attention(capture_model(OwnAttention(style).eval(), (torch.randn(2, 5, 8),), {}))
    assert (site.query_weights, site.key_weights) == (("q.weight",), ("k.weight",))
    assert site.value_weights == ("v.weight",)
    assert site.key_transposed == (style == "matmul")
    assert (site.heads, site.rotary) == (None, False)


@torch.no_grad()
@pytest.mark.parametrize(
    "model", [Routed(), OwnAttention("matmul", dim=1)], ids=["router", "softmax over queries"]
)
def test_what_is_none(model: nn.Module) -> None:
    assert find_attention(capture_model(model.eval(), (torch.randn(2, 5, 8),), {})) == []


def test_no_attention_in_a_state_space_model() -> None:
    assert found_in("mamba") == []
