"""Which groups are found, where their units lie, and why other dimensions stay whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.analysis.channel_groups import ChannelGroups, find_channel_groups
from fxcompress.capture import capture_model
from tests.zoo import entry


def find(model: nn.Module, *inputs: Tensor) -> ChannelGroups:
    return find_channel_groups(capture_model(model.eval(), inputs))


def of_zoo(name: str) -> ChannelGroups:
    animal = entry(name)
    return find_channel_groups(capture_model(animal.build(), (), animal.inputs()))


def members(group: ChannelGroup) -> dict[tuple[str, int], tuple[int, str]]:
    """(weight, dimension) → (positions per unit, role)."""
    return {(m.name, m.dim): (m.positions.shape[1], m.role) for m in group.members}


def reason(groups: ChannelGroups, name: str, dim: int) -> str:
    """Why the dimension of that weight, or the outermost part of it, stays whole."""
    found = [g.frozen for g in groups.frozen for m in g.members if (m.name, m.dim) == (name, dim)]
    return found[0]


def test_every_block_of_the_packaged_model_has_its_heads_and_channels(smollm_small: Any) -> None:
    ids = torch.randint(0, 1000, (2, 8))
    groups = find_channel_groups(capture_model(smollm_small, (), {"input_ids": ids, "use_cache": False}))
    assert [(g.kind, g.units) for g in groups] == [("heads", 3), ("channels", 1536)] * 3
    assert [g.block for g in groups] == [1, 1, 2, 2, 3, 3]
    attention, mlp = groups.groups[2:4]
    layer = "model.layers.1"
    assert attention.name == f"{layer}.self_attn.q_proj.weight:0"
    assert members(attention) == {
        (f"{layer}.self_attn.q_proj.weight", 0): (192, "produces"),
        (f"{layer}.self_attn.k_proj.weight", 0): (64, "produces"),
        (f"{layer}.self_attn.v_proj.weight", 0): (64, "produces"),
        (f"{layer}.self_attn.o_proj.weight", 1): (192, "consumes"),
    }
    assert members(mlp) == {
        (f"{layer}.mlp.gate_proj.weight", 0): (1, "produces"),
        (f"{layer}.mlp.up_proj.weight", 0): (1, "produces"),
        (f"{layer}.mlp.down_proj.weight", 1): (1, "consumes"),
    }
    assert reason(groups, "model.embed_tokens.weight", 0) == "it is an output of the model"
    assert reason(groups, "model.embed_tokens.weight", 1).startswith("aten::mean")


@pytest.mark.parametrize(
    ("name", "heads", "channels"),
    [
        ("gpt2-odd", 3, 3),  # one matrix for query, key and value, stored transposed
        ("gpt-neox", 2, 2),  # parallel residual, every head with its own query, key and value
        ("falcon", 2, 2),  # parallel residual, one key for all queries
        ("qwen3", 2, 2),  # norms of queries and keys inside each head
        ("phi3", 2, 2),  # fused gate and up, fused query, key and value
        ("mpt", 1, 2),  # slopes computed from the number of the head, shared by the layers
        ("mixtral", 2, 2),  # one group for the channels of all experts of a layer
        ("t5", 3, 4),  # a bias per head that layers share couples their heads
    ],
)
def test_models_of_other_kinds(name: str, heads: int, channels: int) -> None:
    found = [group.kind for group in of_zoo(name)]
    assert (found.count("heads"), found.count("channels")) == (heads, channels)


def test_routed_experts_and_the_reasons_of_those_in_groups() -> None:
    groups = of_zoo("mixtral")
    layer = "model.layers.0.mlp"
    group = groups[f"{layer}.gate.weight:0"]
    assert (group.kind, group.units, group.least, len(group.routes)) == ("experts", 4, 2, 2)
    assert members(group) == {
        (f"{layer}.gate.weight", 0): (1, "produces"),
        (f"{layer}.experts.gate_up_proj", 0): (1, "consumes"),
        (f"{layer}.experts.down_proj", 0): (1, "consumes"),
    }
    grouped = of_zoo("deepseek-v3")  # the router first chooses groups of experts
    assert "aten::topk" in reason(grouped, "model.layers.1.mlp.gate.weight", 0)
    assert "chooses among groups of experts" in reason(grouped, "model.layers.1.mlp.experts.down_proj", 0)


class Plain(nn.Module):
    """Layers around any function of a tensor ``[B, 12]``."""

    def __init__(self, between: Any, width: int = 12) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 12), nn.Linear(width, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x)))


@pytest.mark.parametrize(
    ("between", "named"),
    [
        (lambda x: torch.softmax(x, -1), "aten::softmax"),
        (lambda x: F.layer_norm(x, (12,)), "aten::layer_norm"),
        (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), "aten::mean"),
        (lambda x: x - x.amax(-1, keepdim=True), "aten::amax"),
        (lambda x: x.flip(-1), "aten::flip"),
        (lambda x: x.sigmoid() * x.sigmoid().sum(-1, keepdim=True), "aten::sum"),
        (lambda x: x.sigmoid() @ x.sigmoid().T @ x, "aten::matmul"),
        (lambda x: x / x.view(-1, 3, 4).norm(dim=-1).repeat_interleave(4, -1), "aten::div"),
        (lambda x: torch.polygamma(1, x), "aten::polygamma"),
        (lambda x: x.view(-1, 4, 3).transpose(1, 2).reshape(-1, 12).view(-1, 4, 3).flatten(1), "aten::view"),
        (lambda x: x[:, torch.tensor([3, 1, 2] * 4)], "aten::index"),
    ],
)
def test_what_notices_a_missing_unit_is_named(between: Any, named: str) -> None:
    groups = find(Plain(between), torch.randn(3, 6))
    assert not groups.groups
    assert named in reason(groups, "one.weight", 0)


@pytest.mark.parametrize(
    "between",
    [
        F.gelu,
        torch.sigmoid,
        lambda x: x.relu_().add_(1),
        lambda x: x * x.tanh().sum(-1, keepdim=True),  # a masked unit adds zero to the sum
        lambda x: x * torch.arange(12.0),
        lambda x: torch.cat([x[:, 3:], x[:, :3]], 1) + x,
    ],
)
def test_units_that_nothing_else_notices(between: Any) -> None:
    groups = find(Plain(between), torch.randn(3, 6))
    (group,) = groups.groups
    assert {("one.weight", 0), ("one.bias", 0), ("two.weight", 1)} == set(members(group))


class Divided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.size = nn.Linear(6, 12), nn.Linear(12, 5), nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) / self.size)


def test_a_divisor_cannot_be_masked() -> None:
    groups = find(Divided(), torch.randn(3, 6))
    assert not groups.groups
    assert "aten::div" in reason(groups, "size", 0)


class Joined(nn.Module):
    """Two widths concatenated, read together and apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 16), nn.Linear(5, 32)
        self.both, self.second = nn.Linear(48, 4), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x).relu(), self.two(x).relu()
        return self.both(torch.cat([one, two], -1)) + self.second(two)


