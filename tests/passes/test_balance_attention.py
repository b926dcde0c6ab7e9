"""Queries against keys: scores stay, ranges meet, rotary pairs share a scale, traps are refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis.query_key import find_query_key_groups
from fxcompress.analysis.sites import find_sites
from fxcompress.calibration import as_calibration
from fxcompress.capture.export import capture_model
from fxcompress.errors import CoverageError, RecipeError
from fxcompress.manager import RunResult, run_recipe
from fxcompress.passes import BalanceAttention
from tests.zoo import entry

WIDTH, HEADS, SIZE = 24, 3, 8
X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Heads, rotary embedding (pairs half a head apart, or neighbours), a key far larger in one pair."""

    def __init__(self, pairs: str = "half", *, norm: bool = False, leak: str = "") -> None:
        super().__init__()
        self.pairs, self.leak = pairs, leak
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)
        self.q_norm = nn.RMSNorm(SIZE) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(SIZE) if norm else nn.Identity()
        with torch.no_grad():
            self.k.weight[SIZE + 1] *= 30
            if norm:
                self.k_norm.weight[1] = 30  # type: ignore[index]

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] / 10 ** torch.arange(SIZE // 2)
        if self.pairs == "half":
            turned = torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1)
            wide = torch.cat([angle, angle], -1)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            wide = angle.repeat_interleave(2, -1)
        return x * wide.cos() + turned * wide.sin()

    def forward(self, x: Tensor) -> Any:
        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], HEADS, SIZE).transpose(1, 2)

        q, k = heads(self.q(x)), heads(self.k(x))
        if self.leak == "index":
            k = k[:, torch.tensor([1, 0, 2])]
        q, k = self.q_norm(q), self.k_norm(k)
        if self.pairs != "none":
            q, k = self.rotate(q), self.rotate(k)
        mixed = F.scaled_dot_product_attention(q, k, heads(self.v(x)), is_causal=True)
        y = self.o(mixed.transpose(1, 2).flatten(2))
        return (y, k) if self.leak == "output" else y + k.sum() if self.leak == "sum" else y


def run(model: nn.Module, **options: Any) -> RunResult:
    """The pass on two equal layers; alone, the paths of queries and keys would be taken for layers."""
    twice = nn.Sequential(model, copy.deepcopy(model)).eval()
    program = capture_model(twice, (X,))
    return run_recipe(program, [BalanceAttention(**options)], as_calibration([(X,)], program))


def factors(model: nn.Module, result: RunResult, name: str) -> Tensor:
    """What every row (or gain) of the first layer was multiplied with."""
    before, after = model.get_parameter(name).detach(), result.state.weight(f"0.{name}")
    ratio = after / before
    return ratio if ratio.dim() == 1 else ratio[:, 0]


