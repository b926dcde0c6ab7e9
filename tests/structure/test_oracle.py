"""Cutting equals masking: on the zoo, on the packaged model, and not where the analysis is overruled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxcompress.analysis.channel_groups import ChannelGroups, find_channel_groups
from fxcompress.capture import capture_model
from fxcompress.capture.program import Program
from fxcompress.errors import VerificationError, WeightError
from fxcompress.structure.cut_program import cut_program
from fxcompress.structure.mask_program import mask_weights
from fxcompress.structure.oracle import check_group, check_groups, check_kept
from tests.zoo import ZOO, ZooEntry, entry

SAMPLE = [
    *("gpt2-odd", "gpt-neox", "falcon", "bloom", "mixtral", "gpt-oss", "phimoe", "t5", "bert", "vit"),
    *("resnet", "depthwise", "unet", "einsum", "temporal-conv"),
]


def analysed(animal: ZooEntry) -> tuple[Program, ChannelGroups, list[Any]]:
    inputs = animal.inputs()
    program = capture_model(animal.build(), (), inputs)
    return program, find_channel_groups(program), program.flatten_inputs((), inputs)


def some(groups: ChannelGroups, share: float = 0.6) -> dict[str, Tensor]:
    """Random units to keep, of every group."""
    return {
        group.name: torch.randperm(group.units)[: max(group.least, int(share * group.units))].sort().values
        for group in groups
    }


@pytest.mark.parametrize("name", SAMPLE)
def test_all_groups_of_a_model_cut_at_once(name: str) -> None:
    program, groups, inputs = analysed(entry(name))
    assert groups.groups
    assert check_kept(program, groups, some(groups), inputs) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("animal", ZOO.values(), ids=lambda animal: animal.name)
def test_every_group_of_the_zoo(animal: ZooEntry) -> None:
    program, groups, inputs = analysed(animal)
    errors = check_groups(program, groups, inputs)
    assert max(errors.values(), default=0.0) <= 1e-9


def test_every_group_of_the_packaged_model(smollm_small: Any) -> None:
    given = {"input_ids": torch.randint(0, 1000, (2, 8)), "use_cache": False}
    program = capture_model(smollm_small, (), given)
    groups = find_channel_groups(program)
    inputs = program.flatten_inputs((), given)
    attention, mlp = groups.groups[:2]
    assert check_group(program, groups, attention, torch.tensor([1]), inputs) <= 1e-9
    assert check_group(program, groups, mlp, torch.randperm(1536)[:400], inputs) <= 1e-9
    assert check_kept(program, groups, some(groups), inputs) <= 1e-9


class Densely(nn.Module):
    """Every layer reads all earlier ones, concatenated; norms and a classifier read them all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        widths = (6, 10, 14)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.layers = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1) for width in widths)
        self.transition = nn.Conv2d(18, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            found.append(layer(norm(torch.cat(found, 1)).relu()))
        return self.head(self.transition(torch.cat(found, 1)).mean((2, 3)))


def test_every_layer_of_a_densely_connected_network_is_a_group() -> None:
    x = torch.randn(2, 3, 8, 8)
    program = capture_model(Densely().eval(), (x,))
    groups = find_channel_groups(program)
    assert [group.units for group in groups] == [6, 4, 4, 4, 8]
    stem = {member.name for member in groups.groups[0].members}
    assert {"norms.0.running_var", "norms.2.bias", "layers.2.weight", "transition.weight"} <= stem
    assert max(check_groups(program, groups, [x]).values()) <= 1e-9


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.one(x)))


def test_the_oracle_refuses_a_dimension_that_a_norm_sees() -> None:
    x = torch.randn(3, 6)
    program = capture_model(Normed(), (x,))
    groups = find_channel_groups(program)
    (wrong,) = [group for group in groups.frozen if "layer_norm" in group.frozen]
    thawed = replace(wrong, frozen="")
    overruled = replace(groups, groups=(thawed,), frozen=())
    # The size the norm expects is no longer that of its input, unless it is told, too.
    with pytest.raises((VerificationError, RuntimeError)):
        check_group(program, overruled, thawed, torch.tensor([3]), [x])


