from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.edits import CompressionState
from fxcompress.errors import CalibrationError, FormatError, RecipeError
from fxcompress.forms import LowRank, QuantizedWeight
from fxcompress.manager import run_recipe
from fxcompress.passes import LowRankResidual
from tests.engine.models import calibration, decoder
from tests.passes.low_rank_cases import MATRICES, inputs_of, refusal, run, same_state

ROUND = {"quantize-weights": {"bits": 3, "group_size": 8}}


def residual(**options: Any) -> dict[str, Any]:
    return {"low-rank-residual": {"rank": 4, **options}}


def gap(state: CompressionState, name: str) -> torch.Tensor:
    return decoder().weights[name].double() - state.effective(name).double()


def test_structure_bytes_and_reasons() -> None:
    result = run([ROUND, residual()])
    for name in MATRICES:
        codes, factors = result.state.forms[name].terms
        assert isinstance(codes, QuantizedWeight)
        assert isinstance(factors, LowRank)
        row = next(row for row in result.report.rows if row.name == name)
        assert row.bytes_after == codes.nbytes + 4 * 48 * 4
        assert row.form == "int3 asym g8 + rank 4 (float32)"
    entry = result.state.provenance[MATRICES[0]][-1]
    assert entry.pass_name == "low-rank-residual"
    assert "of the rounding error is left" in entry.reason
    assert "output head" in refusal(result.state, "head.weight", "low-rank-residual")


def test_the_plain_metric_is_one_decomposition_of_the_rounding_error() -> None:
    plain = run_recipe(decoder(), [ROUND]).state
    state = run_recipe(decoder(), [ROUND, residual(metric="weights")]).state
    for name in MATRICES:
        left = torch.linalg.svdvals(gap(plain, name))[4:].square().sum()
        assert float(gap(state, name).square().sum()) == pytest.approx(float(left), rel=1e-3)  # Eckart–Young
        assert state.forms[name].terms[0].same_as(plain.forms[name].terms[0])


def test_outputs_are_nearest_in_the_metric_of_outputs() -> None:
    name = MATRICES[0]
    x = inputs_of(decoder(), name, calibration(decoder())).double()

    def error(*recipe: Any) -> float:
        return float((x @ gap(run([*recipe]).state, name).T).norm())

    outputs = error(ROUND, residual())
    assert outputs < error(ROUND, residual(metric="magnitudes")) < error(ROUND)
    assert outputs < error(ROUND, residual(metric="weights"))


def test_full_rank_leaves_nothing_but_pays_in_few_bits_only() -> None:
    state = run([ROUND, residual(rank=16, bits=8, metric="weights")]).state
    for name in MATRICES:
        assert float(gap(state, name).norm()) < 0.01 * float(decoder().weights[name].norm())
    state = run([ROUND, residual(rank=16, metric="weights")]).state
    reason = refusal(state, MATRICES[0], "low-rank-residual")
    assert reason.startswith("with factors of rank 16 it would take")
    assert reason.endswith("bytes, the weight 2048")


def test_alternating_keeps_the_best_of_its_steps() -> None:
    once, often = (
        run_recipe(decoder(), [ROUND, residual(metric="weights", iterations=n)]).state for n in (1, 6)
    )
    better = 0
    for name in MATRICES:
        one, six = float(gap(once, name).norm()), float(gap(often, name).norm())
        assert six <= one * (1 + 1e-6)
        better += six < one
    assert better  # LoftQ's reason to exist


def test_factors_in_codes() -> None:
    state = run([ROUND, residual(bits=8)]).state
    term: Any = state.forms[MATRICES[0]].terms[1]
    assert isinstance(term.u, QuantizedWeight)
    assert isinstance(term.v, QuantizedWeight)
    dense = run([ROUND, residual()]).state
    name = MATRICES[0]
    assert float(gap(state, name).norm()) < 1.2 * float(gap(dense, name).norm())


def test_after_gptq_and_after_edited_weights() -> None:
    gptq: list[Any] = [{"gptq": {"bits": 3, "group_size": 8}}]
    name = MATRICES[0]
    x = inputs_of(decoder(), name, calibration(decoder())).double()
    before, after = (run([*gptq, *more]).state for more in ((), (residual(),)))
    assert float((x @ gap(after, name).T).norm()) < float((x @ gap(before, name).T).norm())
    # Against the dense weight that the codes stand for, which an earlier pass has edited.
    smoothed = run(["smooth-activations", ROUND, residual(metric="weights")]).state
    target = smoothed.dense_target(MATRICES[0]).double()
    assert not torch.equal(target, decoder().weights[MATRICES[0]].double())
    assert float((target - smoothed.effective(MATRICES[0]).double()).norm() / target.norm()) < 0.1


def test_a_second_run_is_the_same_and_a_second_pass_is_refused() -> None:
    recipe = [ROUND, residual(iterations=3)]
    assert same_state(run(recipe).state, run(recipe).state)
    with pytest.raises(RecipeError, match="'low-rank-residual' cannot run after 'low-rank-residual'"):
        run([*recipe, residual()])
    with pytest.raises(RecipeError, match="requires 'quantized-weights'"):
        run([residual()])


def test_data_are_needed_for_metrics_of_inputs_only() -> None:
    with pytest.raises(CalibrationError, match="'low-rank-residual' needs calibration data"):
        run_recipe(decoder(), [ROUND, residual()])
    assert not LowRankResidual(metric="weights").needs_calibration


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 16), st.sampled_from(["weights", "magnitudes", "outputs"]), st.integers(1, 3))
def test_never_worse_than_the_codes_in_its_own_metric(rank: int, metric: str, iterations: int) -> None:
    recipe = [ROUND, residual(rank=rank, metric=metric, iterations=iterations)]
    state = run(recipe).state
    for entry in state.provenance[MATRICES[0]]:
        if entry.pass_name == "low-rank-residual" and entry.action == "ReviseWeight":
            share = int(entry.reason.rsplit(", ", 1)[1].split("%")[0])
            assert share <= 100


@pytest.mark.parametrize(
    ("options", "match", "error"),
    [
        ({"rank": 0}, "rank=0", RecipeError),
        ({"iterations": 0}, "iterations=0", RecipeError),
        ({"metric": "hessian"}, "metric='hessian'", RecipeError),
        ({"bits": 9}, "low-rank-residual: .*9", FormatError),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], match: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=match):
        LowRankResidual(**options)


def test_rank_above_the_matrix_is_a_reason() -> None:
    state = run([ROUND, residual(rank=17)]).state
    assert "rank 17 is above" in refusal(state, MATRICES[0], "low-rank-residual")
