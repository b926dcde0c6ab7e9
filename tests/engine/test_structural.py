"""Structural passes in the manager: rounds, commits, proofs, checkpoints, order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fxcompress.calibration.plan import Plan
from fxcompress.edits import KeepUnits, RemoveBlock, SetTensor, SetTransform
from fxcompress.errors import RecipeError, VerificationError
from fxcompress.forms import Scale
from fxcompress.manager import RunResult, run_recipe
from fxcompress.pass_base import ModelContext, Pass, StructuralPass
from fxcompress.recipe import Recipe
from fxcompress.structure.cost import cost_of
from fxcompress.structure.removal import find_removal
from tests.engine.models import VOCABULARY, WIDTH, RoundEverything, calibration, decoder, tokens
from tests.engine.structural import DropBlocks, Halve, KeepFirst

HIDDEN = 2 * WIDTH


def run(recipe: Any, **options: Any) -> RunResult:
    return run_recipe(decoder(), recipe, calibration(decoder(), 2), **options)


def masked_outputs(kept: int, factor: float = 1.0) -> torch.Tensor:
    """The decoder with the hidden channels behind ``kept`` zeroed, columns of ``down`` times ``factor``."""
    weights = {name: tensor.clone() for name, tensor in decoder().weights.items()}
    for layer in range(3):
        weights[f"layers.{layer}.up.weight"][kept:] = 0
        weights[f"layers.{layer}.up.bias"][kept:] = 0
        weights[f"layers.{layer}.down.weight"] *= factor
    return decoder().run(kwargs={"input_ids": tokens()}, weights=weights)


def test_a_cut_is_a_smaller_program_that_computes_the_same() -> None:
    result = run(KeepFirst(kinds=("channels",)))
    shapes = {name: tuple(tensor.shape) for name, tensor in result.program.weights.items()}
    for layer in range(3):
        assert shapes[f"layers.{layer}.up.weight"] == (HIDDEN // 2, WIDTH)
        assert shapes[f"layers.{layer}.up.bias"] == (HIDDEN // 2,)
        assert shapes[f"layers.{layer}.down.weight"] == (WIDTH, HIDDEN // 2)
    found = result.program.run(kwargs={"input_ids": tokens()})
    torch.testing.assert_close(found, masked_outputs(HIDDEN // 2), rtol=1e-5, atol=1e-5)
    (check,) = result.report.checks
    assert check["check"] == "cut equals masked in float64"
    assert check["max_relative_error"] < 1e-12
    assert len(Plan(result.program).blocks) == len(Plan(decoder()).blocks)
    assert not result.state.tensors
    assert not result.state.kept


def test_value_edits_of_the_pass_survive_the_cut() -> None:
    result = run(Halve(kinds=("channels",)))
    found = result.program.run(kwargs={"input_ids": tokens()})
    torch.testing.assert_close(found, masked_outputs(HIDDEN // 2, 2.0), rtol=1e-5, atol=1e-5)


def test_rounds_see_the_model_as_the_one_before_left_it() -> None:
    KeepFirst.chosen.clear()
    result = run(KeepFirst(kinds=("channels",), times=2))
    assert KeepFirst.chosen == [0, 1]
    assert result.program.weights["layers.1.down.weight"].shape == (WIDTH, HIDDEN // 4)
    assert [len(done.change.kept) for done in result.rounds] == [3, 3]
    assert len(result.report.checks) == 2


def test_layers_of_different_widths_stay_blocks() -> None:
    result = run(KeepFirst(kinds=("channels",), fewer=3))
    widths = [result.program.weights[f"layers.{i}.down.weight"].shape[1] for i in range(3)]
    assert widths == [16, 13, 10]
    assert [block.name for block in Plan(result.program).blocks if block.repeated] == [
        "block 1/3",
        "block 2/3",
        "block 3/3",
    ]


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_removed_block_hands_on_what_enters_it(which: tuple[int, ...]) -> None:
    result = run(DropBlocks(which))
    weights = dict(decoder().weights)
    for layer in which:  # a residual block without its last product is the identity
        weights[f"layers.{layer}.down.weight"] = torch.zeros(WIDTH, HIDDEN)
    expected = decoder().run(kwargs={"input_ids": tokens()}, weights=weights)
    torch.testing.assert_close(result.program.run(kwargs={"input_ids": tokens()}), expected)
    left = [layer for layer in range(3) if layer not in which]
    for place, layer in enumerate(left):
        new, old = f"layers.{place}.up.weight", f"layers.{layer}.up.weight"
        assert torch.equal(result.program.weights[new], decoder().weights[old])
    assert f"layers.{len(left)}.up.weight" not in result.program.weights
    removed = [row for row in result.report.rows if row.form == "removed"]
    assert len(removed) == 5 * len(which)
    assert all(row.bytes_after == 0 for row in removed)


def test_cut_then_removed_then_quantized() -> None:
    recipe = [KeepFirst(kinds=("channels",)), DropBlocks((1,)), RoundEverything()]
    result = run(recipe, verify="each")
    assert result.state.forms["layers.1.down.weight"].terms[0].parameter_shape == (WIDTH, HIDDEN // 2)
    row = next(row for row in result.report.rows if row.name == "layers.2.down.weight")
    assert row.shape == (WIDTH, HIDDEN)
    assert row.cut == (WIDTH, HIDDEN // 2)
    assert "int8" in row.form
    assert row.bytes_after < row.bytes_before / 4
    structure = result.report.structure
    assert structure["after"]["block_parameters"] < structure["before"]["block_parameters"] / 2
    assert result.report.relative_error is not None


def test_quantized_models_are_not_cut() -> None:
    with pytest.raises(RecipeError, match="'keep-first' cannot run after 'round-everything'"):
        Recipe([RoundEverything(), KeepFirst()])


def test_forms_that_would_have_to_be_cut_are_refused() -> None:
    @dataclass(frozen=True)
    class Scales(Pass):
        name: ClassVar[str] = "scales"

        def solve(self, block: Any) -> Iterator[Any]:
            if block.index == 1:
                yield SetTransform("layers.0.down.weight", (Scale(torch.ones(HIDDEN)),))

    with pytest.raises(RecipeError, match=r"layers\.0\.down\.weight already has a form by scales"):
        run([Scales(), KeepFirst()])


def stopped(folder: Path, recipe: list[Pass]) -> RunResult:
    return run(recipe, checkpoint=folder)


def test_checkpoints_resume_cuts(tmp_path: Path) -> None:
    recipe: list[Pass] = [KeepFirst(kinds=("channels",), times=2), DropBlocks((0,)), RoundEverything()]
    first = stopped(tmp_path, recipe)
    KeepFirst.chosen.clear()
    RoundEverything.solved.clear()
    second = stopped(tmp_path, recipe)
    assert not KeepFirst.chosen
    assert not RoundEverything.solved
    assert first.program.weights.keys() == second.program.weights.keys()
    assert all(
        torch.equal(first.program.weights[n], second.program.weights[n]) for n in first.program.weights
    )
    for name, form in first.state.forms.items():
        others = second.state.forms[name].tensors()
        assert all(torch.equal(tensor, others[key]) for key, tensor in form.tensors().items())
    assert first.report.to_dict() == second.report.to_dict()


def test_other_amounts_do_not_resume(tmp_path: Path) -> None:
    stopped(tmp_path, [KeepFirst(kinds=("channels",))])
    KeepFirst.chosen.clear()
    result = stopped(tmp_path, [KeepFirst(kinds=("channels",), keep=0.25)])
    assert KeepFirst.chosen == [0]
    assert result.program.weights["layers.0.down.weight"].shape == (WIDTH, HIDDEN // 4)


def choosing(*edits: Any) -> StructuralPass:
    @dataclass(frozen=True)
    class Told(StructuralPass):
        name: ClassVar[str] = "told"

        def choose(self, model: ModelContext) -> Iterator[Any]:
            yield from edits

    return Told()


GROUP = "layers.0.up.weight:0"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (KeepUnits(GROUP, torch.tensor([], dtype=torch.int64)), r"all 32 units would be cut"),
        (KeepUnits(GROUP, torch.tensor([3, 2])), "ascending units of 0…31"),
        (KeepUnits(GROUP, torch.tensor([3, 3])), "ascending units of 0…31"),
        (KeepUnits(GROUP, torch.tensor([30, 32])), "ascending units of 0…31"),
        (KeepUnits(GROUP, torch.tensor([-1, 2])), "ascending units of 0…31"),
        (KeepUnits(GROUP, torch.tensor([0.0])), r"kept is torch\.float32"),
        (KeepUnits("layers.9.up.weight:0", torch.tensor([0])), "no such channel group"),
        (KeepUnits("head.weight:0", torch.tensor([0])), "cannot be cut: "),
        (RemoveBlock("embed.weight"), "its block cannot be removed"),
        (RemoveBlock("nothing"), "used by no block alone"),
        (SetTensor("head.weight", torch.zeros(VOCABULARY, WIDTH)), r"choose\(\) yielded a SetTensor"),
    ],
)
def test_wrong_decisions_are_refused(edit: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(choosing(edit))


def test_decisions_must_be_carried_out() -> None:
    @dataclass(frozen=True)
    class Forgets(KeepFirst):
        name: ClassVar[str] = "forgets"

        def solve(self, block: Any) -> Iterator[Any]:
            yield from () if block.index == 2 else block.decisions

    with pytest.raises(RecipeError, match=r"layers\.1\.up\.weight was decided on, but solve\(\) did not"):
        run(Forgets(kinds=("channels",)))


def test_one_decision_per_group_and_block() -> None:
    twice = KeepUnits(GROUP, torch.tensor([0]))
    with pytest.raises(RecipeError, match="is cut already"):
        run(choosing(twice, twice))
    with pytest.raises(RecipeError, match="is removed already"):
        run(choosing(RemoveBlock("layers.0.up.weight"), RemoveBlock("layers.0.down.weight")))


def test_a_wrong_group_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut that keeps other units than were masked computes something else."""
    from fxcompress.structure import commit

    real = commit.cut_program

    def shifted(program: Any, groups: Any, kept: Any) -> Any:
        return real(program, groups, {name: units + 1 for name, units in kept.items()})

    monkeypatch.setattr(commit, "cut_program", shifted)
    with pytest.raises(VerificationError, match="cutting differs from masking"):
        run(KeepFirst(kinds=("channels",)))
    assert run(KeepFirst(kinds=("channels",)), verify="off").rounds


def test_costs_by_hand() -> None:
    cost = cost_of(decoder())
    layer = 2 * WIDTH + WIDTH * HIDDEN * 2 + HIDDEN
    assert cost.parameters == 3 * layer + 2 * VOCABULARY * WIDTH
    assert cost.block_parameters == 3 * layer
    assert cost.tokens == 12
    assert cost.flops == 12 * 2 * (3 * 2 * WIDTH * HIDDEN + WIDTH * VOCABULARY)
    assert cost.block_flops == 12 * 2 * 3 * 2 * WIDTH * HIDDEN


def test_every_block_of_the_decoder_can_be_removed_and_nothing_else() -> None:
    plan = Plan(decoder())
    found = [find_removal(plan.program, plan.blocks, block.index) for block in plan.blocks]
    assert [isinstance(removal, str) for removal in found] == [True, False, False, False, True]
