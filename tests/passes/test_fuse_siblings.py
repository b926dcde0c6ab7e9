from __future__ import annotations

import dataclasses

import torch

from fxcompress.edits import FuseSites
from fxcompress.forms import Scale
from fxcompress.passes import FuseSiblings, QuantizeActivations, QuantizeWeights
from tests.passes.models import Attention, Language, Products
from tests.passes.one_block import OneBlock, block_of, refusals

QKV = ("q.weight", "k.weight", "v.weight")
PAIR = ("gate.weight", "up.weight")


def attention() -> OneBlock:
    return block_of(Attention(), (torch.randn(2, 5, 20),), (torch.randn(1, 4, 20),))


def fused(block: OneBlock) -> list[tuple[str, ...]]:
    return [edit.names for edit in block.run(FuseSiblings()) if isinstance(edit, FuseSites)]


def test_structure_siblings_are_found_by_their_input() -> None:
    block = attention()
    block.run(QuantizeWeights(bits=4, group_size=8))
    edits = block.run(FuseSiblings())
    assert [edit.names for edit in edits if isinstance(edit, FuseSites)] == [QKV, PAIR]
    assert refusals(edits) == {}
    assert block.state.fused == [QKV, PAIR]


def test_numerics_are_untouched_and_rows_of_a_joint_product_agree() -> None:
    block = attention()
    block.run(QuantizeWeights())
    before = {name: block.state.effective(name) for name in QKV}
    fused(block)
    x = torch.randn(7, 20)
    joint = x @ torch.cat([block.state.effective(name) for name in QKV]).T
    for part, name in zip(joint.split(20, dim=1), QKV, strict=True):
        torch.testing.assert_close(block.state.effective(name), before[name], rtol=0, atol=0)
        torch.testing.assert_close(part, x @ before[name].T)


def test_second_run_changes_nothing() -> None:
    block = attention()
    block.run(QuantizeWeights())
    fused(block)
    assert block.run(FuseSiblings()) == []


def test_static_grids_of_siblings_are_equal_so_they_fuse() -> None:
    block = attention()
    block.run(QuantizeWeights())
    block.run(QuantizeActivations(mode="static"))
    assert fused(block) == [QKV, PAIR]


def test_different_formats_are_fused_apart() -> None:
    block = attention()
    block.run(QuantizeWeights(bits=4, group_size=8, include=("q.*", "k.*", "gate.*")))
    block.run(QuantizeWeights(bits=8, only_remaining=True))
    edits = block.run(FuseSiblings())
    assert [edit.names for edit in edits if isinstance(edit, FuseSites)] == [QKV[:2]]
    reason = "not fused with its siblings: none has the same number format"
    assert refusals(edits) == dict.fromkeys(("v.weight", "gate.weight", "up.weight"), reason)


def test_different_activation_quantizers_are_fused_apart() -> None:
    block = attention()
    block.run(QuantizeWeights())
    block.run(QuantizeActivations(include=("q.*", "gate.*", "up.*")))
    assert fused(block) == [QKV[1:], PAIR]
    other = attention()
    other.run(QuantizeWeights())
    other.run(QuantizeActivations(include=("gate.*",)))
    other.run(QuantizeActivations(bits=7, include=("up.*",)))
    assert fused(other) == [QKV]


def test_refusals_say_why() -> None:
    block = attention()
    block.run(QuantizeWeights(exclude=("v.*",)))
    form = block.state.form("up.weight")
    block.state.forms["up.weight"] = dataclasses.replace(form, transform_in=(Scale(torch.ones(20)),))
    reasons = refusals(block.run(FuseSiblings(exclude=("k.*",))))
    prefix = "not fused with its siblings: "
    assert reasons == {
        "k.weight": prefix + "excluded by 'k.*'",
        "v.weight": prefix + "its weight is not quantized",
        "q.weight": prefix + "none has the same number format",
        "up.weight": prefix + "none has the same number format",
        "gate.weight": prefix + "none has the same number format",
    }


def test_siblings_with_equal_input_transforms_are_fused() -> None:
    block = attention()
    block.run(QuantizeWeights())
    for name in ("gate.weight", "up.weight"):
        transform = (Scale(torch.full((20,), 2.0)),)
        block.state.forms[name] = dataclasses.replace(block.state.form(name), transform_in=transform)
    assert fused(block) == [QKV, PAIR]


def test_scales_per_matrix_and_shared_weights_stay_alone() -> None:
    block = attention()
    block.run(QuantizeWeights(bits=8, group_size=-1))
    assert "one scale per matrix" in refusals(block.run(FuseSiblings()))["q.weight"]
    shared = block_of(Language(tied=True), (torch.arange(12).reshape(2, 6),))
    shared.run(QuantizeWeights())
    edits = shared.run(FuseSiblings())
    assert refusals(edits) == {
        "layer.k.weight": "not fused with its siblings: the weight is used at several places"
    }


def test_only_plain_linear_products_are_siblings() -> None:
    block = block_of(Products(), (torch.randn(2, 5, 20),))
    block.run(QuantizeWeights())
    assert block.run(FuseSiblings()) == []
