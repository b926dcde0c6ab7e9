"""What the documentation names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fxcompress.presets import PRESETS
from fxcompress.recipe import Recipe
from fxcompress.registry import BUILTIN_PASSES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPE = re.compile(r"`((?:w\d+a\d+|kv\d?|sparse|prune\d|drop|svd|nf\d|qdq|fp8)[a-z0-9-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_named_in_the_documentation_exist(page: Path) -> None:
    named = set(RECIPE.findall(page.read_text(encoding="utf-8")))
    assert named <= {*PRESETS, *BUILTIN_PASSES, "fp8-e4m3", "fp8-e5m2"}


def test_every_pass_has_a_page() -> None:
    assert {path.stem for path in (ROOT / "docs" / "passes").glob("*.md")} >= set(BUILTIN_PASSES)


@pytest.mark.parametrize("name", [name for name in PRESETS if re.match(r"kv\d", name)])
def test_cache_recipes_have_the_bits_of_their_names(name: str) -> None:
    assert {getattr(item, "bits", None) for item in Recipe.load(name)} == {int(name[2])}
