"""Smoothing groups: every group found must keep the function exactly, and every trap must be seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress.analysis.blocks import find_blocks
from fxcompress.analysis.sites import find_sites
from fxcompress.analysis.smoothing import GroupKind, SmoothingAnalysis, SmoothingGroup, find_smoothing_groups
from fxcompress.capture.export import capture_model
from fxcompress.capture.program import Program
from fxcompress.errors import WeightError
from tests.analysis import smoothing_models as models
from tests.analysis.float64 import double_program, outputs, relative_difference
from tests.zoo import DECODERS, ENCODER_DECODERS, ENCODERS, ZooEntry, entry

TOLERANCE = 1e-9
X = {"x": torch.randn(2, 5, models.WIDTH, generator=torch.Generator().manual_seed(1))}
QUICK = (
    "llama-tied-odd",
    "gemma2",
    "phi3",
    "gpt2-odd",
    "opt-odd",
    "mixtral",
    "deepseek-v3",
    "t5",
)


def analyze(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Program, SmoothingAnalysis]:
    program = double_program(capture_model(model.eval(), kwargs=dict(inputs)))
    return program, find_smoothing_groups(program, find_sites(program))


def random_scale(group: SmoothingGroup, seed: int = 0) -> Tensor:
    """Log-normal, never 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.randn(group.channels, generator=generator, dtype=torch.float64))


def apply(group: SmoothingGroup, weights: dict[str, Tensor], seed: int = 0) -> set[str]:
    edits = list(group.edits(random_scale(group, seed), weights.__getitem__))
    weights.update({edit.name: edit.value for edit in edits})
    return {edit.name for edit in edits}


def assert_exact(program: Program, analysis: SmoothingAnalysis, inputs: Mapping[str, Any]) -> None:
    """All groups together change the weights and not the function; half of a group would be seen."""
    before, weights = outputs(program, inputs), dict(program.weights)
    changed = {name for seed, group in enumerate(analysis.groups) for name in apply(group, weights, seed)}
    assert relative_difference(outputs(program, inputs, weights), before) <= TOLERANCE
    assert changed == {parameter.name for group in analysis.groups for parameter in group.parameters}
    for group in analysis.groups[:2]:
        halves = {
            edit.name: edit.value for edit in group.edits(random_scale(group), program.weights.__getitem__)
        }
        del halves[group.name]
        assert relative_difference(outputs(program, inputs, halves), before) > 1e-6


def assert_accounted(program: Program, analysis: SmoothingAnalysis) -> None:
    grouped = {site.node for group in analysis.groups for site in group.sites}
    refused = {site.node for site, reason in analysis.refused if reason}
    wanted = {site.node for site in find_sites(program) if site.takes_activation}
    assert grouped | refused == wanted
    assert not grouped & refused


def check(model: nn.Module, inputs: Mapping[str, Any] = X) -> SmoothingAnalysis:
    program, analysis = analyze(model, inputs)
    assert_exact(program, analysis, inputs)
    assert_accounted(program, analysis)
    return analysis


def found(analysis: SmoothingAnalysis) -> dict[str, tuple[str, ...]]:
    return {group.name: group.site_names for group in analysis.groups}


def reasons(analysis: SmoothingAnalysis) -> dict[str, str]:
    return {site.name: reason for site, reason in analysis.refused}


@pytest.mark.parametrize("name", QUICK)
def test_groups_of_real_architectures_keep_the_function(name: str) -> None:
    animal = entry(name)
    analysis = check(animal.build(), animal.inputs())
    assert analysis.groups


@pytest.mark.slow
@pytest.mark.parametrize(
    "animal",
    [e for e in DECODERS + ENCODERS + ENCODER_DECODERS if e.name not in QUICK and "slow" not in e.tags],
    ids=lambda animal: str(animal.name),
)
def test_groups_of_all_architectures_keep_the_function(animal: ZooEntry) -> None:
    check(animal.build(), animal.inputs())


@pytest.mark.real_model
def test_groups_of_a_real_model(smollm_small: nn.Module) -> None:
    inputs = {"input_ids": torch.randint(0, 1000, (2, 9)), "use_cache": False}
    groups = check(smollm_small, inputs).groups
    assert len(groups) == 12  # per block: two norms, value → output, up → down; the tied head is refused
    values = [group for group in groups if group.name.endswith("v_proj.weight")]
    assert [group.channels for group in values] == [3 * 64] * 3  # one scale per key/value channel
    for group in values:
        (consumer,) = group.consumers
        heads = consumer.columns.view(9, 64)
        assert torch.equal(heads[0], heads[2])
        assert not torch.equal(heads[2], heads[3])


def test_a_plain_decoder_gives_the_known_groups() -> None:
    animal = entry("llama")
    groups = found(check(animal.build(), animal.inputs()))
    layer = {
        name.removeprefix("model.layers.1."): sites for name, sites in groups.items() if ".layers.1." in name
    }
    short = {name: tuple(s.split(".")[-2] for s in sites) for name, sites in layer.items()}
    assert short == {
        "input_layernorm.weight": ("q_proj", "k_proj", "v_proj"),
        "self_attn.v_proj.weight": ("o_proj",),
        "post_attention_layernorm.weight": ("gate_proj", "up_proj"),
        "mlp.up_proj.weight": ("down_proj",),
    }
    assert groups["model.norm.weight"] == ("lm_head.weight",)