class Summed(nn.Module):
    """The sum over units is not zero where they are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).sigmoid()
        return self.two(y) * y.sum(-1, keepdim=True)


def test_the_oracle_notices_what_masking_leaves_behind() -> None:
    x = torch.randn(3, 6)
    program = capture_model(Summed(), (x,))
    groups = find_channel_groups(program)
    (wrong,) = [group for group in groups.frozen if "aten::sum" in group.frozen]
    thawed = replace(wrong, frozen="")
    with pytest.raises(VerificationError, match=r"one\.weight:0 changes output 0"):
        check_group(program, replace(groups, groups=(thawed,), frozen=()), thawed, torch.tensor([3]), [x])


class Folded(nn.Module):
    """Heads folded into the batch, so that a cut size is part of a symbolic one; pieces of unequal groups."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 36), nn.Linear(12, 8)
        self.fused, self.one, self.two = nn.Linear(8, 20), nn.Linear(10, 8), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (
            t.view(b, s, 3, 4).transpose(1, 2).reshape(b * 3, s, 4) for t in self.qkv(x).split(12, dim=-1)
        )
        mixed = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 2, -1), v)
        x = x + self.out(mixed.view(b, 3, s, 4).transpose(1, 2).reshape(b, s, 12))
        left, right = self.fused(x).chunk(2, -1)
        return x + self.one(left.relu()) + self.two(right.relu())


def test_symbolic_sizes_and_unequal_pieces_are_rewritten() -> None:
    x = torch.randn(2, 5, 8)
    program = capture_model(Folded(), (x,))
    groups = find_channel_groups(program)
    assert [(group.kind, group.units) for group in groups] == [
        ("heads", 3),
        ("channels", 10),
        ("channels", 10),
    ]
    names = [group.name for group in groups]
    assert names[1:] == ["fused.weight:0", "fused.weight:0#2"]
    kept = dict(zip(names, (torch.tensor([0, 2]), torch.arange(7), torch.tensor([1, 5])), strict=True))
    assert check_kept(program, groups, kept, [x]) <= 1e-9
    small = cut_program(program, groups, kept)
    assert small.weights["fused.weight"].shape == (9, 8)
    assert small.weights["qkv.weight"].shape == (24, 8)
    other = torch.randn(3, 9, 8)  # still dynamic
    masked = program.run_flat([other], mask_weights(program, groups, kept))[0]
    torch.testing.assert_close(small.run_flat([other])[0], masked)


class Recorder(fx.Interpreter):
    """Compares the type of every value with the value."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        expected = n.meta.get("val")
        if isinstance(value, Tensor):
            assert isinstance(expected, Tensor)
            assert value.dtype == expected.dtype
            for size, typed in zip(value.shape, expected.shape, strict=True):
                assert isinstance(typed, torch.SymInt) or typed == size, f"{n.format_node()}"
        return value


@pytest.mark.parametrize("name", ["llama", "unet", "gpt-bigcode"])
def test_a_cut_program_has_the_types_of_its_values(name: str) -> None:
    program, groups, inputs = analysed(entry(name))
    before = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    small = cut_program(program, groups, some(groups))
    values = dict(zip(small.inputs, inputs, strict=True))
    call = [
        small.weights[small.weight_of[node.name]] if node.name in small.weight_of else values[node.name]
        for node in small.placeholders()
    ]
    with torch.no_grad():
        Recorder(small.graph_module).run(*call)
    for node in program.graph.nodes:  # the original is as it was
        if node.op == "placeholder":
            assert node.meta["val"] is before[node.name]


def test_bad_choices_are_refused() -> None:
    x = torch.randn(3, 20)
    program = capture_model(entry("matmul-forms").build(), (x,))
    groups = find_channel_groups(program)
    (name, *_) = [group.name for group in groups]
    frozen = groups.frozen[0].name
    for kept, message in (
        ({name: torch.tensor([], dtype=torch.int64)}, "every unit would be removed"),
        ({name: torch.tensor([0, 99])}, "numbers below"),
        ({name: torch.tensor([3, 1])}, "ascending"),
        ({name: torch.tensor([1, 1])}, "each once"),
        ({"nowhere": torch.tensor([1])}, "no channel group 'nowhere'"),
        ({frozen: torch.tensor([1])}, "cannot be cut"),
    ):
        with pytest.raises(WeightError, match=message):
            cut_program(program, groups, kept)
