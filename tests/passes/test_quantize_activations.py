from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.capture.export import capture_model
from fxcompress.edits import SetActivation
from fxcompress.errors import CalibrationError, RecipeError
from fxcompress.forms import DynamicPerToken, FloatPerTensor, FloatPerToken, StaticPerTensor
from fxcompress.ops.activation import apply_quantizer
from fxcompress.passes import QuantizeActivations
from fxcompress.passes._grids import static_float_quantizer, static_quantizer
from tests.passes.models import Attention, Autoencoder, Convolutions, Language, Products
from tests.passes.one_block import OneBlock, block_of, refusals

IDS = torch.arange(12).reshape(2, 6)
STATIC = QuantizeActivations(mode="static")


def attention() -> OneBlock:
    return block_of(Attention(), (torch.randn(2, 5, 20),), (3 * torch.randn(1, 4, 20) + 1,))


def static(block: OneBlock, name: str) -> StaticPerTensor:
    quantizer = block.state.form(name).activation
    assert isinstance(quantizer, StaticPerTensor)
    return quantizer


def test_structure_dynamic() -> None:
    block = attention()
    edits = block.run(QuantizeActivations())
    assert [edit.name for edit in edits] == [
        f"{n}.weight" for n in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    for edit in edits:
        assert isinstance(edit, SetActivation)
        assert isinstance(edit.activation, DynamicPerToken)
        assert edit.activation.bits == 8
    assert block.asked == []  # no data needed


def test_only_static_needs_calibration() -> None:
    assert not QuantizeActivations().needs_calibration
    assert STATIC.needs_calibration


def test_static_covers_what_calibration_saw() -> None:
    block = attention()
    sites = {site.name: site for site in block.sites}
    seen = torch.cat([value.flatten() for value in block.batches(sites["down.weight"])])
    block.run(STATIC)
    quantizer = static(block, "down.weight")
    assert quantizer.scale.dtype == torch.float32
    assert quantizer.zero.dtype == torch.int32
    assert quantizer.scale.item() == pytest.approx((seen.max() - seen.min()).item() / 255, rel=1e-5)
    again = apply_quantizer(seen, quantizer)
    assert (again - seen).abs().max() <= quantizer.scale  # half a step, and half for the rounded zero-point
    q, k = static(block, "q.weight"), static(block, "k.weight")
    assert torch.equal(q.scale, k.scale)  # siblings share the input, hence the grid
    assert torch.equal(q.zero, k.zero)


def test_known_static_grid() -> None:
    quantizer = static_quantizer(torch.tensor(-1.0), torch.tensor(2.0), 2, "w")
    assert isinstance(quantizer, StaticPerTensor)
    assert (quantizer.scale.item(), quantizer.zero.item()) == (1.0, -1)
    one_sided = static_quantizer(torch.tensor(3.0), torch.tensor(5.1), 8, "w")
    assert isinstance(one_sided, StaticPerTensor)
    assert one_sided.zero.item() == -128
    assert one_sided.scale.item() == pytest.approx(0.02)
    nothing = static_quantizer(torch.tensor(0.0), torch.tensor(0.0), 8, "w")
    assert isinstance(nothing, StaticPerTensor)
    assert nothing.scale.item() == 1


@settings(max_examples=100, deadline=None)
@given(
    low=st.floats(-(2.0**100), 2.0**100, width=32),
    width=st.floats(0, 2.0**100, width=32),
    bits=st.integers(2, 8),
)
def test_any_range_gives_a_legal_grid_with_an_exact_zero(low: float, width: float, bits: int) -> None:
    quantizer = static_quantizer(torch.tensor(low), torch.tensor(low + width), bits, "w")
    assert isinstance(quantizer, StaticPerTensor)
    assert 0 < quantizer.scale.item() < float("inf")
    assert -(2 ** (bits - 1)) <= quantizer.zero.item() <= 2 ** (bits - 1) - 1
    assert apply_quantizer(torch.zeros(3), quantizer).tolist() == [0, 0, 0]


def test_non_finite_calibration_is_refused() -> None:
    with pytest.raises(CalibrationError, match="w: its calibrated inputs contain NaN or inf"):
        static_quantizer(torch.tensor(float("nan")), torch.tensor(1.0), 8, "w")


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_second_run_changes_nothing(mode: Any) -> None:
    block = attention()
    block.run(QuantizeActivations(mode=mode))
    before = {name: block.state.form(name).activation for name in block.state.forms}
    edits = block.run(QuantizeActivations(mode=mode, bits=4))
    assert set(refusals(edits).values()) == {"its input is quantized already"}
    assert {name: block.state.form(name).activation for name in block.state.forms} == before


def test_heads_and_embeddings_keep_their_inputs() -> None:
    block = block_of(Language(tied=False), (IDS,))
    reasons = refusals(block.run(QuantizeActivations()))
    assert reasons == {
        "table.weight": "its input is looked up, not multiplied",
        "head.weight": "output head: its input stays unquantized (heads=False)",
    }
    tied = block_of(Language(tied=True), (IDS,))
    tied.run(QuantizeActivations(heads=True))
    assert refusals(block_of(Language(tied=True), (IDS,)).run(QuantizeActivations())) == {
        "table.weight": "embedding: its input stays unquantized (heads=False)"
    }


def test_patterns_give_reasons() -> None:
    assert refusals(attention().run(QuantizeActivations(exclude=("o.*",)))) == {
        "o.weight": "excluded by 'o.*'"
    }


def test_convolutions_have_no_tokens_but_a_static_range() -> None:
    x = torch.randn(2, 3, 13, 12)
    reasons = refusals(block_of(Convolutions(), (x,)).run(QuantizeActivations()))
    assert len(reasons) == 5
    assert all("use mode='static'" in reason for reason in reasons.values())
    block = block_of(Convolutions(), (x,))
    assert refusals(block.run(STATIC)) == {}
    assert static(block, "plain.weight").scale.item() == pytest.approx(
        (x.max() - x.min()).item() / 255, rel=1e-5
    )


def test_an_einsum_over_two_dimensions_has_no_scale_per_token() -> None:
    edits = block_of(Products(), (torch.randn(2, 5, 20),)).run(QuantizeActivations())
    reasons = refusals(edits)
    assert set(reasons) == {"output", "scaled", "bias"}
    assert reasons["output"].startswith("its einsum does not sum over the last dimension only")


def test_static_range_covers_all_uses_or_is_refused() -> None:
    x = torch.randn(4, 20)
    block = block_of(Autoencoder(), (x,))
    block.run(STATIC)
    values = torch.cat([value.flatten() for site in block.sites for value in block.batches(site)])
    assert static(block, "code.weight").scale.item() == pytest.approx(
        (values.max() - values.min()).item() / 255, rel=1e-5
    )
    split = block_of(Autoencoder(), (x,), only=lambda site: site.node.target is torch.ops.aten.linear.default)
    assert refusals(split.run(STATIC)) == {
        "code.weight": "used in several blocks, which one static range cannot serve"
    }
    assert refusals(split.run(QuantizeActivations())) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 8.0}, "bits=8.0"),
        ({"mode": "both"}, "expected 'dynamic', 'static' or 'cluster'"),
        ({"heads": 1}, "heads=1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeActivations(**options)


def noisy() -> OneBlock:
    """Two siblings and a third layer, of whose input one channel dwarfs the rest and is not read."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(16, 6, bias=False) for _ in range(3))
            with torch.no_grad():
                self.three.weight[:, 5] = 0.0
                self.one.weight[:, 5] = 0.01

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (
                self.one(x)
                + self.two(x)
                + self.three(torch.cat([x[..., :5], x[..., 5:6] * 1e4, x[..., 6:]], -1))
            )

    torch.manual_seed(0)
    x = torch.randn(2, 9, 16)
    return OneBlock(capture_model(Three().eval(), (x,)), [(x,), (2 * x,)])


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_inputs_that_would_cost_too_much_stay_as_they_are(mode: str) -> None:
    block = noisy()
    edits = block.run(QuantizeActivations(mode=mode, max_error=0.05))  # type: ignore[arg-type]
    assert [edit.name for edit in edits if isinstance(edit, SetActivation)] == ["one.weight", "two.weight"]
    assert "more than max_error=0.05" in refusals(edits)["three.weight"]
    everything = noisy().run(QuantizeActivations(mode=mode, max_error=1e9))  # type: ignore[arg-type]
    assert len([edit for edit in everything if isinstance(edit, SetActivation)]) == 3


def test_sites_that_read_one_value_are_decided_together() -> None:
    block = noisy()
    edits = block.run(QuantizeActivations(max_error=100.0))
    errors = {edit.name: edit.reason.split("error ")[1] for edit in edits if isinstance(edit, SetActivation)}
    assert errors["one.weight"] == errors["two.weight"]
    edits = noisy().run(QuantizeActivations(max_error=1e-4))
    assert set(refusals(edits)) == {"one.weight", "two.weight", "three.weight"}


def test_a_second_pass_of_the_other_mode_takes_the_rest() -> None:
    block = noisy()
    block.run(QuantizeActivations(mode="static", max_error=0.05))
    block.run(QuantizeActivations(bits=8))
    assert {type(form.activation).__name__ for form in block.state.forms.values()} == {
        "StaticPerTensor",
        "DynamicPerToken",
    }


def test_measuring_needs_data_and_a_number() -> None:
    assert QuantizeActivations(max_error=0.1).needs_calibration
    assert not QuantizeActivations().needs_calibration
    for value in (0, -1.0, float("inf"), float("nan"), "0.1", True):
        with pytest.raises(RecipeError, match=r"max_error=.*expected a positive number"):
            QuantizeActivations(max_error=value)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="tokens=0"):
        QuantizeActivations(tokens=0)


def test_floating_point_activations() -> None:
    block = attention()
    assert refusals(block.run(QuantizeActivations(format="fp8-e5m2"))) == {}
    quantizer = block.state.form("q.weight").activation
    assert isinstance(quantizer, FloatPerToken)
    assert quantizer.format_kind == "e5m2"
    assert set(refusals(block.run(QuantizeActivations(format="fp8-e5m2"))).values()) == {
        "its input is quantized already"
    }


def test_floating_point_static_scale_is_the_greatest_magnitude_over_448() -> None:
    block = attention()
    site = next(site for site in block.sites if site.name == "q.weight")
    top = max(float(value.abs().max()) for value in block.batches(site))
    block.run(QuantizeActivations(format="fp8-e4m3", mode="static"))
    quantizer = block.state.form("q.weight").activation
    assert isinstance(quantizer, FloatPerTensor)
    assert quantizer.scale.item() == pytest.approx(top / 448, rel=1e-6)
    zero = static_float_quantizer(torch.tensor(0.0), "e4m3", "w")
    assert zero.scale.item() == pytest.approx(1 / (448 * 512))
    with pytest.raises(CalibrationError, match="w: its calibrated inputs contain NaN or inf"):
        static_float_quantizer(torch.tensor(float("inf")), "e4m3", "w")


def test_floating_point_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="format='fp4'"):
        QuantizeActivations(format="fp4")
    with pytest.raises(RecipeError, match="has 8 bits"):
        QuantizeActivations(format="fp8-e4m3", bits=4)
