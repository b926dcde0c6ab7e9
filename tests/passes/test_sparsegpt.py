"""SparseGPT as a pass: stages, convolutions and experts, joint rounding, the real model's first blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxcompress.calibration import as_calibration
from fxcompress.capture import capture_model
from fxcompress.edits import SetMask, SetWeight
from fxcompress.errors import RecipeError
from fxcompress.forms import QuantizedWeight
from fxcompress.manager import run_recipe
from fxcompress.passes._pruning import zeros_of
from fxcompress.passes.sparsegpt import SparseGpt
from tests.passes.models import Attention, Convolutions, Experts
from tests.passes.one_block import block_of, refusals


def test_counts_and_stages() -> None:
    block = block_of(Attention(), (torch.randn(2, 30, 20),))
    block.run(SparseGpt(sparsity=0.45))
    assert len(block.state.masks) == 7
    for mask in block.state.masks.values():
        assert mask.pruned == zeros_of(0.45, mask.keep.numel())
    assert len(block.asked) == 4  # q k v, o, gate up, down
    once = block_of(Attention(), (torch.randn(2, 30, 20),))
    once.run(SparseGpt(sparsity=0.45, sequential="block"))
    assert len(once.asked) == 1


def test_it_loses_less_than_the_same_mask_without_updates() -> None:
    x = torch.randn(4, 40, 20) @ torch.randn(20, 20)
    block = block_of(Attention(), (x,))
    edits = [e for e in block.run(SparseGpt(sparsity=0.5)) if isinstance(e, SetMask)]
    q = next(e for e in edits if e.name == "q.weight")
    rows, old = x.reshape(-1, 20), block.program.weights["q.weight"].detach()
    plain = (rows @ (old - old * q.mask.keep).T).square().sum()
    mine = (rows @ (old - q.value).T).square().sum()
    assert mine < plain
    assert q.error == pytest.approx(float((mine / (rows @ old.T).square().sum()).sqrt()), rel=1e-3)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Convolutions(), (torch.randn(2, 3, 8, 8),)),
        (Experts(), (torch.randn(8, 16), torch.tensor([2, 5, 8], dtype=torch.int32))),
    ],
)
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4", "padding": True}])
def test_convolutions_and_experts(model: Any, inputs: Any, options: dict[str, Any]) -> None:
    block = block_of(model, inputs)
    edits = block.run(SparseGpt(**options))
    assert block.state.masks
    assert not refusals(edits)
    for name, mask in block.state.masks.items():
        assert mask.broken_by(block.state.weight(name)) == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_joint_rounding_gives_codes_that_are_zero_where_pruned(symmetric: bool) -> None:
    block = block_of(Attention(), (torch.randn(2, 30, 20),))
    method = SparseGpt(pattern="2:4", bits=4, group_size=8, symmetric=symmetric)
    edits = block.run(method)
    assert len([edit for edit in edits if isinstance(edit, SetWeight)]) == 7
    for name, mask in block.state.masks.items():
        term = block.state.form(name).terms[0]
        assert isinstance(term, QuantizedWeight)
        assert mask.broken_by(term.dense(torch.float64)) == 0
    assert method.matrix_format() == method.format


def test_the_real_model(smollm_small: Any, smollm_tokenizer: Any) -> None:
    """On real weights and text: exact counts, and less lost than by magnitude."""
    text = "Pruning removes weights. What remains has to make up for it, as far as it can. " * 6
    ids = smollm_tokenizer(text, return_tensors="pt").input_ids[:, :64]
    small = smollm_small.eval()
    program = capture_model(small, (), {"input_ids": ids.repeat(2, 1), "use_cache": False})
    data = as_calibration([{"input_ids": ids, "use_cache": False}], program)
    keep_first = {"include": ["*layers.0.*"]}
    found = {}
    for name in ("sparsegpt", "prune-magnitude"):
        report = run_recipe(program, [{name: {"pattern": "2:4", **keep_first}}], data).report
        found[name] = report
        assert report.checks[-1]["zeros"] >= report.checks[-1]["of"] // 2  # the weights had a few zeros
        assert report.checks[-1]["weights"] == 7
    assert found["sparsegpt"].kl < found["prune-magnitude"].kl


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1}, "damping=-1, expected a number from 0"),
        ({"block_columns": 0}, "expected a positive integer"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 4, "group_size": -1}, "one scale per matrix is not supported"),
        ({"bits": 4, "group_size": 6, "pattern": "2:4"}, "no multiple of the 4 inputs"),
        ({"symmetric": 0}, "expected true or false"),
        ({"sequential": ""}, "expected 'block' or 'stage'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as raised:
        SparseGpt(**options)
    assert isinstance(raised.value, RecipeError) or "IntFormat" in str(raised.value)
