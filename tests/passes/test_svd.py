from __future__ import annotations

from typing import Any

import pytest
import torch

from fxcompress.errors import CoverageError, RecipeError
from fxcompress.forms import LowRank
from fxcompress.passes import Svd
from fxcompress.passes._low_rank_solver import decompose
from tests.engine.models import decoder
from tests.passes.low_rank_cases import MATRICES, low_rank, refusal, run, same_state
from tests.passes.models import Attention, Convolutions, Experts, Language, Products
from tests.passes.one_block import block_of, compressed, refusals


def test_structure_ranks_bytes_and_reasons() -> None:
    result = run([{"svd": {"keep": 0.6, "multiple": 2}}])
    for name in MATRICES:
        term = low_rank(result.state, name)
        assert term.rank == 6  # ⌊0.6 · 16 · 32 / 48⌋ = 6
        row = next(row for row in result.report.rows if row.name == name)
        assert row.bytes_after == 6 * 48 * 4 == term.nbytes
        assert row.form == "rank 6 (float32)"
    reason = result.state.provenance[MATRICES[0]][0].reason
    assert reason.startswith("rank 6 of 16, 56% of its numbers, weight error ")
    assert refusal(result.state, "embed.weight", "svd") == "embedding: a look-up needs whole rows"
    assert "output head" in refusal(result.state, "head.weight", "svd")


def test_numerics_equal_a_truncated_decomposition() -> None:
    state = run([{"svd": {"rank": 5}}]).state
    for name in MATRICES:
        w = decoder().weights[name].double()
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        expected = (u[:, :5] * s[:5]) @ vh[:5]
        torch.testing.assert_close(state.effective(name).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [11, 12, 16])
def test_a_split_that_does_not_shrink_is_refused(rank: int) -> None:
    state = run([{"svd": {"rank": rank}}, "quantize-weights"]).state
    for name in MATRICES:
        assert "do below 11" in refusal(state, name, "svd")  # 32 · 16 / 48 = 10.7


def test_energy_keeps_its_promise() -> None:
    state = run([{"svd": {"energy": 0.5, "multiple": 1}}]).state
    for name in MATRICES:
        term = low_rank(state, name)
        squares = torch.linalg.svdvals(decoder().weights[name].double()).square()
        assert squares[: term.rank].sum() >= 0.5 * squares.sum() > squares[: term.rank - 1].sum()


def test_heads_and_a_global_budget() -> None:
    result = run([{"svd": {"keep": 0.5, "budget": "global", "multiple": 1, "heads": True}}])
    names = [*MATRICES, "head.weight"]
    ranks = {name: low_rank(result.state, name).rank for name in names if name in result.state.forms}
    numbers = sum(rank * sum(decoder().weights[name].shape) for name, rank in ranks.items()) + sum(
        decoder().weights[name].numel() for name in names if name not in ranks
    )
    total = sum(decoder().weights[name].numel() for name in names)
    assert 0.45 * total < numbers <= 0.5 * total
    assert len(set(ranks.values())) > 1  # not the uniform answer


def test_a_second_run_gives_the_same_and_a_second_pass_is_refused_by_name() -> None:
    recipe: list[Any] = [{"svd": {"keep": 0.5, "budget": "global", "multiple": 2}}]
    assert same_state(run(recipe).state, run(recipe).state)
    with pytest.raises(RecipeError, match="already compressed by svd"):
        run([{"svd": {"keep": 0.5}}, {"svd": {"keep": 0.4}}])
    with pytest.raises(RecipeError, match="'svd' cannot run after 'quantize-weights'"):
        run(["quantize-weights", "svd"])


def test_idempotent_on_a_weight_of_that_rank() -> None:
    block = block_of(Attention(), (torch.randn(2, 25, 20),), (torch.randn(1, 40, 20),))
    first = Svd(rank=4)
    block.run(first)
    value = block.state.effective("up.weight").double()
    again = torch.linalg.svd(value)
    assert float(again.S[4:].max()) < 1e-5 * float(again.S[0])
    u, v = decompose(value).factors(4)
    torch.testing.assert_close(u @ v, value, rtol=0, atol=1e-6)


def test_narrow_weights_keep_their_dtype() -> None:
    block = block_of(Attention().to(torch.bfloat16), (torch.randn(2, 25, 20).to(torch.bfloat16),))
    block.run(Svd(rank=4))
    (term,) = block.state.forms["up.weight"].terms
    assert isinstance(term, LowRank)
    assert term.u.dense(torch.bfloat16).dtype == torch.bfloat16
    assert term.nbytes == 4 * sum(block.program.weights["up.weight"].shape) * 2


def test_what_two_products_cannot_stand_for_is_refused_by_name() -> None:
    found = block_of(Products(), (torch.randn(2, 5, 20),)).run(Svd(keep=0.5, multiple=1))
    reasons = set(refusals(found).values())
    assert any("batch of matrices" in reason for reason in reasons), reasons
    ends = torch.tensor([3, 3, 9], dtype=torch.int32)
    found = block_of(Experts(), (torch.randn(9, 16), ends)).run(Svd(keep=0.5, multiple=1))
    assert all("experts" in reason or "linear layers" in reason for reason in refusals(found).values())
    assert refusals(found)


def test_convolutions_become_two() -> None:
    block = block_of(Convolutions(), (torch.randn(2, 3, 13, 12),))
    found = block.run(Svd(keep=0.7, multiple=1))
    assert compressed(found)
    for name in compressed(found):
        (term,) = block.state.forms[name].terms
        assert isinstance(term, LowRank)
        assert term.factored
    assert any("grouped convolution" in reason for reason in refusals(found).values()), refusals(found)
    assert any("transposed convolution" in reason for reason in refusals(found).values()), refusals(found)


def test_tied_tables_are_left_to_quantizers() -> None:
    found = block_of(Language(True), (torch.arange(12).reshape(2, 6),)).run(Svd(keep=0.5, multiple=1))
    assert any("look-up" in reason for reason in refusals(found).values())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank=0, expected a positive integer"),
        ({"rank": 17}, "rank=17 is above the smaller side of every weight"),
        ({"keep": 1.0}, "keep=1.0, expected a number above 0 and below 1"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"energy": 1.2}, "energy=1.2, expected a number above 0 and up to 1"),
        ({"energy": 0.0}, "energy=0.0"),
        ({"energy": float("nan")}, "energy=nan"),
        ({"keep": 0.5, "rank": 3}, "keep and rank are given"),
        ({"multiple": 0}, "multiple=0"),
        ({"rank": 4, "budget": "global"}, "but rank is given"),
        ({"keep": 0.01, "budget": "global"}, "cannot be met"),
        ({"include": ["nothing.*"]}, "matches no parameter"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        run([Svd(**options)])


def test_a_budget_too_small_for_rank_one_is_a_reason() -> None:
    state = run([{"svd": {"keep": 0.05}}, "quantize-weights"]).state
    assert "does not pay for rank 1" in refusal(state, MATRICES[0], "svd")
    with pytest.raises(CoverageError, match="'svd' made no edit"):
        run([{"svd": {"keep": 0.05}}])