@pytest.mark.parametrize("pairs", ["half", "neighbours", "none"])
def test_pairs_share_a_scale_and_ranges_meet(pairs: str) -> None:
    model = Attention(pairs)
    result = run(model)
    (proof,) = [check for check in result.report.checks if check.get("pass") == "balance-attention"]
    assert float(proof["max_relative_error"]) <= 1e-9
    q, k = factors(model, result, "q.weight"), factors(model, result, "k.weight")
    assert torch.equal(q * k, torch.ones(WIDTH))
    assert torch.equal(q, factors(model, result, "q.bias"))
    assert torch.equal(k, factors(model, result, "k.bias"))
    partner = {"half": SIZE + 1 + SIZE // 2, "neighbours": SIZE, "none": SIZE + 1}[pairs]
    assert k[SIZE + 1] == k[partner] < 0.3
    if pairs == "none":
        with torch.no_grad():
            new = {
                side: [result.state.weight(f"0.{side}.{part}") for part in ("weight", "bias")]
                for side in "qk"
            }
            reach = [F.linear(X, *new[side]).abs().amax((0, 1)) for side in "qk"]
        assert float((reach[0] / reach[1]).log2().abs().max()) <= 1.001  # each within √2 of the mean
    assert torch.equal(factors(model, result, "v.weight"), torch.ones(WIDTH))


@pytest.mark.parametrize(("alpha", "flat"), [(0.0, "k"), (1.0, "q")])
def test_alpha_flattens_one_side(alpha: float, flat: str) -> None:
    model = Attention("none")
    result = run(model, alpha=alpha, exact=False)
    weight, bias = (result.state.weight(f"0.{flat}.{part}") for part in ("weight", "bias"))
    torch.testing.assert_close(F.linear(X, weight, bias).abs().amax((0, 1)), torch.ones(WIDTH))


def test_gains_of_norms_take_the_scale() -> None:
    model = Attention(norm=True)
    result = run(model)
    assert torch.equal(factors(model, result, "k.weight"), torch.ones(WIDTH))
    k = factors(model, result, "k_norm.weight")
    assert torch.equal(k * factors(model, result, "q_norm.weight"), torch.ones(SIZE))
    assert k[1] == k[1 + SIZE // 2] < 0.3


PRODUCERS = (
    "attn.c_attn.bias",
    "qkv_proj.weight",
    "query_key_value.weight",
    "q_norm.weight",
    "attention.self.query.weight",
)


@pytest.mark.parametrize("name", ["gpt2-odd", "phi3", "gpt-neox", "qwen3-moe", "bert"])
def test_fused_projections_and_others_keep_the_function(name: str) -> None:
    animal = entry(name)
    model = animal.build()
    with torch.no_grad():  # freshly drawn weights have nothing to balance
        for part, weight in model.named_parameters():
            if any(word in part for word in PRODUCERS):
                weight.view(-1, *weight.shape[1:])[1 :: weight.shape[0] // 3] *= 16
    program = capture_model(model, kwargs=dict(animal.inputs()))
    assert find_query_key_groups(program, find_sites(program)).groups
    data = as_calibration([dict(animal.inputs())], program)
    result = run_recipe(program, [BalanceAttention()], data)
    (proof,) = [check for check in result.report.checks if check.get("pass") == "balance-attention"]
    assert float(proof["max_relative_error"]) <= 1e-9
    if name == "gpt2-odd":  # [K, 3·N]: queries, keys, values
        ratio = result.state.weight("transformer.h.0.attn.c_attn.weight") / model.get_parameter(
            "transformer.h.0.attn.c_attn.weight"
        )
        q, k, v = ratio[0].chunk(3)
        assert torch.equal(q * k, torch.ones_like(q))
        assert not torch.equal(k, torch.ones_like(k))
        assert torch.equal(v, torch.ones_like(v))


def test_heads_picked_by_index_are_refused_with_the_op() -> None:
    program = capture_model(Attention(leak="index").eval(), (X,))
    analysis = find_query_key_groups(program, find_sites(program))
    assert not analysis.groups
    assert re.search(r"k.weight → .*index.* picks channels by data", analysis.refused[0][1])


def test_one_head_picked_by_a_constant_is_a_slice() -> None:
    animal = entry("falcon")  # indexes its one key head out of a fused projection
    program = capture_model(animal.build(), kwargs=dict(animal.inputs()))
    analysis = find_query_key_groups(program, find_sites(program))
    assert analysis.groups
    assert not analysis.refused


@pytest.mark.parametrize(("leak", "reason"), [("output", "read by"), ("sum", "does not commute|sums over")])
def test_keys_with_another_reader_are_refused(leak: str, reason: str) -> None:
    model = Attention(leak=leak)
    program = capture_model(model.eval(), (X,))
    analysis = find_query_key_groups(program, find_sites(program))
    assert not analysis.groups
    ((attention, why),) = analysis.refused
    assert attention.key_weights == ("k.weight",)
    assert re.search(f"^k.weight → .*({reason})", why)
    with pytest.raises(CoverageError):
        run_recipe(program, ["balance-attention"], as_calibration([(X,)], program))


def test_one_projection_for_both_sides_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q = self.qk(x).view(*x.shape[:2], HEADS, SIZE).transpose(1, 2)
            v = self.v(x).view(*x.shape[:2], HEADS, SIZE).transpose(1, 2)
            mixed: Tensor = F.scaled_dot_product_attention(q, q, v)
            return mixed

    program = capture_model(Shared().eval(), (X,))
    analysis = find_query_key_groups(program, find_sites(program))
    assert not analysis.groups
    assert "read as query and as key" in analysis.refused[0][1]


def test_it_helps_quantized_attention() -> None:
    model = Attention("none").eval()
    with torch.no_grad():  # wide keys, in channels whose queries are small
        model.k.weight.view(HEADS, SIZE, WIDTH)[:, 1] *= 30
        model.q.weight.view(HEADS, SIZE, WIDTH)[:, 1] /= 30
    program = capture_model(model, (X,))
    data = as_calibration([(X,)], program)
    quantize = {"insert-quant-dequant": {"weights": None, "activations": "tensor", "edges": ["attention"]}}

    def error(*passes: Any) -> float:
        from fxcompress.calibration.walk import Plan, Walk

        result = run_recipe(program, [*passes, quantize], data, verify="off")
        plan = Plan(program)
        walk = Walk(plan, [(X,)])
        for _ in plan.blocks:
            walk.advance(result.state)
        expected = model(X)
        return float((walk.outputs()[0][0] - expected).norm() / expected.norm())

    with torch.no_grad():
        assert error("balance-attention") < 0.5 * error()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 1.5}, "alpha=1.5"), ({"alpha": True}, "alpha=True"), ({"exact": 1}, "exact=1")],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        BalanceAttention(**options)


def test_twice_is_refused_by_name() -> None:
    program = capture_model(Attention().eval(), (X,))
    with pytest.raises(RecipeError, match="balance-attention"):
        run_recipe(program, ["balance-attention", "balance-attention"], as_calibration([(X,)], program))


def test_patterns_speak_of_every_parameter() -> None:
    with pytest.raises(CoverageError):
        run(Attention(), exclude=("*.k.bias",))
