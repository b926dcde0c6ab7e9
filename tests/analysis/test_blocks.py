"""Blocks: found by structure, complete, consecutive, isomorphic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxcompress.analysis.blocks import find_blocks
from fxcompress.capture import capture_model
from tests.zoo import SMOKE, ZooEntry, entry


@pytest.mark.parametrize("animal", SMOKE, ids=lambda animal: animal.name)
def test_blocks_cover_the_graph_in_order(animal: ZooEntry) -> None:
    program = capture_model(animal.build(), (), animal.inputs())
    blocks = find_blocks(program.graph)
    nodes = [node for block in blocks for node in block.nodes]
    skipped = ("placeholder", "output", "get_attr")
    assert nodes == [node for node in program.graph.nodes if node.op not in skipped]
    defined: set[torch.fx.Node] = set()
    for block in blocks:
        members = set(block.nodes)
        for node in block.inputs:
            assert node in defined or node.op in ("placeholder", "get_attr")
        defined |= members


@pytest.mark.parametrize(
    ("name", "layers"), [("gpt2-odd", 3), ("llama-tied-odd", 3), ("gpt-neox", 2), ("bert", 2)]
)
def test_layers_become_blocks_of_one_structure(name: str, layers: int) -> None:
    program = capture_model(entry(name).build(), (), entry(name).inputs())
    repeated = [block for block in find_blocks(program.graph) if block.name.startswith("block")]
    assert len(repeated) == layers
    assert len({block.structure for block in repeated}) == 1
    assert all(len(block.outputs) == 1 for block in repeated)


def test_without_repetition_the_graph_is_one_block() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 2)).eval()
    (block,) = find_blocks(capture_model(model, (torch.randn(3, 4),)).graph)
    assert block.name == "whole graph"


def test_different_constants_are_different_structures() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.first, self.second, self.factor = nn.Linear(8, 8), nn.Linear(8, 8), factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.second(torch.relu(self.first(x)).mul(self.factor).sin())

    same = nn.Sequential(*(Scaled(0.5) for _ in range(4))).eval()
    mixed = nn.Sequential(Scaled(0.5), Scaled(0.5), Scaled(0.25), Scaled(0.25)).eval()
    x = torch.randn(3, 8)
    names = [[b.name for b in find_blocks(capture_model(model, (x,)).graph)] for model in (same, mixed)]
    assert sum(name.startswith("block") for name in names[0]) == 4
    structures = {b.structure for b in find_blocks(capture_model(mixed, (x,)).graph)}
    assert len(structures) >= 2