def test_routed_experts_and_router_form_one_group() -> None:
    animal = entry("mixtral")
    groups = found(check(animal.build(), animal.inputs()))
    assert groups["model.layers.0.post_attention_layernorm.weight"] == (
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
    )
    assert groups["model.layers.0.mlp.experts.gate_up_proj"] == ("model.layers.0.mlp.experts.down_proj",)


def test_norm_with_bias_divides_the_bias_along() -> None:
    (group,) = check(
        nn.Sequential(nn.LayerNorm(models.WIDTH), nn.Linear(models.WIDTH, 4)), {"input": X["x"]}
    ).groups
    assert [(p.name, p.role) for p in group.producers] == [("0.weight", "gain"), ("0.bias", "bias")]
    assert group.kind is GroupKind.NORM


def test_gain_stored_without_its_one() -> None:
    program, analysis = analyze(models.NormTwo(plus_one=True), X)
    (group,) = analysis.groups
    scale = random_scale(group)
    edits = {edit.name: edit.value for edit in group.edits(scale, program.weights.__getitem__)}
    torch.testing.assert_close(edits["norm.weight"], (1 + program.weights["norm.weight"]) / scale - 1)
    torch.testing.assert_close(edits["one.weight"], program.weights["one.weight"] * scale)
    assert_exact(program, analysis, X)


@pytest.mark.parametrize(
    ("trap", "expected"),
    [
        ("second reader", "norm.weight → aten::tanh"),
        ("returned", "norm.weight → it is read by the output of the model"),
        ("residual", "norm.weight → aten::add (add_1) adds it to aten::to (to), which is not scaled along"),
        ("norm used twice", "norm.weight is used elsewhere, too"),
        ("tied consumer", "two.weight is used at 2 places"),
        ("in place", "norm.weight → aten::mul_"),
    ],
)
def test_traps_after_a_norm_are_refused(trap: str, expected: str) -> None:
    analysis = check(models.NormTwo(trap))
    assert not analysis.groups
    found_reasons = reasons(analysis)
    assert set(found_reasons) == {"one.weight", "two.weight"}
    assert any(reason.startswith(expected) or expected in reason for reason in found_reasons.values()), (
        found_reasons
    )


@pytest.mark.parametrize("between", ["relu", "relu_", "shift", "scalar", "heads", "nothing"])
def test_matrices_fold_through_ops_that_commute(between: str) -> None:
    analysis = check(models.Pair(between), {"x": torch.randn(2, 3, 5)})
    group = analysis.groups[0]
    assert (group.kind, group.channels, group.site_names) == (
        GroupKind.LINEAR,
        models.WIDTH,
        ("second.weight",),
    )
    roles = [parameter.role for parameter in group.producers]
    assert roles == (["rows", "bias", "bias"] if between == "shift" else ["rows", "bias"])


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ("gelu", "aten::gelu (gelu) does not commute with a scale per channel"),
        ("silu", "aten::silu (silu) does not commute"),
        ("sigmoid", "aten::sigmoid (sigmoid) does not commute"),
        ("softmax", "aten::softmax (softmax) does not commute"),
        ("constant", "adds it to the constant 1.0"),
        ("square", "multiplies two scaled values"),
        ("mean", "sums over channels"),
    ],
)
def test_matrices_do_not_fold_through_ops_that_do_not_commute(between: str, expected: str) -> None:
    analysis = check(models.Pair(between), {"x": torch.randn(2, 3, 5)})
    assert not analysis.groups
    assert expected in reasons(analysis)["second.weight"]
    assert reasons(analysis)["second.weight"].startswith("first.weight → ")


def test_part_of_the_channels_can_be_scaled() -> None:
    (group,) = check(models.Pair("join"), {"x": torch.randn(2, 3, 5)}).groups
    assert group.channels == models.WIDTH - 4
    assert group.producers[0].channels.flatten()[:4].tolist() == [-1] * 4
    assert group.consumers[0].columns[0, -4:].tolist() == [-1] * 4


def test_channels_that_are_added_share_a_scale() -> None:
    (group,) = check(models.Pair("fold"), {"x": torch.randn(2, 3, 5)}).groups
    assert group.channels == 6
    assert group.producers[0].channels.flatten().tolist() == [0, 1, 2, 3, 4, 5] * 2


def test_a_gain_between_matrices_gives_two_groups_for_one_input() -> None:
    analysis = check(models.Pair("gain"), {"x": torch.randn(2, 3, 5)})
    assert found(analysis) == {"first.weight": ("second.weight",), "gain": ("second.weight",)}


