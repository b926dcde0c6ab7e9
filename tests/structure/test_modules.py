"""The module that follows a cut, on small models of every kind: it computes what the masked original does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.analysis.channel_groups import find_channel_groups
from fxcompress.calibration import as_calibration
from fxcompress.capture import Program, capture_model
from fxcompress.examples import call_arguments
from fxcompress.manager import run_recipe
from fxcompress.structure.build import Built, build_cut_module
from fxcompress.structure.mask_program import mask_program, mask_weights
from tests.engine.structural import DropBlocks, KeepFirst
from tests.zoo import entry, generate_tokens, scores


def cut(name: str, *passes: Any) -> tuple[nn.Module, dict[str, Any], Program, Built]:
    """The original, inputs, its program, and the module that follows the passes."""
    animal = entry(name)
    model = animal.build()
    _, kwargs = call_arguments(model, animal.inputs())
    program = capture_model(model, kwargs=kwargs)
    data = as_calibration([kwargs], program)
    result = run_recipe(program, list(passes), examples=data, verify="off")
    return model, kwargs, program, build_cut_module(model, result.program, result.rounds, data.flat()[0])


@torch.no_grad()
def masked(model: nn.Module, program: Program, built: Built) -> nn.Module:
    """The original with the units of one cut zeroed."""
    (change,) = built.structure.changes
    kept = {name: torch.tensor(units) for name, units in change.kept.items()}
    clone = copy.deepcopy(model)
    tensors = {**dict(clone.named_parameters()), **dict(clone.named_buffers())}
    for name, value in mask_weights(program, find_channel_groups(program), kept).items():
        tensors[name].copy_(value)
    return clone


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


CONFIG, ATTRIBUTES, GRAPH = "configuration", "attributes", "graph"
CASES = [
    ("llama-tied-odd", 1, ATTRIBUTES),  # layers of different widths
    ("qwen3", 0, CONFIG),  # grouped queries, norms of queries and keys
    ("gpt2-odd", 0, ATTRIBUTES),  # fused and transposed projections; its code splits by a stored size
    ("gpt-neox", 1, ATTRIBUTES),  # parallel residual, fused projection by head
    ("bert", 0, ATTRIBUTES),  # the configuration ties the number of heads to their size
    ("t5", 0, CONFIG),  # encoder and decoder
    ("vit", 1, ATTRIBUTES),
    ("resnet", 0, ATTRIBUTES),  # convolutions, batch norms with running statistics
    ("deepseek-v3", 0, ATTRIBUTES),  # latent attention, experts and a router
]


@pytest.mark.parametrize(("name", "fewer", "way"), CASES, ids=[case[0] for case in CASES])
@torch.no_grad()
def test_modules_follow(name: str, fewer: int, way: str) -> None:
    model, kwargs, program, built = cut(name, KeepFirst(fewer=fewer))
    structure = built.structure
    found = GRAPH if structure.graph else CONFIG if structure.from_config else ATTRIBUTES
    assert found == way, structure.graph
    close(scores(built.module(**kwargs)), scores(masked(model, program, built)(**kwargs)))
    before = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in built.module.parameters()) < before
    original = entry(name).build()
    for key, value in model.state_dict().items():  # the user's module is as it was
        assert torch.equal(value, original.state_dict()[key])
    if way != GRAPH and entry(name).generates:
        ids = {"input_ids": kwargs["input_ids"]}
        assert generate_tokens(built.module, ids).shape == (kwargs["input_ids"].shape[0], 4)


@pytest.mark.parametrize(
    ("name", "fewer", "changed"),
    [("mixtral", 1, "num_experts"), ("gpt-oss", 0, "num_local_experts")],
    ids=["layers-of-their-own", "configuration"],
)
@torch.no_grad()
def test_modules_follow_fewer_experts(name: str, fewer: int, changed: str) -> None:
    """What the router may choose at once stays, whatever equals the number of experts."""
    model, kwargs, program, built = cut(name, KeepFirst(keep=0.99, fewer=fewer, kinds=("experts",)))
    (change,) = built.structure.changes
    assert [len(units) for units in change.kept.values()] == ([3, 2] if fewer else [3, 3])
    changes = (*built.structure.config, *built.structure.attributes)
    assert {change.name for change in changes} == {changed}
    assert bool(built.structure.config) == (fewer == 0)
    assert built.module.config.num_experts_per_tok == model.config.num_experts_per_tok
    kept = {name: torch.tensor(units) for name, units in change.kept.items()}
    whole = mask_program(program, find_channel_groups(program), kept)
    close(scores(built.module(**kwargs)), whole.run_flat(program.flatten_inputs((), kwargs))[0])
    assert generate_tokens(built.module, {"input_ids": kwargs["input_ids"]}).shape == (2, 4)


def test_attributes_that_nothing_needs_stay() -> None:
    """The window of attention equals the old number of heads, and is none."""
    _, _, _, built = cut("gemma2", KeepFirst(fewer=1))
    changed = {change.name for change in built.structure.attributes}
    assert "sliding_window" not in changed
    assert "head_dim" not in changed
    attention = built.module.model.layers[0].self_attn
    assert attention.q_proj.out_features == attention.q_proj.weight.shape[0]
    assert attention.sliding_window == entry("gemma2").build().model.layers[0].self_attn.sliding_window


@pytest.mark.parametrize("name", ["llama-tied-odd", "gpt2-odd", "bert"])
@torch.no_grad()
def test_layers_are_removed_and_renumbered(name: str) -> None:
    model, kwargs, _, built = cut(name, DropBlocks((0,)), KeepFirst(kinds=("channels",)))
    config: Any = built.module.config
    assert config.num_hidden_layers == model.config.num_hidden_layers - 1
    numbers = [m.layer_idx for m in built.module.modules() if type(getattr(m, "layer_idx", None)) is int]
    assert sorted(set(numbers)) == list(range(config.num_hidden_layers)) or not numbers
    assert torch.isfinite(scores(built.module(**kwargs))).all()
    if entry(name).generates:
        cache = built.module(input_ids=kwargs["input_ids"], use_cache=True).past_key_values
        assert len(cache.layers) == config.num_hidden_layers


class Fixed(nn.Module):
    """Code that no attribute can change."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x)).view(x.shape[0], 10)
        return self.down(hidden)


