"""Rounding the factors of low-rank weights with the passes that round weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxcompress.edits import CompressionState
from fxcompress.formats import IntFormat
from fxcompress.forms import DenseWeight, FloatWeight, QuantizedWeight
from tests.engine.models import calibration, capture, decoder
from tests.passes.low_rank_cases import MATRICES, inputs_of, low_rank, run, same_state

SPLIT = {"svd-llm": {"rank": 8}}


def output_error(state: CompressionState, name: str) -> float:
    x = inputs_of(decoder(), name, calibration(decoder())).double()
    w = decoder().weights[name].double()
    return float((x @ (w - state.effective(name).double()).T).norm() / (x @ w.T).norm())


def formats(state: CompressionState, name: str) -> list[Any]:
    term = low_rank(state, name)
    return [factor.format for factor in (term.u, term.v) if isinstance(factor, QuantizedWeight)]


@pytest.mark.parametrize("only_remaining", [False, True])
def test_rounding_to_nearest_takes_both_factors(only_remaining: bool) -> None:
    options = {"bits": 4, "group_size": 8, "only_remaining": only_remaining}
    result = run([SPLIT, {"quantize-weights": options}], verify="each")
    state = result.state
    for name in MATRICES:
        assert formats(state, name) == [IntFormat(4, False, 8)] * 2
        row = next(row for row in result.report.rows if row.name == name)
        assert row.bytes_after == low_rank(state, name).nbytes
        assert row.passes == ("svd-llm", "quantize-weights")
        assert row.error is not None
    audited = next(row for row in result.report.rows if row.name == MATRICES[0])
    # Measured against the dense weight (on fewer tokens), not against the factors before rounding.
    assert audited.error == pytest.approx(output_error(state, MATRICES[0]), rel=0.3)
    assert isinstance(state.forms["embed.weight"].terms[0], QuantizedWeight)


def test_gptq_rounds_the_left_factor_on_what_the_rounded_right_one_gives() -> None:
    name = MATRICES[0]
    split = run([SPLIT]).state
    plain = run([SPLIT, {"quantize-weights": {"bits": 3, "group_size": 8}}]).state
    solved = run([SPLIT, {"gptq": {"bits": 3, "group_size": 8, "shrinkage": 0.0}}]).state
    assert formats(solved, name) == [IntFormat(3, False, 8)] * 2
    lost, solved_error, plain_error = (output_error(state, name) for state in (split, solved, plain))
    assert lost < solved_error
    assert solved_error**2 - lost**2 < 0.8 * (plain_error**2 - lost**2)  # of what rounding adds
    entry = solved.provenance[name][-1]
    assert entry.error == pytest.approx(output_error(solved, name), rel=1e-3)
    assert entry.reason.startswith("factors int3 asymmetric, group 8, output error ")


def test_small_factors_stay_when_codes_would_not_be_smaller() -> None:
    state = run([{"svd-llm": {"rank": 1}}, {"quantize-weights": {"bits": 8, "group_size": 0}}]).state
    term = low_rank(state, MATRICES[0])
    assert isinstance(term.u, DenseWeight)  # rows of one number: 8 bits of code, 32 of scale
    assert isinstance(term.v, QuantizedWeight)


def test_floating_point_codes() -> None:
    state = run([SPLIT, {"quantize-weights": {"format": "fp8-e4m3"}}]).state
    term = low_rank(state, MATRICES[0])
    assert isinstance(term.u, FloatWeight)
    assert isinstance(term.v, FloatWeight)


def test_rounded_factors_are_not_rounded_again_and_excluded_ones_not_at_all() -> None:
    recipe = [SPLIT, {"gptq": {"bits": 4, "group_size": 8}}, {"quantize-weights": {"only_remaining": True}}]
    assert formats(run(recipe).state, MATRICES[0]) == [IntFormat(4, False, 8)] * 2
    state = run([SPLIT, {"quantize-weights": {"exclude": ["layers.0.*"]}}]).state
    assert isinstance(low_rank(state, MATRICES[0]).u, DenseWeight)
    assert isinstance(low_rank(state, MATRICES[2]).u, QuantizedWeight)


def test_residual_factors_are_rounded_beside_codes() -> None:
    split = {"low-rank-residual": {"rank": 8}}
    rest = {"quantize-weights": {"bits": 8, "only_remaining": True}}
    state = run([{"gptq": {"bits": 3, "group_size": 8}}, split, rest]).state
    codes, factors = state.forms[MATRICES[0]].terms
    assert isinstance(codes, QuantizedWeight)
    assert codes.bits == 3
    assert isinstance(factors.v, QuantizedWeight)  # type: ignore[attr-defined]


def test_a_resumed_run_is_the_same(tmp_path: Any) -> None:
    recipe = [SPLIT, {"gptq": {"bits": 4, "group_size": 8}}]
    first = run(recipe, checkpoint=tmp_path).state
    assert same_state(first, run(recipe, checkpoint=tmp_path).state)


def test_zero_weights() -> None:
    program = capture()
    program.weights[MATRICES[0]].zero_()
    for rounder in (
        {"gptq": {"bits": 4, "group_size": 8}},
        {"quantize-weights": {"bits": 4, "group_size": 8}},
    ):
        state = run([SPLIT, rounder], program).state
        assert not torch.count_nonzero(state.effective(MATRICES[0]).round(decimals=6))
