from __future__ import annotations

from typing import Any

import pytest
import torch

from fxcompress.errors import FormatError, RecipeError
from fxcompress.forms import QuantizedWeight
from fxcompress.passes import Lplr
from tests.engine.models import capture
from tests.passes.low_rank_cases import MATRICES, low_rank, refusal, run, same_state


def test_ranks_of_a_budget_are_the_published_ones() -> None:
    assert Lplr(keep=0.5).rank_for(4096, 4096, 16) == 2048
    assert Lplr(keep=0.25).rank_for(4096, 4096, 16) == 1024
    assert Lplr(keep=0.5, u_bits=4, v_bits=4).rank_for(4096, 4096, 16) == 4096


def test_structure_and_true_bytes() -> None:
    result = run([{"lplr": {"rank": 6}}])
    for name in MATRICES:
        term = low_rank(result.state, name)
        assert isinstance(term.u, QuantizedWeight)
        assert isinstance(term.v, QuantizedWeight)
        row = next(row for row in result.report.rows if row.name == name)
        assert row.bytes_after == term.nbytes < row.bytes_before
    assert same_state(result.state, run([{"lplr": {"rank": 6}}]).state)  # the sketch is seeded


def test_a_weight_of_that_rank_loses_its_rounding_only() -> None:
    program = capture()
    for name in MATRICES:
        w = program.weights[name]
        w.copy_(torch.randn(w.shape[0], 3) @ torch.randn(3, w.shape[1]))
    state = run([{"lplr": {"rank": 3, "multiple": 1}}], program).state
    for name in MATRICES:
        w = program.weights[name]
        assert float((w - state.effective(name)).norm() / w.norm()) < 0.01
    coarse = run([{"lplr": {"rank": 3, "u_bits": 3, "v_bits": 8}}], program).state
    w = program.weights[MATRICES[0]]
    assert float((w - coarse.effective(MATRICES[0])).norm() / w.norm()) > 0.02


def test_power_iterations_near_the_best_approximation() -> None:
    w = torch.randn(60, 40, generator=torch.Generator().manual_seed(1))
    best = float(torch.linalg.svdvals(w)[8:].square().sum().sqrt())

    def error(iterations: int) -> float:
        method = Lplr(rank=8, power_iterations=iterations)
        u, v = method.factors(w, 8, torch.Generator().manual_seed(0))
        return float((w - u.dense(torch.float32) @ v.dense(torch.float32)).norm())

    assert error(4) < error(0)
    assert best <= error(4) < 1.05 * best


def test_the_right_factor_makes_up_for_the_rounding_of_the_left() -> None:
    w = torch.randn(60, 40, generator=torch.Generator().manual_seed(1))
    method = Lplr(rank=8, u_bits=3)
    u, v = method.factors(w, 8, torch.Generator().manual_seed(0))
    left = u.dense(torch.float64)
    solved = torch.linalg.pinv(left) @ w.double()
    torch.testing.assert_close(v.dense(torch.float64), solved, rtol=0, atol=float(solved.abs().max()) / 100)


def test_no_room_is_a_reason() -> None:
    rest = {"quantize-weights": {"only_remaining": True}}
    for options, reason in (
        ({"rank": 16, "group_size": 1}, "bytes, the weight 2048"),
        ({"rank": 20}, "rank 20 is above"),
        ({"keep": 0.01}, "does not pay for rank 1"),
    ):
        state = run([{"lplr": options}, rest]).state
        assert reason in refusal(state, MATRICES[0], "lplr")


@pytest.mark.parametrize(
    ("options", "match", "error"),
    [
        ({"keep": 1.0}, "keep=1.0", RecipeError),
        ({"rank": 0}, "rank=0", RecipeError),
        ({"u_bits": 9}, "lplr: .*9", FormatError),
        ({"power_iterations": -1}, "power_iterations=-1", RecipeError),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], match: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=match):
        Lplr(**options)