class Stored(nn.Module):
    """The same with the size in an attribute, a list, and one of equal value that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)
        self.sizes = [10, 10]
        self.repeats = 10

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x)).view(x.shape[0], self.sizes[0])
        return self.down(hidden) * self.repeats


def module_for(model: nn.Module, x: Tensor) -> Built:
    program = capture_model(model, (x,))
    data = as_calibration([(x,)], program)
    result = run_recipe(program, [KeepFirst()], examples=data)
    return build_cut_module(model, result.program, result.rounds, data.flat()[0])


@torch.no_grad()
def test_code_that_fixes_sizes_runs_as_a_graph() -> None:
    built = module_for(Fixed().eval(), torch.randn(4, 12))
    assert "invalid for input of size" in built.structure.graph
    x = torch.randn(3, 12)
    up, down = built.module.get_parameter("up.weight"), built.module.get_parameter("down.weight")
    assert up.shape == (5, 12)
    hidden = torch.relu(x @ up.T + built.module.get_parameter("up.bias"))
    close(built.module(x), hidden @ down.T + built.module.get_parameter("down.bias"))


@torch.no_grad()
def test_a_value_that_only_looks_like_a_size_is_tried_and_kept() -> None:
    built = module_for(Stored().eval(), torch.randn(4, 12))
    assert not built.structure.graph
    assert built.module.sizes == [5, 5]
    assert built.module.repeats == 10
