"""DSnoT: the known swap, invariants on any mask, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.calibration import as_calibration
from fxcompress.edits import SetTensor
from fxcompress.errors import RecipeError
from fxcompress.manager import run_recipe
from fxcompress.passes._pruning import keep_groups, keep_highest
from fxcompress.passes.dsnot import Dsnot, Swapper
from fxcompress.passes.wanda import Wanda
from tests.engine.models import capture, tokens
from tests.passes.models import Attention
from tests.passes.one_block import block_of, refusals


def test_the_known_swap() -> None:
    c = torch.tensor([[1.5, -2, 3, 0.5, -0.2, -0.3]])
    keep = torch.tensor([[True, True, True, True, False, False]])
    one = torch.ones_like(c)
    swapper = Swapper(c, c * keep, keep, one, one, one, 0)
    assert float(swapper.gap) == pytest.approx(-0.5)
    assert swapper.run(1, 0.1, 1.0) == 1
    assert swapper.keep.tolist() == [[True, True, True, False, False, True]]  # grows 5, prunes 3
    assert float(swapper.gap) == pytest.approx(0.3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([0, 4]), st.integers(0, 1 << 16))
def test_gaps_fall_and_counts_stay(rows: int, groups: int, m: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    full = torch.randn(rows, 4 * groups, generator=draw)
    scores = full.abs()
    keep = keep_groups(scores, 2, 4) if m else keep_highest(scores, 0.5)
    now = (full + 0.1 * torch.randn(full.shape, generator=draw)) * keep  # updated, as SparseGPT does
    mean, norm, variance = (torch.rand(full.shape, generator=draw) + 0.1 for _ in range(3))
    mean = mean * torch.randn(full.shape, generator=draw).sign()
    swapper = Swapper(full, now, keep, mean, norm, variance, m)
    before = swapper.gap.abs()
    swapper.run(50, 0.0, 1.0)
    assert bool((swapper.gap.abs() <= before + 1e-5).all())
    assert torch.equal(swapper.keep.sum(1), keep.sum(1))
    if m:
        assert bool((swapper.keep.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    value = torch.where(swapper.keep & keep, now, full) * swapper.keep
    torch.testing.assert_close(((full - value) * mean).sum(1), swapper.gap, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["prune-magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"pattern": "2:4"}])
def test_on_the_mask_of_any_pass(first: str, options: dict[str, Any]) -> None:
    program = capture()
    data = as_calibration([{"input_ids": tokens(seed=s)} for s in range(3)], program)
    before = run_recipe(program, [{first: options}], data, verify="off").state
    after = run_recipe(program, [{first: options}, {"dsnot": {"threshold": 0.01}}], data, verify="off").state
    moved = 0
    for name, mask in before.masks.items():
        new = after.masks[name]
        assert torch.equal(new.matrix.sum(-1), mask.matrix.sum(-1))
        assert (new.n, new.m) == (mask.n, mask.m)
        moved += int((new.keep != mask.keep).sum())
    assert moved


def test_a_weight_edited_since_is_left_alone() -> None:
    block = block_of(Attention(), (torch.randn(2, 6, 20),))
    block.run(Wanda())
    block.state.apply(SetTensor("q.weight", block.weight("q.weight") * 2), "awq")
    assert "edited since it was pruned" in refusals(block.run(Dsnot()))["q.weight"]


def test_it_needs_a_mask_and_sound_options() -> None:
    program = capture()
    data = as_calibration([{"input_ids": tokens()}], program)
    with pytest.raises(RecipeError, match=r"dsnot.*sparse-weights"):
        run_recipe(program, ["dsnot", "wanda"], data)
    for options, message in (({"cycles": 0}, "positive integer"), ({"power": -1.0}, "number from 0")):
        with pytest.raises(RecipeError, match=message):
            Dsnot(**options)  # type: ignore[arg-type]
