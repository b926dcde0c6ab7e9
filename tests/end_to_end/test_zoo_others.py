"""Encoders, encoder–decoders, vision models, convolutions and odd modules, through the same chain."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.zoo_checks import RECIPES, check
from tests.zoo import OTHERS, ZooEntry, generate_tokens

# Capturing one takes over a minute (torch's symbolic shapes): one recipe for it, the one with more forms.
COSTLY = {"swin"}
CASES = [
    pytest.param(animal, recipe, id=f"{animal.name}-{recipe}")
    for animal in OTHERS
    for recipe in RECIPES
    if animal.name not in COSTLY or recipe == "w8a8"
]


@pytest.mark.slow
@pytest.mark.parametrize(("animal", "recipe"), CASES)
def test_other_models(animal: ZooEntry, recipe: str, tmp_path: Path) -> None:
    small = check(animal, recipe, tmp_path)
    if animal.generates and recipe == "w4a16":
        assert generate_tokens(small.model, animal.tensors()).shape[1] == 4
