"""What a user can get wrong, through the public functions: each is told before long work, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.errors import (
    ArtifactError,
    BindingError,
    CalibrationError,
    CoverageError,
    FormatError,
    RecipeError,
    WeightError,
)
from tests.engine.models import VOCABULARY, Decoder, build

IDS = torch.arange(12).view(2, 6)
FOLDED = [{"gptq": {"group_size": 16}}]


def compress(model: nn.Module, recipe: Any = "w8a16", calibration: Any = None, **options: Any) -> Any:
    return fxcompress.compress(model, recipe, calibration, example_inputs=(IDS,), progress=False, **options)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("w4a17", r"'w4a17'.*w4a16"),
        (["quantize-wights"], r"'quantize-wights'.*quantize-weights"),
        ([{"quantize-weights": {"bit": 4}}], r"quantize-weights.*'bit'.*bits"),
        ([{"quantize-weights": {"bits": "four"}}], r"bits.*'four'"),
    ],
)
def test_unknown_names_and_wrong_types(recipe: Any, message: str) -> None:
    with pytest.raises((RecipeError, FormatError), match=message):
        compress(build(), recipe)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], r"empty|no "),
        ([torch.full((1, 6), VOCABULARY)], rf"{VOCABULARY}"),
        ([{"tokens": IDS}], r"tokens.*input_ids"),
        ([torch.full((1, 6), float("nan"))], r"nan|NaN|int64|dtype"),
        (["some text"], r"tokenizer"),
        (None, r"calibration"),
    ],
)
def test_calibration(calibration: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        compress(build(), FOLDED, calibration)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_with_nan_or_inf_are_named(value: float) -> None:
    model = build()
    model.layers[1].up.weight[3, 2] = value
    with pytest.raises(WeightError, match=r"layers\.1\.up\.weight"):
        compress(model)


def test_a_recipe_that_matches_nothing() -> None:
    with pytest.raises(CoverageError, match=r"changed nothing.*quantize-weights"):
        compress(build(), [{"quantize-weights": {"exclude": ["*"]}}])


def test_a_group_larger_than_every_row() -> None:
    with pytest.raises(FormatError, match=r"group_size=4096 is larger .*at most 32"):
        compress(build(), [{"quantize-weights": {"bits": 4, "group_size": 4096}}])


def test_devices() -> None:
    with pytest.raises(WeightError, match=r"head\.weight: has no values \(meta device\)"):
        compress(build().to("meta"))
    mixed = build()
    mixed.head.to("meta")
    with pytest.raises(WeightError, match="meta device"):
        compress(mixed)


def test_compressing_twice() -> None:
    small = compress(build())
    for model in (small, small.model):
        with pytest.raises(RecipeError, match="already compressed"):
            compress(model)


def test_saving_over_a_directory_and_loading_what_is_none(tmp_path: Path) -> None:
    small = compress(build())
    small.save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ArtifactError, match="exists"):
        small.save(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ArtifactError):
        fxcompress.load(tmp_path)
    with pytest.raises(ArtifactError):
        fxcompress.load(tmp_path / "missing")


def test_another_architecture(tmp_path: Path) -> None:
    compress(build()).save(tmp_path / "out")
    other = Decoder()
    other.head = nn.Linear(16, 41, bias=False)
    with pytest.raises(BindingError, match=r"does not fit .*head\.weight: \(41, 16\).* found, \(40, 16\)"):
        fxcompress.load(tmp_path / "out", other)
    with pytest.raises(BindingError, match=r"embed\.weight: missing"):
        fxcompress.load(tmp_path / "out", nn.Linear(3, 4))
