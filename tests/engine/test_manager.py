from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from fxcompress.calibration import as_calibration
from fxcompress.edits import CompressionState, Edit, FuseSites, Refuse, SetActivation, SetTensor, SetWeight
from fxcompress.errors import (
    CalibrationError,
    CoverageError,
    RecipeError,
    VerificationError,
    WeightError,
)
from fxcompress.forms import DynamicPerToken
from fxcompress.manager import run_recipe
from fxcompress.pass_base import BlockContext, Pass
from fxcompress.progress import ProgressEvent
from tests.engine.models import RoundEverything, ScaleNorm, ShiftByMean, calibration, capture, decoder


def tensors_of(state: CompressionState) -> dict[str, torch.Tensor]:
    found = dict(state.tensors)
    for name, form in state.forms.items():
        found.update({f"{name}:{key}": tensor for key, tensor in form.tensors().items()})
    return found


def same(one: CompressionState, two: CompressionState) -> bool:
    a, b = tensors_of(one), tensors_of(two)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@dataclass(frozen=True)
class Yields(Pass):
    """Yields what it is told in the first block."""

    name: ClassVar[str] = "yields"
    edits: tuple[Any, ...] = ()

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        yield from self.edits if block.index == 0 else ()


def run_edits(*edits: Any, **options: Any) -> Any:
    @dataclass(frozen=True)
    class Given(Pass):
        name: ClassVar[str] = "given"

        def solve(self, block: BlockContext) -> Iterator[Edit]:
            yield from edits if block.index == 0 else ()

    return run_recipe(decoder(), Given(), **{"verify": "off"} | options)


def test_a_run_compresses_reports_and_measures() -> None:
    program = decoder()
    before = {name: tensor.clone() for name, tensor in program.weights.items()}
    result = run_recipe(program, [ScaleNorm(), RoundEverything()], calibration(program))
    report = result.report
    assert all(torch.equal(before[name], program.weights[name]) for name in before)
    assert set(result.state.forms) == {row.name for row in report.rows if row.form.startswith("int8")}
    assert {row.name for row in report.rows} == program.parameters
    assert all(row.error is not None and 0 < row.error < 0.02 for row in report.rows if "int8" in row.form)
    assert {row.reason for row in report.rows if row.form == "kept"} == {"vector"}
    (proof,) = report.checks
    assert proof["passed"]
    assert proof["max_relative_error"] < 1e-12
    assert 0 < (report.kl or 0) < 1e-2
    assert 0 < (report.relative_error or 0) < 0.05
    assert 3 < report.totals["ratio"] < 4
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_runs_are_deterministic_and_follow_the_seed() -> None:
    recipe = [ShiftByMean(), RoundEverything()]
    data = calibration(decoder())
    torch.manual_seed(3)
    one = run_recipe(decoder(), recipe, data, seed=7)
    torch.manual_seed(4)
    two = run_recipe(decoder(), recipe, data, seed=7)
    other = run_recipe(decoder(), recipe, data, seed=8)
    assert same(one.state, two.state)
    assert one.report.to_dict() == two.report.to_dict()
    assert not same(one.state, other.state)


def test_statistics_see_earlier_edits() -> None:
    """Each block must be shown what the compressed blocks before it give."""
    seen: list[float] = []

    @dataclass(frozen=True)
    class Zero(Pass):
        name: ClassVar[str] = "zero"

        def solve(self, block: BlockContext) -> Iterator[Edit]:
            for site in block.sites:
                if site.takes_activation:
                    assert site.input is not None
                    first = block.statistics([site])[site.input.name]
                    assert block.statistics([site], gram=False)[site.input.name] is first
                    seen.append(float(first.absmax.max()))
                    assert torch.equal(next(block.batches(site)), next(block.batches(site)))
                    yield SetTensor(site.name, torch.zeros_like(block.weight(site.name)))

    run_recipe(decoder(), Zero(), calibration(decoder()), verify="off")
    down = seen[1::2]
    assert len(down) == 3
    assert all(value < 2 for value in down)  # relu(bias), since `up` is zero by then
    assert seen[0] > 0


