"""Awq: the formula's known answers, the search, the function kept, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.capture.export import capture_model
from fxcompress.edits import SetTensor, SetTransform
from fxcompress.errors import CalibrationError, FormatError, RecipeError
from fxcompress.manager import run_recipe
from fxcompress.passes import Awq, Gptq, QuantizeWeights, SmoothActivations
from fxcompress.passes.awq import salience_scale
from fxcompress.recipe import Recipe
from tests.passes.one_block import OneBlock, refusals
from tests.passes.test_smooth_activations import decoder, tensors

WIDTH = 16


class Block(nn.Module):
    """LayerNorm → matrix → SiLU → matrix; ``loud`` makes one channel large."""

    def __init__(self, loud: float = 30.0) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, 8)
        with torch.no_grad():
            self.norm.weight[3] = loud

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.nn.functional.silu(self.one(self.norm(x))))


def block_of(model: nn.Module) -> OneBlock:
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH)
    return OneBlock(capture_model(model.eval(), (x,)), [(x,), (torch.randn(64, WIDTH),)])


def test_no_strength_is_no_scale() -> None:
    assert torch.equal(salience_scale(torch.rand(5).double() + 0.1, 0.0), torch.ones(5).double())


@pytest.mark.parametrize("rho", [0.05, 0.3, 0.5, 0.95])
def test_the_loudest_channel_gets_the_largest_scale_and_extremes_are_balanced(rho: float) -> None:
    mean = torch.rand(8, dtype=torch.float64) + 0.5
    mean[5] *= 50
    scale = salience_scale(mean, rho)
    assert scale.argmax() == 5
    torch.testing.assert_close(scale.max() * scale.min(), torch.tensor(1.0, dtype=torch.float64))


def test_silent_channels_keep_their_scale() -> None:
    scale = salience_scale(torch.tensor([0.0, 1.0, 4.0]).double(), 0.5)
    assert scale.tolist() == [1.0, pytest.approx(2**-0.5), pytest.approx(2**0.5)]
    assert torch.equal(salience_scale(torch.zeros(3).double(), 0.5), torch.ones(3).double())


@pytest.mark.parametrize("exact", [True, False])
def test_salient_columns_are_scaled_up_and_the_output_error_falls(exact: bool) -> None:
    model = Block()
    block = block_of(model)
    method = Awq(bits=3, group_size=0, exact=exact)
    edits = tensors(block.run(method))
    assert set(edits) == {"norm.weight", "norm.bias", "one.weight"}
    scale = (edits["one.weight"] / model.one.weight.detach()).median(0).values
    assert scale.argmax() == 3
    words = block.state.provenance["one.weight"][0].reason
    before, after = map(float, words.rsplit("output error ", 1)[1].split(" → "))
    assert after < before


def test_rounding_loses_less_after_it() -> None:
    torch.manual_seed(1)
    model, x = Block(), torch.randn(128, WIDTH)
    program = capture_model(model.eval(), (x,))
    from fxcompress.calibration import as_calibration

    data = as_calibration([(x[:64],), (x[64:],)], program)
    rounding = QuantizeWeights(bits=3, group_size=0)
    plain = run_recipe(program, [rounding], data).report.relative_error
    scaled = run_recipe(program, [Awq(bits=3, group_size=0), rounding], data).report.relative_error
    assert plain is not None
    assert scaled is not None
    assert scaled < 0.9 * plain


def test_explicit_scaling_reaches_what_folds_do_not() -> None:
    plain = block_of(Block()).run(Awq(bits=3, group_size=0))
    assert refusals(plain)["two.weight"].startswith("one.weight → aten::silu")
    block = block_of(Block())
    with torch.no_grad():
        block.program.weights["one.bias"][2] += 200.0  # a large channel behind SiLU
    edits = block.run(Awq(bits=3, group_size=0, explicit=True))
    assert [edit.name for edit in edits if isinstance(edit, SetTransform)] == ["two.weight"]
    again = {edit.name for edit in edits if isinstance(edit, SetTensor)}
    assert again == {"norm.weight", "norm.bias", "one.weight", "two.weight"}


def test_equal_seeds_give_equal_edits() -> None:
    one, two = (tensors(block_of(Block()).run(Awq(bits=3, group_size=0))) for _ in range(2))
    assert one.keys() == two.keys()


@pytest.mark.parametrize("name", ["llama", "gpt2-odd", "mixtral"])
def test_the_manager_proves_the_function_unchanged(name: str) -> None:
    program, data = decoder(name)
    with torch.no_grad():
        for weight in program.weights.values():
            if weight.dim() == 1 and weight.numel() > 3:
                weight[:3] *= 16.0  # channels worth scaling
    result = run_recipe(program, [Awq(group_size=16, steps=4, explicit=True)], data)
    (check,) = [entry for entry in result.report.checks if entry.get("pass") == "awq"]
    assert check["max_relative_error"] <= 1e-9


def test_the_formats_must_agree() -> None:
    Recipe([Awq(), Gptq(), QuantizeWeights(bits=4, group_size=64, only_remaining=True)])
    with pytest.raises(
        RecipeError, match=r"awq prepares weights for int4 asymmetric, group 64, but 'gptq' makes"
    ):
        Recipe([Awq(), Gptq(bits=3)])
    with pytest.raises(RecipeError, match="dynamic 8-bit"):
        Recipe.load([{"awq": {}}, {"quantize-weights": {"bits": 4}}, "quantize-activations"])
    with pytest.raises(RecipeError, match="'awq' cannot run after 'smooth-activations'"):
        Recipe([SmoothActivations(), Awq()])
    with pytest.raises(RecipeError, match="'awq' cannot run after 'quantize-weights'"):
        Recipe([QuantizeWeights(), Awq()])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 9}, FormatError, "awq: IntFormat: bits=9"),
        ({"steps": 0}, RecipeError, "steps=0, expected a positive integer"),
        ({"tokens": 1.5}, RecipeError, "tokens=1.5"),
        ({"activation_bits": 1}, RecipeError, "activations of 1 bits"),
        ({"explicit": 1}, RecipeError, "explicit=1, expected true or false"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Awq(**options)


def test_bad_data() -> None:
    model = Block()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.zero_()
    silent = block_of(model).run(Awq(bits=3, group_size=0))
    assert not tensors(silent)
    assert "no ρ gives a smaller output error" in refusals(silent)["one.weight"]
    block = block_of(Block())
    block.data = [(torch.full((4, WIDTH), float("nan")),)]
    with pytest.raises(CalibrationError, match="NaN or inf"):
        block.run(Awq())
