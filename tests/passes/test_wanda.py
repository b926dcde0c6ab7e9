"""Wanda: known scores, rows, patterns, the variant of equal loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.errors import RecipeError
from fxcompress.passes._moments import diagonal_moments
from fxcompress.passes._pruning import keep_groups, keep_highest, zeros_of
from fxcompress.passes._scores import cumulative_shares, wanda_scores
from fxcompress.passes._selection import candidates
from fxcompress.passes.prune_magnitude import PruneMagnitude
from fxcompress.passes.wanda import Wanda
from tests.passes.models import Attention, Convolutions, Experts
from tests.passes.one_block import block_of, refusals

WEIGHT = torch.tensor([[4.0, -1, 2, 3], [1, 5, -2, 0.5]])
NORMS = torch.tensor([1.0, 8, 2, 0.5])


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + 0.0


def test_known_scores() -> None:
    block = block_of(One(), (torch.diag(NORMS) * 2,))  # E[x_j²] = NORMS²
    site = block.sites[0]
    scores = wanda_scores(site, WEIGHT, NORMS.square()[None])
    assert scores.tolist() == [[[4, 8, 4, 1.5], [1, 40, 4, 0.25]]]
    assert [row.logical_not().nonzero().flatten().tolist() for row in keep_highest(scores[0], 0.25)] == [
        [3],
        [3],
    ]
    for keep in (keep_highest(scores[0], 0.5), keep_groups(scores[0], 2, 4)):
        assert [row.logical_not().nonzero().flatten().tolist() for row in keep] == [[0, 3], [0, 3]]
    block.state.tensors["fc.weight"] = WEIGHT
    block.run(Wanda())
    assert block.state.weight("fc.weight").tolist() == [[0, -1, 2, 0], [0, 5, -2, 0]]


def test_uniform_norms_give_magnitudes_per_row() -> None:
    block = block_of(One(), (torch.eye(4),))
    block.run(Wanda(pattern="1:4"))
    other = block_of(One(), (torch.eye(4),))
    other.run(PruneMagnitude(pattern="1:4"))
    assert torch.equal(block.state.weight("fc.weight"), other.state.weight("fc.weight"))


def test_every_row_loses_the_same_number() -> None:
    block = block_of(Attention(), (torch.randn(2, 6, 20),), (torch.randn(3, 4, 20),))
    block.run(Wanda(sparsity=0.35))
    for mask in block.state.masks.values():
        assert bool(((~mask.matrix).sum(-1) == zeros_of(0.35, mask.matrix.shape[-1])).all())


def test_rows_lose_the_same_share_and_the_count_is_exact() -> None:
    scores = torch.tensor([[1.0, 1, 1, 1], [0.1, 0.1, 0.1, 9.7]])
    share = cumulative_shares(scores)
    torch.testing.assert_close(share.float(), torch.tensor([[0.25, 0.5, 0.75, 1], [0.01, 0.02, 0.03, 1]]))
    block = block_of(Attention(), (torch.randn(2, 6, 20),))
    block.run(Wanda(sparsity=0.4, equal_loss=True))
    for mask in block.state.masks.values():
        assert mask.pruned == zeros_of(0.4, mask.keep.numel())


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Convolutions(), (torch.randn(2, 3, 8, 8),)),
        (Experts(), (torch.randn(8, 16), torch.tensor([2, 2, 8], dtype=torch.int32))),
    ],
)
def test_norms_are_those_of_each_matrix(model: nn.Module, inputs: Any) -> None:
    """Groups of convolutions and experts have inputs of their own; against what their products multiply."""
    block = block_of(model, inputs)
    chosen = [c for c in candidates(block) if c.primary.reason == ""]
    found = diagonal_moments(block, chosen)
    from fxcompress.passes._input_rows import matrix_count, site_rows

    for candidate in chosen:
        count = matrix_count(candidate.primary)
        sums, seen = torch.zeros(count, candidate.primary.layout.matrix_shape[2]), torch.zeros(count)
        for rows in site_rows(block, candidate.primary):
            for index, x in enumerate(rows.values.float()):
                for matrix in range(count) if rows.first is None else [rows.first + index]:
                    sums[matrix] += x.square().sum(0)
                    seen[matrix] += len(x)
        moments = found[candidate.name]
        for matrix in range(count):
            if seen[matrix]:
                mine = moments.second[matrix if len(moments.second) > 1 else 0]
                torch.testing.assert_close(mine, sums[matrix] / seen[matrix], rtol=1e-4, atol=1e-6)
    edits = block.run(Wanda(sparsity=0.5))
    assert set(block.state.masks) | set(refusals(edits)) == {c.name for c in candidates(block)}
    assert block.state.masks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"equal_loss": True, "pattern": "2:4"}, "equal_loss does not apply"),
        ({"equal_loss": 1}, "expected true or false"),
        ({"sequential": "all"}, "expected 'block' or 'stage'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Wanda(**options)
