from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxcompress.calibration import ActivationStatistics, BlockRunner, Plan, Walk
from fxcompress.calibration.statistics import as_tokens
from fxcompress.edits import CompressionState, SetActivation, SetTransform, SetWeight
from fxcompress.errors import CalibrationError
from fxcompress.formats.integer import IntFormat, quantize_to_term
from fxcompress.forms import DynamicPerToken, Scale
from fxcompress.ops.activation import apply_quantizer
from tests.engine.models import by_hand, calibration, capture, decoder


def finished(walk: Walk, state: CompressionState) -> Walk:
    for _ in walk.plan.blocks:
        walk.advance(state)
    return walk


def test_walk_computes_what_the_program_computes() -> None:
    program = decoder()
    plan, data = Plan(program), calibration(decoder())
    assert len(plan.blocks) == 5
    walk = finished(Walk(plan, data.flat()), CompressionState(program.weights))
    for flat, out in zip(data.flat(), walk.outputs(), strict=True):
        assert torch.equal(out[0], program.run_flat(flat)[0])


def test_only_live_values_are_kept() -> None:
    plan = Plan(decoder())
    walk = Walk(plan, calibration(decoder()).flat())
    for _ in plan.blocks:
        walk.advance(CompressionState(decoder().weights))
        assert all(len(values) == 1 for values in walk.values)  # the residual stream and nothing else


def test_float64_mode_reaches_dtypes_in_the_graph() -> None:
    program = decoder()
    assert any(torch.float32 in node.args for node in program.graph.nodes)
    plan, data = Plan(program), calibration(program)
    single = finished(Walk(plan, data.flat()), CompressionState(program.weights)).outputs()[0][0]
    double = finished(Walk(plan, data.flat(), double=True), CompressionState(program.weights)).outputs()[0][0]
    assert double.dtype == torch.float64
    error = (single - double).abs().max()
    assert 0 < error < 1e-4


def linear_program() -> tuple[object, Tensor, Tensor, Tensor]:
    w, b, x = torch.randn(6, 4), torch.randn(6), torch.randn(3, 4)
    program = by_hand(
        lambda w, b, x: (torch.nn.functional.linear(x, w, b),), {"layer.weight": w, "layer.bias": b}, {"x": x}
    )
    return program, w, b, x


@pytest.mark.parametrize("new_bias", [False, True])
@pytest.mark.parametrize("scaled_out", [False, True])
def test_all_parts_of_a_form_are_computed(scaled_out: bool, new_bias: bool) -> None:
    program, w, b, x = linear_program()
    plan = Plan(program)  # type: ignore[arg-type]
    (site,) = plan.sites
    state = CompressionState(plan.program.weights)
    term = quantize_to_term(w, site.layout, IntFormat(bits=8, symmetric=True, group_size=0))
    factor, out, bias = torch.rand(4) + 0.5, torch.rand(6) + 0.5, torch.randn(6)
    state.apply(SetWeight("layer.weight", (term,)), "p")
    state.apply(SetActivation("layer.weight", DynamicPerToken(8)), "p")
    transform_out = (Scale(out),) if scaled_out else ()
    state.apply(
        SetTransform("layer.weight", (Scale(factor),), transform_out, bias if new_bias else None), "p"
    )
    walk = finished(Walk(plan, [[x]]), state)
    expected = apply_quantizer(x * factor, DynamicPerToken(8)) @ term.dense(torch.float32).T
    expected = (expected * out if scaled_out else expected) + (bias if new_bias else b)
    torch.testing.assert_close(walk.outputs()[0][0], expected)


def test_in_place_ops_do_not_reach_the_inputs() -> None:
    def function(w: Tensor, x: Tensor) -> tuple[Tensor]:
        y = x.clone()
        y[:, 0].add_(1.0)
        return (torch.mm(y, w),)

    w, x = torch.randn(4, 4), torch.randn(3, 4)
    program = by_hand(function, {"w": w}, {"x": x})
    walk = finished(Walk(Plan(program), [[x.clone()]]), CompressionState(program.weights))
    expected = x.clone()
    expected[:, 0] += 1
    torch.testing.assert_close(walk.outputs()[0][0], expected @ w)
    assert torch.equal(next(iter(walk.inputs[0].values())), x)


def test_a_batch_that_cannot_run_is_named() -> None:
    program, *_ = linear_program()
    walk = Walk(Plan(program), [[torch.randn(3, 4)], [torch.randn(3, 5)]])  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="batch 2 of 2 cannot run"):
        walk.advance(CompressionState(walk.plan.program.weights))


def test_runner_forgets_edited_weights() -> None:
    program, w, b, x = linear_program()
    plan = Plan(program)  # type: ignore[arg-type]
    state = CompressionState(plan.program.weights)
    walk, (site,) = Walk(plan, [[x]]), plan.sites
    runner = BlockRunner(plan, 0, state)
    first = next(walk.collect(runner, [site.node]))[site.node]
    term = quantize_to_term(w, site.layout, IntFormat(bits=2, symmetric=True, group_size=0))
    state.apply(SetWeight("layer.weight", (term,)), "p")
    runner.forget(["layer.weight"])
    second = next(walk.collect(runner, [site.node]))[site.node]
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, x @ term.dense(torch.float32).T + b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_equal_those_of_all_tokens_at_once(dtype: torch.dtype) -> None:
    x = torch.randn(50, 7, dtype=torch.float64).to(dtype)
    statistics = ActivationStatistics("x", gram=True)
    for part in x.split([13, 0, 37]):
        statistics.update(part)
    wide = x.double()
    assert statistics.count == 50
    for found, expected in [
        (statistics.minimum, wide.amin(0)),
        (statistics.maximum, wide.amax(0)),
        (statistics.absmax, wide.abs().amax(0)),
        (statistics.mean, wide.mean(0)),
        (statistics.mean_abs, wide.abs().mean(0)),
        (statistics.second_moment, wide.square().mean(0)),
        (statistics.gram, wide.T @ wide / 50),
    ]:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_statistics_refuse_what_is_not_finite_or_missing() -> None:
    statistics = ActivationStatistics("layer.weight (input x)")
    with pytest.raises(CalibrationError, match="no token reached"):
        _ = statistics.mean
    with pytest.raises(CalibrationError, match=r"layer.weight \(input x\): .*NaN or inf"):
        statistics.update(torch.tensor([[1.0, float("inf")]]))
    statistics.update(torch.ones(2, 3))
    with pytest.raises(CalibrationError, match="gram=True"):
        _ = statistics.gram
    with pytest.raises(CalibrationError, match="4 channels, earlier ones had 3"):
        statistics.update(torch.ones(2, 4))


def test_convolutions_are_read_by_channel() -> None:
    w, x = torch.randn(5, 3, 2, 2), torch.randn(2, 3, 4, 4)
    program = by_hand(lambda w, x: (torch.nn.functional.conv2d(x, w),), {"w": w}, {"x": x})
    (site,) = Plan(program).sites
    assert torch.equal(as_tokens(site, x), x.permute(0, 2, 3, 1).reshape(-1, 3))
    assert as_tokens(site, x[0]).shape == (16, 3)


def test_indices_are_no_activation() -> None:
    site = Plan(capture()).sites[0]
    with pytest.raises(CalibrationError, match=r"embed.weight: its input is no activation but torch.int64"):
        as_tokens(site, torch.zeros(2, 3, dtype=torch.int64))