def test_parts_of_a_concatenation_are_groups_of_their_own() -> None:
    groups = find(Joined(), torch.randn(3, 5))
    one, two = groups.groups
    assert set(members(one)) == {("one.weight", 0), ("one.bias", 0), ("both.weight", 1)}
    assert set(members(two)) == {("two.weight", 0), ("two.bias", 0), ("both.weight", 1), ("second.weight", 1)}
    (reader,) = [member for member in two.members if member.name == "both.weight"]
    assert reader.positions[4].tolist() == [20]


class Picture(nn.Module):
    """Convolutions, depthwise and grouped, norms, and a flattened picture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4)
        self.group_norm = nn.GroupNorm(2, 12)
        self.head = nn.Linear(12 * 49, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.relu(self.norm(self.stem(x))))
        return self.head(self.group_norm(self.grouped(x)).flatten(1))


def test_convolutions_and_their_norms() -> None:
    groups = find(Picture(), torch.randn(2, 3, 7, 7))
    halves, inner = groups.groups  # half of the four convolution groups is one group of the norm
    assert halves.units == 2
    assert members(halves)["stem.weight", 0] == (4, "produces")
    assert members(halves)["norm.running_var", 0] == (4, "scales")
    assert members(halves)["head.weight", 1] == (6 * 49, "consumes")
    assert members(inner)["grouped.weight", 1] == (1, "consumes")
    assert inner.units == 2
    assert "group_norm" in reason(groups, "grouped.weight", 0)


class GatedExperts(nn.Module):
    """Every expert computes, weighed by a gate of its own; ``router`` lets the gates compete."""

    def __init__(self, router: bool) -> None:
        super().__init__()
        self.router = router
        self.gate = nn.Linear(6, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 10)), nn.Parameter(torch.randn(4, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).softmax(-1) if self.router else self.gate(x).sigmoid()  # [B, E]
        hidden = torch.einsum("bk,ekn->ebn", x, self.up).relu()
        return torch.einsum("ebn,enk,be->bk", hidden, self.down, gate)


@pytest.mark.parametrize("router", [False, True])
def test_experts_are_units_also_where_they_compete(router: bool) -> None:
    groups = find(GatedExperts(router), torch.randn(3, 6))
    found = {group.kind: group.units for group in groups}
    assert found == {"experts": 4, "channels": 10}
    assert [len(group.routes) for group in groups if group.kind == "experts"] == [int(router)]


def test_a_tied_weight_counts_at_every_use() -> None:
    tied = find(entry("tied-autoencoder").build(), torch.randn(2, 27))
    (group,) = tied.groups
    assert members(group) == {("encode.weight", 0): (1, "produces"), ("encode.bias", 0): (1, "produces")}
    shared = find(entry("shared-layers").build(), torch.randn(2, 24))
    assert not shared.groups  # it reads the input, and its output is the model's
    assert reason(shared, "block.weight", 0) == "it is an output of the model"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, 12))
        return x + self.down(F.gelu(self.up(x)))


def test_work_grows_in_proportion_to_the_depth() -> None:
    counts = []
    for depth in (4, 16):
        program = capture_model(nn.Sequential(*[Block() for _ in range(depth)]), (torch.randn(2, 3, 12),))
        groups = find_channel_groups(program)
        assert [g.kind for g in groups] == ["heads", "channels"] * depth
        counts.append(groups.typing.axes.operations)
    assert counts[1] < 4.4 * counts[0]
