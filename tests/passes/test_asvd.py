from __future__ import annotations

from typing import Any

import pytest
import torch

from fxcompress.errors import RecipeError
from fxcompress.passes import Asvd
from fxcompress.passes._low_rank_solver import decompose
from tests.engine.models import calibration, decoder
from tests.passes.low_rank_cases import MATRICES, inputs_of, low_rank, refusal, run, same_state
from tests.passes.models import Convolutions
from tests.passes.one_block import block_of, compressed


def test_alpha_zero_is_plain_svd() -> None:
    assert same_state(run([{"asvd": {"rank": 5, "alpha": 0.0}}]).state, run([{"svd": {"rank": 5}}]).state)


def test_numerics_are_those_of_the_paper() -> None:
    name = MATRICES[0]
    state = run([{"asvd": {"rank": 5, "alpha": 0.5}}]).state
    x = inputs_of(decoder(), name, calibration(decoder())).double()
    w = decoder().weights[name].double()
    s = x.abs().mean(0) ** 0.5 + 1e-6
    u, sigma, vh = torch.linalg.svd(w * s, full_matrices=False)
    expected = (u[:, :5] * sigma[:5]) @ vh[:5] / s  # W ≈ (W S)_k S⁻¹
    torch.testing.assert_close(state.effective(name).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_search_meets_the_budget_by_what_truncation_does_to_the_model() -> None:
    recipe = [{"asvd": {"keep": 0.75, "budget": "search", "shares": [0.4, 0.6], "multiple": 1}}]
    state = run(recipe).state
    total = sum(decoder().weights[name].numel() for name in MATRICES)
    used = 0
    for name in MATRICES:
        rows, columns = decoder().weights[name].shape
        if name in state.forms:
            assert low_rank(state, name).rank in (4, 6)  # ⌊0.4 · 512 / 48⌋, ⌊0.6 · 512 / 48⌋
            used += low_rank(state, name).rank * (rows + columns)
        else:
            assert "leaves it whole" in refusal(state, name, "asvd")
            used += rows * columns
    assert used <= 0.75 * total
    assert same_state(state, run(recipe).state)


def test_the_search_says_what_it_cannot_meet() -> None:
    with pytest.raises(RecipeError, match=r"asvd: keep=0\.3 cannot be met: the smallest shares keep 0\.40"):
        run([{"asvd": {"keep": 0.3, "budget": "search", "shares": [0.4, 0.6]}}])


def test_convolutions_and_dead_inputs() -> None:
    image = torch.randn(2, 3, 13, 12)
    image[:, 1] = 0
    block = block_of(Convolutions(), (image,))
    edits = block.run(Asvd(keep=0.7, multiple=1))
    for name in compressed(edits):
        assert bool(torch.isfinite(block.state.effective(name)).all())
    assert compressed(edits)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"shares": ()}, "shares is empty"),
        ({"shares": (0.5, 1.0)}, "shares=1.0"),
        ({"budget": "all"}, "expected 'layer' or 'global' or 'search'"),
        ({"budget": "search", "energy": 0.9}, "but energy is given"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Asvd(**options)


def test_no_metric_is_inverted() -> None:
    found = decompose(torch.randn(6, 4), torch.tensor([1e-30, 1.0, 1.0, 1e30]))
    u, v = found.factors(4)
    assert bool(torch.isfinite(u @ v).all())
