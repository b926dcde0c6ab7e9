"""Channel permutation for N:M: known gains, the function kept, heads, gathers, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress.analysis.permutation import PermutationGroup, find_permutation_group
from fxcompress.analysis.sites import find_sites
from fxcompress.calibration import as_calibration
from fxcompress.capture import capture_model
from fxcompress.edits import SetTransform
from fxcompress.errors import RecipeError
from fxcompress.manager import run_recipe
from fxcompress.passes._shuffling import _gains, best_order, dealt, retained
from fxcompress.passes.permute_channels import PermuteChannels
from tests.passes.models import Attention
from tests.passes.one_block import block_of, refusals

ROW = torch.tensor([[8.0, 7, 6, 5, 1, 1, 1, 1]])


def test_known_answers() -> None:
    assert retained(ROW, 2, 4) == 17
    order = dealt(ROW[0], 4)
    assert ROW[0, order].tolist() == [8, 6, 1, 1, 7, 5, 1, 1]
    assert retained(ROW[:, order], 2, 4) == 26
    assert retained(ROW[:, best_order(ROW, 2, 4, deal=False, block=8, rounds=8)], 2, 4) == 26


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(2, 4), (1, 4), (1, 2), (3, 5)]),
    st.integers(2, 6),
    st.integers(1, 5),
    st.sampled_from([0, 8, 12]),
    st.booleans(),
    st.integers(0, 1 << 16),
)
def test_an_order_is_one_and_never_retains_less(
    pattern: tuple[int, int], groups: int, rows: int, block: int, deal: bool, seed: int
) -> None:
    n, m = pattern
    scores = torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed)) ** 3
    order = best_order(scores, n, m, deal=deal, block=block, rounds=16)
    assert torch.equal(order.sort().values, torch.arange(groups * m))
    assert retained(scores[:, order], n, m) >= retained(scores, n, m) - 1e-6


def test_gains_are_those_of_making_the_swap() -> None:
    x = torch.rand(2, 12, 5)
    found = _gains(x, 2, 4)
    for u, v in itertools.product(range(12), range(12)):
        if u // 4 != v // 4:
            order = list(range(12))
            order[u], order[v] = order[v], order[u]
            for block in range(2):
                gain = retained(x[block, order].T, 2, 4) - retained(x[block].T, 2, 4)
                assert float(found[block, u, v]) == pytest.approx(gain, abs=1e-5)


class Heads(nn.Module):
    """Two query heads share each key and value head, so that channels of o move within their head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.o, self.up, self.down = nn.Linear(32, 16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        def split(t: Tensor, heads: int) -> Tensor:
            return t.unflatten(-1, (heads, 8)).transpose(1, 2)

        q, k, v = split(self.q(x), 4), split(self.k(x), 2), split(self.v(x), 2)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("metric", ["wanda", "entropy", "magnitude"])
@pytest.mark.parametrize("gather", [False, True])
def test_the_function_stays_and_more_is_retained(metric: str, gather: bool) -> None:
    torch.manual_seed(0)
    model = Heads().eval()
    x = torch.randn(2, 7, 16)
    program = capture_model(model, (x,))
    data = as_calibration([(x,)], program)
    options = {"metric": metric, "gather": gather}
    pruned: dict[str, Any] = {"prune-magnitude": {"pattern": "2:4"}}
    result = run_recipe(program, [{"permute-channels": options}, pruned], data)
    assert result.report.checks[0]["check"] == "unchanged in float64"
    assert result.report.checks[0]["passed"]
    reasons = {n: [e.reason for e in held] for n, held in result.state.provenance.items()}
    assert "folded into weights" in str(reasons["down.weight"])
    assert ("reordered by a gather" in str(reasons["q.weight"])) == gather
    if metric == "magnitude":
        plain = run_recipe(program, [pruned], data).state

        def kept(state: Any, name: str) -> float:
            return float(state.effective(name).abs().sum())

        assert kept(result.state, "down.weight") > kept(plain, "down.weight")


def test_channels_of_values_move_within_their_head() -> None:
    """Found over the whole graph: the model is too small for its attention to lie in one block."""
    block = block_of(Heads(), (torch.randn(2, 7, 16),))
    old = {name: weight.detach().clone() for name, weight in block.program.weights.items()}
    sites = find_sites(block.program)
    o = next(site for site in sites if site.name == "o.weight")
    group = find_permutation_group(block.program, o, {site.node: [site] for site in sites})
    assert isinstance(group, PermutationGroup)
    for edit in PermuteChannels()._fold(block, group, old["o.weight"].abs()):
        block.state.apply(edit, "permute-channels")
    order = [int((old["v.weight"] == row).all(1).nonzero()) for row in block.weight("v.weight")]
    assert order != list(range(16))
    assert all(new // 8 == row // 8 for new, row in enumerate(order))
    places = [
        8 * (2 * head + copy) + row % 8 for head in (0, 1) for copy in (0, 1) for row in order[8 * head :][:8]
    ]
    assert torch.equal(block.weight("o.weight"), old["o.weight"][:, places])
    assert torch.equal(block.weight("v.bias"), old["v.bias"][order])
    before, after = (retained(w.abs(), 2, 4) for w in (old["o.weight"], block.weight("o.weight").detach()))
    assert after > before


def test_an_order_that_does_not_fold_is_left_alone_or_gathered() -> None:
    block = block_of(Attention(), (torch.randn(2, 6, 20),))
    left = refusals(block.run(PermuteChannels()))
    assert "does not fold (gather=False)" in left["q.weight"]
    block = block_of(Attention(), (torch.randn(2, 6, 20),))
    edits = block.run(PermuteChannels(gather=True))
    moved = [edit for edit in edits if isinstance(edit, SetTransform)]
    assert {edit.name for edit in moved} >= {"q.weight", "k.weight", "v.weight"}


def test_equal_scores_leave_the_order() -> None:
    model = Attention()
    block = block_of(model, (torch.ones(1, 2, 20),))
    for name in ("up.weight", "gate.weight", "down.weight"):
        block.state.tensors[name] = torch.ones_like(block.program.weights[name])
    assert refusals(block.run(PermuteChannels(metric="magnitude")))["down.weight"] == "no order retains more"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (["permute-channels", {"wanda": {"pattern": "4:8"}}], "prepares for pattern='2:4', but wanda"),
        (["permute-channels", "gptq"], "but no pruning pass follows"),
    ],
)
def test_another_pattern_behind_is_refused(recipe: Any, message: str) -> None:
    x = torch.randn(2, 6, 20)
    program = capture_model(Attention(), (x,))
    with pytest.raises(RecipeError, match=message):
        run_recipe(program, recipe, as_calibration([(x,)], program))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": ""}, 'expected "n:m"'),
        ({"metric": "sum"}, "expected wanda, entropy or magnitude"),
        ({"block": -1}, "expected at least 0"),
        ({"rounds": 0}, "expected at least 1"),
        ({"gather": 1}, "expected true or false"),
        ({"alpha": -1}, "from 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PermuteChannels(**options)