@pytest.mark.parametrize("style", ["expand", "repeat", "gqa", "softmax", "einsum"])
@pytest.mark.parametrize("fused", [False, True])
def test_value_to_output_shares_scales_over_query_groups(style: str, fused: bool) -> None:
    analysis = check(models.Attention(style=style, fused=fused))
    groups = {group.name: group for group in analysis.groups}
    assert set(groups) == {"norm.weight", "qkv.weight" if fused else "v.weight"}
    group = groups["qkv.weight" if fused else "v.weight"]
    assert group.channels == 6
    assert group.consumers[0].columns[0].view(4, 3).tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    if fused:  # query and key rows keep their scale
        assert group.producers[0].channels.flatten().tolist() == [-1] * 18 + list(range(6))


def test_queries_and_keys_are_no_producers() -> None:
    analysis = check(models.Attention())
    assert {"q.weight", "k.weight"}.isdisjoint(found(analysis))


def test_experts_cut_out_of_one_parameter() -> None:
    analysis = check(models.Experts())
    groups = found(analysis)
    assert groups["norm.weight"] == ("router.weight", "up")
    assert "up is used elsewhere, too" in reasons(analysis)["down"]


@st.composite
def modules(draw: st.DrawFn) -> nn.Module:
    """A norm-first block of random kind and size."""
    kind = draw(st.sampled_from(["gated", "attention", "pair"]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    if kind == "gated":
        gate = draw(st.sampled_from(["silu", "relu", "gelu"]))
        return models.Gated(
            draw(st.integers(1, 9)), fused=draw(st.booleans()), bias=draw(st.booleans()), gate=gate
        )
    if kind == "attention":
        groups = draw(st.integers(1, 3))
        style = draw(st.sampled_from(["expand", "repeat", "gqa", "softmax", "einsum"]))
        heads, size = groups * draw(st.integers(1, 3)), draw(st.integers(1, 4))
        return models.Attention(heads, groups, size, fused=draw(st.booleans()), style=style)
    width = draw(st.integers(1, 9))
    functions = draw(
        st.lists(st.sampled_from([nn.ReLU, nn.GELU, nn.Identity, nn.LeakyReLU, nn.Tanh]), max_size=2)
    )
    layers = [
        nn.Linear(models.WIDTH, width),
        *(function() for function in functions),
        nn.Linear(width, models.WIDTH),
    ]
    return nn.Sequential(nn.LayerNorm(models.WIDTH), *layers)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(modules())
def test_random_modules_keep_their_function(model: nn.Module) -> None:
    name = "input" if isinstance(model, nn.Sequential) else "x"
    analysis = check(model, {name: X["x"]})
    assert any(group.kind is GroupKind.NORM for group in analysis.groups)


def test_groups_of_a_block_lie_wholly_inside_it() -> None:
    animal = entry("llama")
    program, whole = analyze(animal.build(), animal.inputs())
    sites = find_sites(program)
    together: dict[str, tuple[str, ...]] = {}
    for block in find_blocks(program.graph):
        together |= found(find_smoothing_groups(program, sites, set(block.nodes)))
    assert together == found(whole)
    cut = next(site.node for site in sites if site.name.endswith("0.self_attn.k_proj.weight"))
    part = find_smoothing_groups(program, sites, set(program.graph.nodes) - {cut})
    assert "model.layers.0.input_layernorm.weight" not in found(part)
    assert "outside its block" in reasons(part)["model.layers.0.self_attn.q_proj.weight"]


def test_folding_between_matrices_can_be_left_out() -> None:
    animal = entry("llama")
    program, _ = analyze(animal.build(), animal.inputs())
    analysis = find_smoothing_groups(program, find_sites(program), fold_linear=False)
    assert {group.kind for group in analysis.groups} == {GroupKind.NORM}


def test_largest_magnitudes_by_channel() -> None:
    program, analysis = analyze(models.Attention(), X)
    group = next(group for group in analysis.groups if group.name == "v.weight")
    name = group.consumers[0].input_name
    absmax = torch.arange(12.0)
    assert group.input_absmax({name: absmax}).tolist() == [3, 4, 5, 9, 10, 11]
    columns = program.weights["o.weight"].abs().amax(0).view(2, 2, 3)
    torch.testing.assert_close(group.weight_absmax(program.weights.__getitem__), columns.amax(1).flatten())


@pytest.mark.parametrize(
    "scale", [torch.zeros(12), torch.ones(11), torch.full((12,), float("inf")), -torch.ones(12)]
)
def test_scales_must_be_positive_finite_and_complete(scale: Tensor) -> None:
    program, analysis = analyze(models.NormTwo(), X)
    with pytest.raises(WeightError, match=r"norm\.weight: expected 12 positive finite scales"):
        list(analysis.groups[0].edits(scale, program.weights.__getitem__))


def test_a_value_that_leaves_its_dtype_is_an_error() -> None:
    program, analysis = analyze(models.NormTwo(), X)
    half = {name: tensor.half() for name, tensor in program.weights.items()}
    with pytest.raises(WeightError, match=r"leaves the range of torch\.float16"):
        list(analysis.groups[0].edits(torch.full((12,), 1e6), half.__getitem__))
