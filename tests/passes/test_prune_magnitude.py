"""Magnitude pruning: exact counts, ties, scopes, patterns on every kind of weight, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.edits import SetMask, SetSensitivity
from fxcompress.errors import RecipeError
from fxcompress.passes._pruning import keep_groups, keep_highest, zeros_of
from fxcompress.passes.prune_magnitude import PruneMagnitude, smallest_counts
from tests.passes.models import Autoencoder, Convolutions, Experts, Language, Products
from tests.passes.one_block import block_of, refusals

IDS = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))


def masks(edits: list[Any]) -> dict[str, SetMask]:
    return {edit.name: edit for edit in edits if isinstance(edit, SetMask)}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]), st.booleans())
def test_counts_are_exact_and_ties_go_in_order(rows: int, columns: int, share: float, equal: bool) -> None:
    scores = torch.ones(rows, columns) if equal else torch.rand(rows, columns)
    keep = keep_highest(scores, share)
    gone = zeros_of(share, columns)
    assert gone == int(round(share * 10) * columns // 10)
    assert bool(((~keep).sum(-1) == gone).all())
    if equal:
        assert not bool(keep[:, :gone].any())


def test_groups_of_any_size_and_a_short_last_one() -> None:
    scores = torch.tensor([[4.0, 1, 3, 2, 9, 8]])
    assert keep_groups(scores, 2, 4).tolist() == [[True, False, True, False, True, True]]
    assert keep_groups(scores, 1, 4).tolist() == [[True, False, False, False, True, False]]
    assert keep_groups(torch.ones(1, 4), 2, 4).tolist() == [[False, False, True, True]]


def test_the_smallest_of_every_weight_go() -> None:
    block = block_of(Language(tied=False), (IDS,))
    edits = block.run(PruneMagnitude(sparsity=0.3))
    found = masks(edits)
    assert set(refusals(edits)) == {"table.weight", "head.weight"}
    assert len(found) == 7
    for name, edit in found.items():
        before, after = block.program.weights[name], block.state.weight(name)
        gone = zeros_of(0.3, before.numel())
        threshold = before.abs().flatten().sort().values[gone]
        assert torch.equal(after, before.masked_fill(before.abs() < threshold, 0))
        assert edit.mask.pruned == gone


def test_one_threshold_for_all() -> None:
    block = block_of(Language(tied=False), (IDS,))
    edits = block.run(PruneMagnitude(sparsity=0.37, scope="global"))
    names = list(masks(edits))
    joined = torch.cat([block.program.weights[name].detach().flatten() for name in names])
    gone = zeros_of(0.37, joined.numel())
    pruned = torch.cat([block.state.weight(name).flatten() for name in names])
    assert int((pruned == 0).sum()) == gone
    assert float(joined[pruned == 0].abs().max()) <= float(joined[pruned != 0].abs().min())
    assert len([edit for edit in edits if isinstance(edit, SetSensitivity)]) == len(names)


def test_ties_at_the_threshold_are_counted_once() -> None:
    weights = [torch.tensor([1.0, 2, 2]), torch.tensor([2.0, 3]), torch.tensor([2.0])]
    assert smallest_counts(weights, 0.5) == [3, 0, 0]
    assert smallest_counts(weights, 0.67) == [3, 1, 0]
    assert smallest_counts(weights, 0.1) == [0, 0, 0]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:2"])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Convolutions(), (torch.randn(2, 3, 8, 8),)),
        (Products(), (torch.randn(2, 4, 20),)),
        (Experts(), (torch.randn(8, 16), torch.tensor([2, 5, 8], dtype=torch.int32))),
    ],
)
def test_patterns_on_convolutions_products_and_experts(model: nn.Module, inputs: Any, pattern: str) -> None:
    block = block_of(model, inputs)
    edits = block.run(PruneMagnitude(pattern=pattern, padding=True))
    n, m = map(int, pattern.split(":"))
    found = masks(edits)
    assert found
    for name, edit in found.items():
        kept = nn.functional.pad(edit.mask.matrix, (0, -edit.mask.matrix.shape[-1] % m)).unflatten(
            -1, (-1, m)
        )
        assert int(kept.sum(-1).max()) == n, name


def test_inputs_that_do_not_divide_are_left_alone_without_padding() -> None:
    block = block_of(Convolutions(), (torch.randn(2, 3, 8, 8),))
    left = refusals(block.run(PruneMagnitude(pattern="2:4")))
    assert left["plain.weight"] == "its 27 inputs do not divide into groups of 4 (padding=False)"
    with pytest.raises(RecipeError, match=r"'3:7' fits no weight: .* inputs do not divide into groups of 7"):
        block_of(Autoencoder(), (torch.randn(2, 20),)).run(PruneMagnitude(pattern="3:7"))


def test_a_second_run_with_the_same_share_changes_nothing() -> None:
    block = block_of(Language(tied=False), (IDS,))
    block.run(PruneMagnitude(sparsity=0.5))
    before = {name: mask.keep.clone() for name, mask in block.state.masks.items()}
    block.run(PruneMagnitude(sparsity=0.5))
    assert all(torch.equal(block.state.masks[name].keep, keep) for name, keep in before.items())


def test_masks_of_two_passes_intersect() -> None:
    block = block_of(Language(tied=False), (IDS,))
    block.run(PruneMagnitude(pattern="2:4"))
    block.run(PruneMagnitude(sparsity=0.75))
    for name, mask in block.state.masks.items():
        assert mask.pruned == zeros_of(0.75, mask.keep.numel()), name
        assert int(mask.matrix.unflatten(-1, (-1, 4)).sum(-1).max()) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1\.0, expected a share between 0 and 1"),
        ({"sparsity": 0}, "expected a share between 0 and 1"),
        ({"sparsity": True}, "expected a share between 0 and 1"),
        ({"pattern": "4:2"}, "keeps 4 of every 2 inputs, expected 0 < n < m"),
        ({"pattern": "0:4"}, "expected 0 < n < m"),
        ({"pattern": "two"}, 'expected "n:m"'),
        ({"pattern": "2:512"}, "at most 256"),
        ({"pattern": "2:4", "sparsity": 0.7}, "does not apply to pattern"),
        ({"pattern": "2:4", "scope": "global"}, "leaves nothing to scope"),
        ({"scope": "model"}, "expected 'layer' or 'global'"),
        ({"padding": 1}, "expected true or false"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PruneMagnitude(**options)
