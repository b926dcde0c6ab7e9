"""Which permutations fold: groups by structure, proofs in float64 on random permutations within the cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis.permutation import PermutationGroup, find_permutation_group
from fxcompress.analysis.sites import find_sites
from fxcompress.capture import capture_model
from fxcompress.errors import WeightError


class TwoLayers(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 12), nn.Linear(12, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x)))


class Gated(nn.Module):
    """A gated unit with a gain on its product; fused: gate and up are one matrix, cut in two."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.gate_up = nn.Linear(6, 24) if fused else None
        self.gate, self.up = (nn.Linear(6, 12), nn.Linear(6, 12)) if not fused else (None, None)
        self.gain = nn.Parameter(torch.randn(12))
        self.down = nn.Linear(12, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up is not None:
            gate, up = self.gate_up(x).chunk(2, -1)
        else:
            assert self.gate is not None
            assert self.up is not None
            gate, up = self.gate(x), self.up(x)
        return x + self.down(F.silu(gate) * up * (1 + self.gain))


class Heads(nn.Module):
    """Attention with fewer value heads than query heads, written in three ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(8, 12)
        self.o = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 4, 6).transpose(1, 2)
        k, v = (p(x).view(b, s, 2, 6).transpose(1, 2) for p in (self.k, self.v))
        if self.how == "gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (t[:, :, None].expand(b, 2, 2, s, 6).reshape(b, 4, s, 6) for t in (k, v))
            if self.how == "matmul":
                y = torch.softmax(q @ k.transpose(-1, -2) / 6**0.5, -1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, s, 24))


def search(model: nn.Module, name: str, *inputs: Tensor) -> tuple[Any, PermutationGroup | str]:
    program = capture_model(model.double().eval(), inputs)
    by_node: dict[Any, list[Any]] = {}
    for site in find_sites(program):
        by_node.setdefault(site.node, []).append(site)
    site = next(s for found in by_node.values() for s in found if s.name == name)
    return program, find_permutation_group(program, site, by_node)


def random_target(group: PermutationGroup) -> Tensor:
    target = torch.arange(group.cells.numel())
    for cell in group.cells[group.classes].unique().tolist():
        members = group.classes[group.cells[group.classes] == cell]
        target[members] = members[torch.randperm(members.numel())]
    return target


def prove(program: Any, group: PermutationGroup, *inputs: Tensor) -> set[str]:
    """Permute at random; the function stays, and what changed is returned."""
    target = random_target(group)
    assert not torch.equal(target, torch.arange(target.numel()))
    edits = {edit.name: edit.value for edit in group.edits(target, lambda name: program.weights[name])}
    before, after = program.run_flat(inputs)[0], program.run_flat(inputs, edits)[0]
    assert float((after - before).abs().max() / before.abs().max()) < 1e-12
    for name, value in edits.items():
        assert value.shape == program.weights[name].shape
        assert torch.equal(
            value.flatten().sort().values, program.weights[name].detach().flatten().sort().values
        )
    return {name for name, value in edits.items() if not torch.equal(value, program.weights[name])}


X = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("between", [F.gelu, F.relu, torch.tanh, lambda x: x.clamp(-1, 1) * 3 + 1])
def test_any_element_wise_op_lies_between(between: Any) -> None:
    program, group = search(TwoLayers(between), "two.weight", X)
    assert isinstance(group, PermutationGroup)
    assert len(group.classes) == 12
    assert group.cells.unique().numel() == 1
    assert prove(program, group, X) == {"one.weight", "one.bias", "two.weight"}


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: torch.softmax(x, -1), "aten::softmax"),
        (lambda x: F.layer_norm(x, (12,)), "aten::layer_norm"),
        (lambda x: x + x.mean(-1, keepdim=True), "aten::mean"),
        (lambda x: x * torch.arange(12.0, dtype=x.dtype), "aten::arange"),
        (lambda x: x.flip(-1), "aten::flip"),
        (lambda x: x.roll(1, 1), "aten::roll"),
    ],
)
def test_what_mixes_channels_is_named(between: Any, reason: str) -> None:
    _, found = search(TwoLayers(between), "two.weight", X)
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize("fused", [False, True])
def test_both_branches_of_a_gated_unit_move_along(fused: bool) -> None:
    program, group = search(Gated(fused), "down.weight", X)
    assert isinstance(group, PermutationGroup)
    changed = prove(program, group, X)
    branches = {"gate_up"} if fused else {"gate", "up"}
    assert changed == {"gain", "down.weight"} | {f"{b}.{p}" for b in branches for p in ("weight", "bias")}


@pytest.mark.parametrize("how", ["gqa", "expand", "matmul"])
def test_channels_of_values_stay_in_their_head(how: str) -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    program, group = search(Heads(how), "o.weight", x)
    assert isinstance(group, PermutationGroup), group
    assert len(group.classes) == 12  # of the 24 columns, every two are copies
    cells = group.cells[group.classes]
    assert [int((cells == cell).sum()) for cell in cells.unique()] == [6, 6]
    assert prove(program, group, x) == {"v.weight", "v.bias", "o.weight"}
    across = torch.arange(group.cells.numel())
    one, other = (group.classes[cells == cell][0] for cell in cells.unique())
    across[one], across[other] = other, one
    with pytest.raises(WeightError, match="within the group's cells"):
        list(group.edits(across, lambda name: program.weights[name]))


def test_queries_and_keys_are_not_permuted() -> None:
    class Rotary(Heads):
        pass

    x = torch.randn(2, 3, 8, dtype=torch.float64)
    program, _ = search(Heads("gqa"), "o.weight", x)
    sites = {site.name: site for site in find_sites(program)}
    by_node = {site.node: [site] for site in sites.values()}
    for name in ("q.weight", "k.weight", "v.weight"):  # their input is the model's own
        found = find_permutation_group(program, sites[name], by_node)
        assert isinstance(found, str)
        assert "outside the block or by no op" in found


def test_a_weight_used_twice_or_another_reader_ends_the_search() -> None:
    class Shared(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.relu(self.one(x))) + self.two(self.one(x + 1))

    class Returned(TwoLayers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            h = self.one(x)
            return self.two(h), h

    _, found = search(Shared(None), "two.weight", X)
    assert isinstance(found, str)
    assert found == "the bias of one.weight is no vector of its own"

    class Twice(Shared):
        def __init__(self) -> None:
            super().__init__(None)
            self.one, self.three = nn.Linear(6, 12, bias=False), nn.Linear(6, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.three(x)) + self.one(x).sum(-1, keepdim=True) + self.two(self.one(x))

    _, found = search(Twice(), "two.weight", X)
    assert isinstance(found, str)
    _, found = search(Returned(None), "two.weight", X)
    assert found == "it is read by the output of the model"
