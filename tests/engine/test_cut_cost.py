"""What a cut would cost, counted without cutting, against the cut program."""

from __future__ import annotations

import pytest
import torch

from fxcompress.analysis.channel_groups import find_channel_groups
from fxcompress.calibration.plan import Plan
from fxcompress.capture.export import capture_model
from fxcompress.structure.cost import cost_of
from fxcompress.structure.cut_cost import CutCost
from fxcompress.structure.cut_program import cut_program
from tests.engine.models import WIDTH, decoder
from tests.zoo import entry

NAMES = ("llama-tied-odd", "gpt2-odd", "gpt-neox", "bert", "vit", "convnext", "resnet", "unet", "mixtral")


@pytest.mark.parametrize("name", NAMES)
def test_predicted_costs_are_those_of_the_cut_program(name: str) -> None:
    animal = entry(name)
    program = capture_model(animal.build(), kwargs={**animal.inputs(2, 8), **animal.options})
    groups = find_channel_groups(program)
    plan = Plan(program)
    cost = CutCost(program, plan.blocks, groups)
    assert cost.of({}) == cost_of(program, plan.blocks)
    generator = torch.Generator().manual_seed(0)
    kept = {
        group.name: torch.arange(int(torch.randint(group.least, group.units, (), generator=generator)))
        for group in groups
        if group.units > 1
    }
    assert kept
    cut = cost_of(cut_program(program, groups, kept))
    found = cost.of({group: units.numel() for group, units in kept.items()})
    assert (found.parameters, found.flops, found.bytes) == (cut.parameters, cut.flops, cut.bytes)
    assert sum(row[1] for row in found.blocks) == found.flops
    assert found.flops < cost.of({}).flops


def test_a_decoding_step_reads_the_experts_that_are_chosen() -> None:
    """Two of four experts per token: one that goes is not read, and was not; it counts for a long prompt."""
    program = capture_model(entry("mixtral").build(), kwargs=entry("mixtral").inputs(2, 8))
    groups = find_channel_groups(program)
    cost = CutCost(program, Plan(program).blocks, groups)
    fewer = {group.name: 3 for group in groups if group.kind == "experts"}
    row = 4.0 * 64 * 4.0 * len(fewer)  # the router's row, float32, at 4 operations per byte
    assert cost.latency({}, 1, 4.0) - cost.latency(fewer, 1, 4.0) == pytest.approx(row)
    assert cost.latency({}, 4, 1e3) - cost.latency(fewer, 4, 1e3) > 100 * row
    assert cost.of(fewer).flops == cost.of({}).flops - len(fewer) * 2 * 16 * 64


def test_latency_follows_bytes_when_decoding_and_operations_in_prefill() -> None:
    program = decoder()
    groups = find_channel_groups(program)
    cost = CutCost(program, Plan(program).blocks, groups)
    kept = {group.name: WIDTH for group in groups}  # half of every layer's hidden channels
    whole, cut = cost.of({}), cost.of(kept)
    prefill = cost.latency(kept, 10_000, 4.0) / cost.latency({}, 10_000, 4.0)
    assert prefill == pytest.approx(cut.flops / whole.flops)
    matrices = 3 * 2 * 2 * WIDTH * WIDTH
    head = WIDTH * 40
    decode = cost.latency(kept, 1, 4.0) / cost.latency({}, 1, 4.0)
    assert decode == pytest.approx((matrices / 2 + head) / (matrices + head))
