"""E-Sparse: entropy of channels, its scores, and Wanda's order where channels are alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.errors import RecipeError
from fxcompress.passes._entropy import channel_entropy, entropy_scores
from fxcompress.passes.e_sparse import ESparse
from fxcompress.passes.wanda import Wanda
from tests.passes.models import Attention, Convolutions, Experts
from tests.passes.one_block import block_of


def entropy_of(x: Tensor, bins: int) -> Tensor:
    block = block_of(Attention(), *[(part,) for part in x])
    found = channel_entropy(block, next(s for s in block.sites if s.name == "q.weight"), bins)
    assert found is not None
    return found[0]


def test_entropy_of_known_channels() -> None:
    x = torch.zeros(1, 1, 8, 20)
    x[..., 1] = torch.arange(8.0)  # eight values in eight bins
    x[..., 2] = torch.tensor([0.0, 1] * 4)
    x[..., 3] = 5.0
    found = entropy_of(x, 8)
    assert found[:4].tolist() == pytest.approx([0.0, math.log(8), math.log(2), 0.0])


def test_batches_count_together() -> None:
    x = torch.randn(3, 2, 5, 20)
    torch.testing.assert_close(entropy_of(x, 16), entropy_of(x.reshape(1, 6, 5, 20), 16))


def test_alike_channels_give_the_order_of_wanda() -> None:
    """Every channel is a permutation of the same values: equal entropies, equal norms."""
    values = torch.randn(64)
    x = torch.stack([values[torch.randperm(64)] for _ in range(20)], -1)[None]
    one, two = block_of(Attention(), (x,)), block_of(Attention(), (x,))
    one.run(ESparse(include=("q.weight", "k.weight")))
    two.run(Wanda(pattern="2:4", include=("q.weight", "k.weight")))
    for name in ("q.weight", "k.weight"):
        assert torch.equal(one.state.masks[name].keep, two.state.masks[name].keep)


def test_information_counts() -> None:
    block = block_of(Attention(), (torch.randn(2, 6, 20),))
    site = block.sites[0]
    weight = torch.ones(20, 20)
    norm, entropy = torch.arange(20.0)[None], torch.linspace(3, 0, 20)[None]
    assert torch.equal(entropy_scores(site, weight, norm, entropy, 0.0)[0, 0], entropy[0])
    torch.testing.assert_close(
        entropy_scores(site, weight, norm, entropy, 2.0)[0, 3], entropy[0] + 2 * norm[0]
    )


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Convolutions(), (torch.randn(2, 3, 8, 8),)),
        (Experts(), (torch.randn(8, 16), torch.tensor([2, 2, 8], dtype=torch.int32))),
    ],
)
def test_convolutions_and_experts(model: Any, inputs: Any) -> None:
    block = block_of(model, inputs)
    block.run(ESparse(padding=True))
    assert block.state.masks
    for mask in block.state.masks.values():
        assert (mask.n, mask.m) == (2, 4)


def test_bad_options() -> None:
    for options, message in (
        ({"alpha": -1}, "from 0"),
        ({"bins": 1}, "from 2"),
        ({"pattern": "4:4"}, "0 < n < m"),
    ):
        with pytest.raises(RecipeError, match=message):
            ESparse(**options)  # type: ignore[arg-type]
