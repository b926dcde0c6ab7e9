"""Encoders, encoder–decoders, vision models, convolutions and odd modules, through the same chain."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.zoo_checks import RECIPES, check
from tests.zoo import OTHERS, ZooEntry, generate_tokens


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("animal", OTHERS, ids=lambda animal: animal.name)
def test_other_models(animal: ZooEntry, recipe: str, tmp_path: Path) -> None:
    small = check(animal, recipe, tmp_path)
    if animal.generates and recipe == "w4a16":
        assert generate_tokens(small.model, animal.tensors()).shape[1] == 4