def test_lazy_and_eager_statistics_agree() -> None:
    """A pass that looks at the last block only sees the same numbers as one that looks at all."""
    seen: dict[bool, torch.Tensor] = {}

    def look(eager: bool) -> None:
        @dataclass(frozen=True)
        class Look(Pass):
            name: ClassVar[str] = "look"

            def solve(self, block: BlockContext) -> Iterator[Edit]:
                for site in block.sites:
                    last = site.name == "head.weight"
                    if site.takes_activation and (eager or last):
                        assert site.input is not None
                        mean = block.statistics([site])[site.input.name].mean
                        if last:
                            seen[eager] = mean
                    yield SetTensor(site.name, block.weight(site.name) * 1.5)
                    if block.index == 3:  # reaches back: the first layer was run already
                        yield SetTensor("layers.0.up.weight", block.weight("layers.0.up.weight") * 2)

        run_recipe(decoder(), Look(), calibration(decoder()), verify="off")

    look(True)
    look(False)
    assert torch.equal(seen[True], seen[False])


def test_broken_promise_is_found_and_named() -> None:
    with pytest.raises(VerificationError, match=r"'scale-norm' promised .*first difference is in block 1/3"):
        run_recipe(decoder(), ScaleNorm(wrong=True), calibration(decoder()))
    result = run_recipe(decoder(), ScaleNorm(wrong=True), calibration(decoder()), verify="off")
    assert result.report.checks == []
    assert result.report.kl is None


def test_without_inputs_the_report_says_that_nothing_was_proven() -> None:
    report = run_recipe(decoder(), [ScaleNorm(), RoundEverything()]).report
    assert [check["passed"] for check in report.checks] == [False, False]
    examples = calibration(decoder(), 1)
    report = run_recipe(decoder(), [ScaleNorm(), RoundEverything()], examples=examples, verify="end").report
    assert [check["passed"] for check in report.checks] == [True]
    assert all(row.error is None for row in report.rows)
    assert report.calibration == {}


def test_needs_are_checked_before_any_work() -> None:
    ShiftByMean.solved.clear()
    RoundEverything.solved.clear()
    with pytest.raises(CalibrationError, match="'shift-by-mean' needs calibration data"):
        run_recipe(decoder(), [RoundEverything(), ShiftByMean()])
    with pytest.raises(RecipeError, match="'scale-norm' cannot run after 'round-everything'"):
        run_recipe(decoder(), [RoundEverything(), ScaleNorm()])
    with pytest.raises(RecipeError, match="verify is 'all'"):
        run_recipe(decoder(), RoundEverything(), verify="all")  # type: ignore[arg-type]
    assert not RoundEverything.solved


def test_weights_that_are_not_finite_are_named() -> None:
    program = capture()
    program.weights["layers.1.down.weight"][0, :2] = float("nan")
    with pytest.raises(WeightError, match=r"NaN or inf in layers.1.down.weight \(2 of 512 values\)"):
        run_recipe(program, RoundEverything())


def test_non_finite_activations_name_the_site() -> None:
    program = capture()
    program.weights["layers.0.norm.weight"].zero_()
    program.weights["layers.0.norm.bias"].fill_(10)
    program.weights["layers.0.up.weight"].fill_(3e38)
    with pytest.raises(
        CalibrationError, match=r"'shift-by-mean', block 1/3: layers.0.down.weight .*NaN or inf"
    ):
        run_recipe(program, ShiftByMean(), calibration(program), verify="off")


def test_a_run_without_effect_is_an_error() -> None:
    with pytest.raises(CoverageError, match="changed nothing: 'given' made no edit"):
        run_edits()
    with pytest.raises(CoverageError, match=r"First reason: embed.weight: too small"):
        run_edits(Refuse("embed.weight", "too small"))


