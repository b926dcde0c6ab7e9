from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from fxcompress.calibration import Plan, as_calibration
from fxcompress.edits import CompressionState, FuseSites
from fxcompress.errors import ArtifactError
from fxcompress.forms import DynamicPerToken, SiteForm, StaticPerTensor
from fxcompress.manager import run_recipe
from fxcompress.report import Report, describe_form
from fxcompress.verify import TOLERANCE, prove_unchanged, relative_difference
from tests.engine.models import RoundEverything, by_hand, calibration, decoder


@pytest.fixture(scope="module")
def report() -> Report:
    return run_recipe(decoder(), RoundEverything(), calibration(decoder())).report


def test_show_collapses_repeated_blocks(report: Report) -> None:
    stream = io.StringIO()
    report.show(Console(file=stream, width=160))
    text = stream.getvalue()
    assert "layers.{0–2}.up.weight" in text
    assert "layers.1.up.weight" not in text
    assert "int8 sym per row" in text
    assert "end to end: relative error" in text
    assert "nats per token" in text
    assert text.count("vector") == 2  # one line for all of them


def test_round_trip_and_timings(report: Report) -> None:
    assert Report.from_dict(report.to_dict()).to_dict() == report.to_dict()
    assert "seconds" not in report.to_dict()
    assert set(report.to_dict(timings=True)["seconds"]) == {"1 round-everything", "end to end"}
    with pytest.raises(ArtifactError, match="not in the expected shape"):
        Report.from_dict({"weights": [{}]})


def test_bytes_are_those_of_the_tensors(report: Report) -> None:
    row = next(row for row in report.rows if row.name == "head.weight")
    assert (row.shape, row.dtype, row.bytes_before) == ((40, 16), "float32", 40 * 16 * 4)
    assert row.bytes_after == 40 * 16 + 40 * 4
    assert row.passes == ("round-everything",)


def test_forms_in_words() -> None:
    assert describe_form(SiteForm()) == ""
    assert describe_form(SiteForm(activation=DynamicPerToken(8))) == "int8 activations per token"
    static = StaticPerTensor(8, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
    assert describe_form(SiteForm(activation=static)) == "int8 activations static"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.ones(2), torch.ones(2), 0.0),
        (torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0]), 0.25),
        (torch.tensor([1.0, float("-inf")]), torch.tensor([1.0, float("-inf")]), 0.0),
        (torch.tensor([2.0, float("-inf")]), torch.tensor([1.0, float("-inf")]), 0.5),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 5.0]), float("inf")),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")]), float("inf")),
        (torch.zeros(2), torch.ones(2), float("inf")),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), float("inf")),
        (torch.ones(2), torch.ones(3), float("inf")),
        ((torch.ones(1), 3), (torch.ones(1), 4), float("inf")),
        (7, 7, 0.0),
    ],
)
def test_relative_difference(a: object, b: object, expected: float) -> None:
    assert relative_difference(a, b) == expected


def test_fusions_are_proven_by_the_stacked_product() -> None:
    weights = {"q": torch.randn(6, 4), "k": torch.randn(3, 4)}
    x = torch.randn(2, 5, 4)
    linear = torch.nn.functional.linear
    program = by_hand(lambda q, k, x: (linear(x, q), linear(x, k)), weights, {"x": x}, mode="symbolic")
    data = as_calibration(x, program)
    state = CompressionState(program.weights)
    fusion = FuseSites(("q", "k"))
    proof = prove_unchanged(Plan(program), state, state, [fusion], data, "fuse")
    assert proof["passed"]
    assert float(proof["max_relative_error"]) <= TOLERANCE
