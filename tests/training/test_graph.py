"""The training graph: computes what the artifact computes, and has the gradients it should."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.calibration.plan import Plan
from fxcompress.capture import capture_model
from fxcompress.edits import CompressionState
from fxcompress.errors import TrainingError
from fxcompress.forms import LowRank, StaticPerTensor
from fxcompress.manager import run_recipe
from fxcompress.training.graph import TrainingGraph
from fxcompress.training.trainable import What
from tests.engine.models import decoder, tokens
from tests.training.cases import call, compressed, disturb, exported, graph, plan, run_applied
from tests.zoo import entry
from tests.zoo_causal import BODY, causal_lm

IDS = tokens(3, 7, seed=5)
W3 = {"quantize-weights": {"bits": 3, "group_size": 8}}
RECIPES: dict[str, list[Any]] = {
    "integers": [W3],
    "integers and activations": [W3, {"quantize-activations": {"bits": 8, "mode": "dynamic"}}],
    "static activations": [W3, {"quantize-activations": {"bits": 4, "mode": "static"}}],
    "codebook": [{"quantize-codebook": {"group_size": 8, "heads": True, "double_quant": True}}],
    "tables per row": [{"quantize-codebook": {"table": "kmeans", "bits": 2}}],
    "floats": [{"quantize-weights": {"format": "fp8-e4m3"}}],
    "masked": [{"prune-magnitude": {"pattern": "2:4"}}],
    "packed sparse": [{"prune-magnitude": {"pattern": "2:4"}}, "pack-sparse"],
    "packed sparse codes": [{"prune-magnitude": {"pattern": "2:4"}}, W3, "pack-sparse"],
    "factors": [{"svd": {"keep": 0.5}}],
    "factors of codes": [{"svd": {"keep": 0.5}}, {"quantize-weights": {"bits": 8}}],
    "residual": [W3, {"low-rank-residual": {"rank": 2, "metric": "weights"}}],
}


ALL = ("weights", "embeddings", "floats", "activations")
CASES = [
    *((name, ALL) for name in RECIPES),
    *(
        (name, ("scales",))
        for name in ("integers", "codebook", "tables per row", "floats", "factors of codes")
    ),
    *((name, ("lora",)) for name in ("integers", "codebook", "masked", "packed sparse codes", "residual")),
]


@pytest.mark.parametrize(("name", "parts"), CASES)
def test_what_is_trained_is_what_the_artifact_computes(name: str, parts: tuple[str, ...]) -> None:
    state = compressed(*RECIPES[name])
    trained = graph(state, *parts)
    trained(call(IDS)).scores.square().mean().backward()
    dead = [n for n, p in trained.named_parameters() if p.requires_grad and p.grad is None]
    assert not dead
    disturb(trained)
    with torch.no_grad():
        scores = trained(call(IDS)).scores
    assert torch.equal(scores, run_applied(decoder(), exported(trained, state), IDS))


@pytest.mark.parametrize("name", ["static activations", "codebook", "masked", "residual"])
def test_nothing_changes_before_the_first_step(name: str) -> None:
    state = compressed(*RECIPES[name])
    for parts in (("weights", "floats"), ("lora",)):
        with torch.no_grad():
            scores = graph(state, *parts)(call(IDS)).scores
        assert torch.allclose(scores, run_applied(decoder(), state, IDS), atol=1e-6), parts


def test_frozen_parts_hold_no_gradients_and_blocks_run_again() -> None:
    trained = graph(compressed(W3), "lora", rank=2)
    with_values = TrainingGraph(plan(), compressed(W3), What(parts=("lora",), rank=2), checkpointing=False)
    with_values.load_state_dict(trained.state_dict())
    sizes = {}
    for name, one in (("again", trained), ("kept", with_values)):
        held: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x) or x, lambda x: x):
            one(call(IDS)).scores.square().mean().backward()
        sizes[name] = sum(x.numel() for x in held)
    assert sizes["again"] < sizes["kept"]
    assert all(not buffer.requires_grad and buffer.grad is None for buffer in trained.buffers())
    assert sum(p.numel() for p in trained.parameters()) == sum(
        2 * (n + k) for n, k in ((32, 16), (16, 32)) * 3 + ((40, 16),)
    )
    for (n, a), (_, b) in zip(trained.named_parameters(), with_values.named_parameters(), strict=True):
        assert a.grad is not None, n
        assert torch.allclose(a.grad, b.grad, atol=1e-6), n  # type: ignore[arg-type]


def test_gradients_equal_finite_differences() -> None:
    state = CompressionState(decoder().weights)
    trained = graph(state, "lora", "floats", rank=2)
    disturb(trained, 0.05)

    def loss() -> Tensor:
        return trained(call(IDS)).scores.double().square().mean()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(trained.named_parameters())[::4]:
        direction = torch.randn(parameter.shape, generator=generator)
        assert parameter.grad is not None
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter += sign * 1e-3 * direction
                ends.append(float(loss()))
                parameter -= sign * 1e-3 * direction
        measured = (ends[0] - ends[1]) / 2e-3
        assert measured == pytest.approx(float((parameter.grad * direction).sum()), rel=2e-2, abs=2e-2), name


def test_masked_entries_stay_zero_and_a_branch_beside_them_is_allowed() -> None:
    for recipe in ("masked", "packed sparse", "packed sparse codes"):
        state = compressed(*RECIPES[recipe])
        trained = graph(state, "weights")
        disturb(trained)
        new = exported(trained, state)
        for name, mask in state.masks.items():
            assert mask.broken_by(new.effective(name)) == 0, (recipe, name)
        branched = exported(graph(state, "lora"), state)
        kinds = [isinstance(t, LowRank) for t in branched.form("layers.0.up.weight").terms]
        assert kinds == ([] if recipe == "masked" else [False, True])


def test_sites_with_one_input_keep_one_scale() -> None:
    torch.manual_seed(0)
    model = causal_lm("LlamaConfig", dict(BODY)).eval()
    ids = torch.randint(3, 128, (2, 12))
    program = capture_model(model, kwargs={"input_ids": ids, "use_cache": False})
    recipe = [
        {"quantize-weights": {"bits": 4, "group_size": 32}},
        {"quantize-activations": {"bits": 8, "mode": "static"}},
        {"quantize-kv-cache": {"bits": 4}},
    ]
    state = run_recipe(program, recipe, [ids], verify="off").state
    trained = TrainingGraph(Plan(program), state, What(parts=("weights", "activations")))
    rounded = [n for n in trained._applied[0].module.graph.nodes if "round_as_cached" in n.name]
    assert len(rounded) == 4  # keys and values of two layers
    inputs = {program.inputs[0]: ids}
    trained(inputs).scores.square().mean().backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)
    disturb(trained, 0.05)
    new = exported(trained, state)
    q, k = (new.form(f"model.layers.0.self_attn.{p}_proj.weight").activation for p in "qk")
    assert isinstance(q, StaticPerTensor)
    assert isinstance(k, StaticPerTensor)
    assert torch.equal(q.scale, k.scale)
    old = state.form("model.layers.0.self_attn.q_proj.weight").activation
    assert isinstance(old, StaticPerTensor)
    assert not torch.equal(q.scale, old.scale)
    # Without the cache's rounding the graph is the artifact's.
    for name, form in new.forms.items():
        new.forms[name] = dataclasses.replace(form, cache=None)
    plain = TrainingGraph(Plan(program), new, None)
    with torch.no_grad():
        assert torch.equal(plain(inputs).scores[0], run_applied(program, new, ids)[0])


def test_nothing_to_train_is_an_error() -> None:
    state = CompressionState(decoder().weights)
    with pytest.raises(TrainingError, match="nothing to train"):
        TrainingGraph(plan(), state, What(parts=("weights",), chosen=lambda name: False))


@pytest.mark.parametrize("name", ["vit", "mixtral", "gpt2-odd"])
def test_other_architectures_train(name: str) -> None:
    animal = entry(name)
    model, inputs = animal.build(), animal.inputs()
    program = capture_model(model, (), inputs)
    flat = program.flatten_inputs((), inputs)
    state = CompressionState(program.weights)
    trained = TrainingGraph(Plan(program), state, What(parts=("weights", "embeddings", "floats")))
    found = trained(dict(zip(program.inputs, flat, strict=True))).scores
    assert any(torch.equal(found, value) for value in program.run_flat(flat) if isinstance(value, Tensor))
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())