def test_every_weight_needs_an_account() -> None:
    @dataclass(frozen=True)
    class OnlyHead(RoundEverything):
        name: ClassVar[str] = "only-head"

        def solve(self, block: BlockContext) -> Iterator[Edit]:
            for edit in RoundEverything.solve(self, block):
                if isinstance(edit, SetWeight) and edit.name == "head.weight":
                    yield edit

    with pytest.raises(CoverageError, match=r"7 weights were neither compressed nor refused.*embed.weight"):
        run_recipe(decoder(), OnlyHead())
    rows = run_edits(SetTensor("head.weight", torch.zeros(40, 16))).report.rows
    assert {row.name: row.form for row in rows}["head.weight"] == "edited"
    assert {row.reason for row in rows if row.name == "embed.weight"} == {
        "no pass of the recipe compresses weights"
    }


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ("text", RecipeError, "'given' yielded a str"),
        (
            SetTensor("nowhere", torch.zeros(1)),
            WeightError,
            "'given', prologue: nowhere: the model has no such",
        ),
        (SetTensor("head.weight", torch.zeros(3)), WeightError, r"replacement is \(3,\)"),
        (SetTensor("head.weight", torch.full((40, 16), float("inf"))), WeightError, "NaN or inf"),
        (SetWeight("head.weight", ()), RecipeError, "SetWeight without terms"),
        (SetActivation("embed.weight", DynamicPerToken(8)), RecipeError, "multiplies no activation"),
        (FuseSites(("head.weight",)), RecipeError, "do not share its input"),
        (FuseSites(("layers.0.up.weight", "layers.1.up.weight")), RecipeError, "do not share its input"),
    ],
)
def test_illegal_edits_are_refused(edit: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_edits(edit)


def test_a_form_with_nan_is_refused() -> None:
    @dataclass(frozen=True)
    class Broken(RoundEverything):
        name: ClassVar[str] = "broken"

        def solve(self, block: BlockContext) -> Iterator[Edit]:
            for edit in RoundEverything.solve(self, block):
                assert isinstance(edit, SetWeight)
                term: Any = edit.terms[0]
                yield SetWeight(edit.name, (dataclasses.replace(term, scale=term.scale * float("nan")),))

    with pytest.raises(WeightError, match=r"embed.weight: NaN or inf in scale of its new form"):
        run_recipe(decoder(), Broken())


def test_second_replacement_names_the_first_pass() -> None:
    @dataclass(frozen=True)
    class Again(RoundEverything):
        name: ClassVar[str] = "again"

        def solve(self, block: BlockContext) -> Iterator[Edit]:
            for site in block.sites:
                block.weight(site.name)
                yield Refuse(site.name, "unreachable")

    with pytest.raises(
        RecipeError, match=r"'again', prologue: embed.weight: already compressed by round-everything"
    ):
        run_recipe(decoder(), [RoundEverything(), Again()])


def test_statistics_without_data_and_for_foreign_sites() -> None:
    @dataclass(frozen=True)
    class Ask(Pass):
        name: ClassVar[str] = "ask"
        other: bool = False
        kept: ClassVar[list[Any]] = []

        def solve(self, block: BlockContext) -> Iterator[Edit]:
            self.kept.extend(block.sites)
            block.statistics([self.kept[1] if self.other else block.sites[0]])
            yield Refuse("head.weight", "never")

    Ask.kept.clear()
    with pytest.raises(CalibrationError, match="'ask', prologue: activations were asked for"):
        run_recipe(decoder(), Ask())


def test_progress_is_told_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[ProgressEvent] = []
    run_recipe(decoder(), RoundEverything(), progress=events.append)
    assert [event.step for event in events] == ["prologue", "block 1/3", "block 2/3", "block 3/3", "epilogue"]
    assert {event.stage for event in events} == {"1/1 round-everything"}
    assert [(event.done, event.total) for event in events] == [(i + 1, 5) for i in range(5)]
    run_recipe(decoder(), RoundEverything(), progress=True)
    run_recipe(decoder(), RoundEverything())
    assert capsys.readouterr().out == ""


def test_calibration_of_another_model_is_refused() -> None:
    data = as_calibration(torch.full((1, 4), 39), decoder())
    program = capture()
    program.weights = dict(program.weights) | {"embed.weight": program.weights["embed.weight"][:30]}
    with pytest.raises(CalibrationError, match=r"token id 39 is outside of embed.weight"):
        run_recipe(program, RoundEverything(), data)
