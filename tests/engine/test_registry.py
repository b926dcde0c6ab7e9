from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fxcompress import registry
from fxcompress.edits import Edit
from fxcompress.errors import BackendError, RecipeError
from fxcompress.pass_base import BlockContext, Pass
from fxcompress.recipe import Recipe


@pytest.fixture(autouse=True)
def _own_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@dataclass(frozen=True)
class Nothing(Pass):
    name: ClassVar[str] = "nothing-at-all"
    level: int = 1

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        yield from ()


def provider(folder: Path, entry: str, body: str, distribution: str = "thirdparty") -> None:
    """Put an installed-looking distribution with one entry point into ``folder``."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry)
    (folder / f"{distribution}_passes.py").write_text(body)


THIRD_PARTY = """
from dataclasses import dataclass
from typing import ClassVar
from fxcompress.pass_base import Pass

@dataclass(frozen=True)
class Mine(Pass):
    name: ClassVar[str] = "their-pass"
    strength: float = 0.5

    def solve(self, block):
        yield from ()
"""


def test_registered_pass_can_be_used_by_name() -> None:
    assert registry.register_pass(Nothing) is Nothing
    assert registry.pass_class("nothing-at-all") is Nothing
    assert Recipe.load({"passes": [{"nothing-at-all": {"level": 3}}]}).passes == (Nothing(3),)
    registry.register_pass(Nothing)  # the same class again, as a notebook does


def test_pass_of_another_distribution_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider(tmp_path, "[fxcompress.passes]\ntheir-pass = thirdparty_passes:Mine\n", THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path)
    assert "their-pass" in registry.pass_names()
    recipe = Recipe.from_yaml("passes: [{their-pass: {strength: 0.25}}]")
    assert recipe.to_dict()["passes"] == [{"their-pass": {"strength": 0.25}}]


def test_entry_point_may_not_shadow_a_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider(tmp_path, "[fxcompress.passes]\ngptq = shadow_passes:Mine\n", THIRD_PARTY, "shadow")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"'gptq' has several providers: .*shadow_passes:Mine"):
        registry.pass_class("gptq")


def test_broken_and_misnamed_providers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = "[fxcompress.passes]\nlost = nowhere_passes:Mine\nother-name = wrong_passes:Mine\n"
    provider(tmp_path, entry, THIRD_PARTY, "wrong")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"'lost': nowhere_passes:Mine cannot be loaded"):
        registry.pass_class("lost")
    with pytest.raises(RecipeError, match="calls itself 'their-pass'"):
        registry.pass_class("other-name")


def test_unknown_names_suggest_close_ones() -> None:
    with pytest.raises(
        RecipeError, match=r"unknown pass 'quantise-weights'.*did you mean 'quantize-weights'"
    ):
        registry.pass_class("quantise-weights")
    with pytest.raises(RecipeError, match=r"known: .*gptq"):
        registry.pass_class("zzzzzz")
    with pytest.raises(BackendError, match="unknown backend 'abacus'"):
        registry.backend_class("abacus")


def test_backend_of_another_distribution_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "class Abacus:\n    pass\n"
    provider(tmp_path, "[fxcompress.backends]\nabacus = beads_passes:Abacus\n", body, "beads")
    monkeypatch.syspath_prepend(tmp_path)
    assert "abacus" in registry.backend_names()
    assert registry.backend_class("abacus").__name__ == "Abacus"


@pytest.mark.parametrize(
    ("attributes", "bases", "message"),
    [
        ({"name": "x"}, (), "not a pass"),
        ({"name": "x"}, (Pass,), "not a dataclass"),
        ({"name": "Not Dashed", "dataclass": True}, (Pass,), "lower-case words"),
        ({"name": "fine", "dataclass": True}, (Pass,), r"solve\(\) is missing"),
        (
            {"name": "fine", "dataclass": True, "requires": ("a",), "solve": lambda s, b: ()},
            (Pass,),
            "requires is",
        ),
        ({"name": "gptq", "dataclass": True, "solve": lambda s, b: ()}, (Pass,), "belongs to another pass"),
    ],
)
def test_unusable_classes_are_refused(attributes: dict[str, Any], bases: Any, message: str) -> None:
    attributes = dict(attributes)
    make = attributes.pop("dataclass", False)
    cls = type("Candidate", bases, attributes)
    with pytest.raises(RecipeError, match=message):
        registry.register_pass(dataclass(frozen=True)(cls) if make else cls)


def test_listing_names_imports_no_pass() -> None:
    code = (
        "import sys; from fxcompress.registry import pass_names; pass_names();"
        "print([m for m in sys.modules if m.startswith(('fxcompress.passes', 'fxcompress.backends'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
