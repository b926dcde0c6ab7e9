"""Every decoder: recipe → reference backend → save → load → generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.end_to_end.zoo_checks import RECIPES, check, dense_copy
from tests.zoo import DECODERS, ZooEntry, generate_tokens


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "animal", [a for a in DECODERS if "slow" not in a.tags], ids=lambda animal: animal.name
)
def test_decoders(animal: ZooEntry, recipe: str, tmp_path: Path) -> None:
    small = check(animal, recipe, tmp_path)
    if animal.generates and recipe == "w4a16":
        tokens = generate_tokens(small.model, animal.tensors())
        dense = generate_tokens(dense_copy(animal.build(), small), animal.tensors())
        assert torch.equal(tokens, dense)
