"""A parameter that owns a mask: what may happen to it, and what is counted in the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fxcompress.calibration import as_calibration
from fxcompress.edits import CompressionState, Edit, Repack, SetMask, SetTensor, SetWeight
from fxcompress.errors import FormatError, RecipeError, VerificationError, WeightError
from fxcompress.formats import IntFormat, quantize_to_term
from fxcompress.forms import SparsityMask, WeightLayout
from fxcompress.manager import run_recipe
from fxcompress.pass_base import BlockContext, Pass
from fxcompress.recipe import Recipe
from fxcompress.report import Report
from fxcompress.sparsity import check_masks
from tests.engine.models import capture, tokens

KEEP = torch.tensor([[True, False, True, False], [False, True, False, True]])
WEIGHT = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])


def state() -> CompressionState:
    held = CompressionState({"w": WEIGHT.clone()})
    held.apply(SetMask("w", WEIGHT * KEEP, SparsityMask(KEEP, (0, 1), 0, 1, 2, 4)), "wanda")
    return held


def codes(value: Tensor, *, symmetric: bool) -> SetWeight:
    term = quantize_to_term(value, WeightLayout.rows(value.shape), IntFormat(4, symmetric, 0))
    return SetWeight("w", (term,))


def test_what_was_pruned_is_remembered_until_the_weight_changes() -> None:
    held = state()
    assert torch.equal(held.unpruned["w"], WEIGHT)
    assert torch.equal(held.copy().masks["w"].keep, KEEP)
    held.apply(SetTensor("w", WEIGHT * KEEP * 2), "awq")
    assert "w" not in held.unpruned
    assert check_masks(held) == {"w": 4}


def test_a_dense_edit_that_fills_zeros_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="w: would fill 4 of the 4 entries that wanda pruned"):
        state().apply(SetTensor("w", WEIGHT), "merge")


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_must_stand_for_zero_exactly(symmetric: bool) -> None:
    held = state()
    with pytest.raises(RecipeError, match="entries that wanda pruned"):
        held.apply(codes(WEIGHT, symmetric=symmetric), "gptq")
    held.apply(codes(WEIGHT * KEEP, symmetric=symmetric), "gptq")
    assert check_masks(held) == {"w": 4}


@pytest.mark.parametrize(
    ("value", "keep", "message"),
    [
        (WEIGHT, KEEP, "4 entries are masked and not zero"),
        (WEIGHT[:1] * KEEP[:1], KEEP[:1], "replacement is"),
        (WEIGHT * KEEP, KEEP[:1], "mask has shape"),
        (torch.full_like(WEIGHT, torch.nan), KEEP, "NaN or inf"),
    ],
)
def test_masks_that_do_not_fit_are_refused(value: Tensor, keep: Tensor, message: str) -> None:
    held = CompressionState({"w": WEIGHT})
    with pytest.raises(WeightError, match=message):
        held.apply(SetMask("w", value, SparsityMask(keep, (0, 1))), "wanda")


def test_a_mask_never_gains_entries_nor_loses_its_pattern() -> None:
    held = state()
    more = KEEP.clone()
    more[0, 1] = True
    with pytest.raises(RecipeError, match="a mask of 3 zeros would replace one of 4"):
        held.apply(SetMask("w", WEIGHT * more, SparsityMask(more, (0, 1))), "dsnot")
    uneven = torch.tensor([[True, True, True, False], [False, False, False, True]])
    with pytest.raises(RecipeError, match="does not keep the 2:4 pattern"):
        held.apply(SetMask("w", WEIGHT * uneven, SparsityMask(uneven, (0, 1))), "dsnot")
    swapped = ~KEEP
    held.apply(SetMask("w", WEIGHT * swapped, SparsityMask(swapped, (0, 1), 0, 1, 2, 4)), "dsnot")
    assert torch.equal(held.weight("w"), WEIGHT * swapped)


def test_a_pattern_that_is_none_is_refused() -> None:
    for n, m in ((4, 2), (4, 4), (0, 4)):
        with pytest.raises(FormatError, match="expected 0 < n < m"):
            SparsityMask(KEEP, (0, 1), 0, 1, n, m)
    with pytest.raises(FormatError, match="2 groups of 4 inputs keep more than 1"):
        SparsityMask(KEEP, (0, 1), 0, 1, 1, 4)
    with pytest.raises(FormatError, match=r"expected torch\.bool"):
        SparsityMask(WEIGHT, (0, 1))


def test_repacking_must_keep_the_value() -> None:
    with pytest.raises(WeightError, match="must keep the value"):
        state().apply(Repack("w", codes(WEIGHT * KEEP / 3, symmetric=True).terms), "pack-sparse")


def test_a_broken_mask_is_found_in_the_end() -> None:
    held = state()
    held.tensors["w"] = WEIGHT
    with pytest.raises(VerificationError, match=r"w: its mask \(2:4\) is broken: 4 of 4"):
        check_masks(held)


@dataclass(frozen=True)
class Densify(Pass):
    """Adds to every weight, as merging an adapter would."""

    name: ClassVar[str] = "densify"

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        for site in block.sites:
            if site.name in block.state.masks:
                yield SetTensor(site.name, block.weight(site.name) + 1)


def test_a_run_refuses_to_fill_zeros_and_names_both_passes() -> None:
    from fxcompress.passes.prune_magnitude import PruneMagnitude

    with pytest.raises(RecipeError, match=r"pass 'densify'.*would fill 256 of the 256.*prune-magnitude"):
        run_recipe(capture(), Recipe((PruneMagnitude(), Densify())), verify="off")


def test_the_report_counts_zeros_and_says_how_they_are_stored(tmp_path: object) -> None:
    program = capture()
    data = as_calibration([{"input_ids": tokens()}], program)
    report = run_recipe(program, [{"prune-magnitude": {"pattern": "2:4"}}], data).report
    rows = {row.name: row for row in report.rows if row.zeros is not None}
    assert len(rows) == 6
    row = rows["layers.1.down.weight"]
    assert (row.form, row.zeros, row.bytes_after) == ("2:4, stored dense", 256, row.bytes_before)
    assert row.error is not None
    assert row.error > 0
    check = report.checks[-1]
    assert (check["check"], check["zeros"], check["of"]) == ("zeros of pruned weights", 1536, 3072)
    assert Report.from_dict(report.to_dict()).rows == report.rows


def test_a_stopped_run_goes_on_with_its_masks(tmp_path: object) -> None:
    recipe = [{"prune-magnitude": {"scope": "global"}}, "pack-sparse"]
    folder = str(tmp_path)
    first = run_recipe(capture(), recipe, verify="off", checkpoint=folder)
    again = run_recipe(capture(), recipe, verify="off", checkpoint=folder)
    assert again.report.to_dict() == first.report.to_dict()
    for name, mask in first.state.masks.items():
        assert again.state.masks[name].same_as(mask)
        assert all(
            a.same_as(b)
            for a, b in zip(first.state.forms[name].terms, again.state.forms[name].terms, strict=True)
        )
