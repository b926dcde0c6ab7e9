from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from fxcompress import registry
from fxcompress.edits import Edit
from fxcompress.errors import FormatError, RecipeError
from fxcompress.pass_base import BlockContext, Pass
from fxcompress.presets import PRESETS, recipes
from fxcompress.recipe import Recipe, options_of


@dataclass(frozen=True)
class Base(Pass):
    def solve(self, block: BlockContext) -> Iterator[Edit]:
        yield from ()


@dataclass(frozen=True)
class Quantize(Base):
    name: ClassVar[str] = "my-quantize"
    provides: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})
    bits: int = 8
    damping: float = 0.01
    search: bool = False
    group_size: int | None = None
    mode: Literal["fast", "exact"] = "fast"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits > 8:
            raise FormatError(f"bits={self.bits}, expected at most 8.")


@dataclass(frozen=True)
class Smooth(Base):
    name: ClassVar[str] = "my-smooth"
    provides: ClassVar[frozenset[str]] = frozenset({"smoothed"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})


@dataclass(frozen=True)
class Finish(Base):
    name: ClassVar[str] = "my-finish"
    requires: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})


@dataclass(frozen=True)
class Demanding(Base):
    name: ClassVar[str] = "my-demanding"
    needed: int


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {c.name: c for c in (Quantize, Smooth, Finish, Demanding)})


def test_every_source_gives_the_same_recipe(tmp_path: Path) -> None:
    text = "name: mine\npasses:\n  - my-smooth\n  - my-quantize: {bits: 4, exclude: ['*.gate']}\n"
    expected = Recipe([Smooth(), Quantize(bits=4, exclude=("*.gate",))], "mine")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert (
        Recipe.from_yaml(text)
        == Recipe.load(path)
        == Recipe.load(str(path))
        == Recipe.load(expected)
        == expected
    )
    listed: list[Any] = ["my-smooth", {"my-quantize": {"bits": 4, "exclude": ["*.gate"]}}]
    assert Recipe.load(listed).passes == expected.passes
    assert Recipe.load([Smooth(), listed[1]]).passes == expected.passes
    assert Recipe.load(Smooth()).passes == Recipe.load("my-smooth").passes == (Smooth(),)


def test_round_trip_spells_out_every_option() -> None:
    recipe = Recipe([Smooth(), Quantize(exclude=("a", "b"), damping=0.5)], "r")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe == Recipe.from_dict(recipe.to_dict())
    assert options_of(recipe.passes[1]) == {
        "bits": 8,
        "damping": 0.5,
        "search": False,
        "group_size": None,
        "mode": "fast",
        "exclude": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bitz": 4}, r"'my-quantize': unknown option 'bitz'.*did you mean 'bits'"),
        ({"bits": "4"}, r"'my-quantize', option 'bits': found '4', expected a valid integer"),
        ({"bits": True}, r"option 'bits': found True"),
        ({"bits": 4.5}, r"option 'bits': found 4.5"),
        ({"search": 1}, r"option 'search': found 1, expected a valid boolean"),
        ({"mode": "slow"}, r"option 'mode': found 'slow', expected 'fast' or 'exact'"),
        ({"exclude": "all"}, r"option 'exclude': found 'all', expected a valid array"),
        ({"group_size": "x"}, r"option 'group_size'"),
        ({"bits": 9}, r"'my-quantize': bits=9, expected at most 8"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load([{"my-quantize": options}])


def test_options_of_python_objects_are_checked_too() -> None:
    assert Recipe([Quantize(damping=1)]).passes  # an int serves as a float
    wrong: Any = "0.1"
    with pytest.raises(RecipeError, match=r"'my-quantize', option 'damping': found '0.1'"):
        Recipe([Quantize(damping=wrong)])


def test_order_is_checked_by_name() -> None:
    with pytest.raises(
        RecipeError, match=r"'my-smooth' cannot run after 'my-quantize', .*'quantized-weights'"
    ):
        Recipe.load(["my-quantize", "my-smooth"])
    with pytest.raises(RecipeError, match=r"'my-finish' requires 'quantized-weights'.*add a pass"):
        Recipe.load(["my-smooth", "my-finish"])
    with pytest.raises(RecipeError, match=r"put 'my-quantize' before 'my-finish'"):
        Recipe.load(["my-finish", "my-quantize"])
    assert len(Recipe.load(["my-smooth", "my-quantize", "my-finish"])) == 3


def test_duplicates() -> None:
    with pytest.raises(RecipeError, match="pass 2 repeats pass 1: 'my-quantize'"):
        Recipe.load(["my-quantize", {"my-quantize": {"bits": 8}}])
    assert len(Recipe.load([{"my-quantize": {"bits": 4}}, {"my-quantize": {"bits": 8}}])) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "it has no passes"),
        ("w8a61", r"'w8a61': no such preset, pass or file.*did you mean 'w8a16'"),
        ("missing.yaml", r"recipe missing.yaml: No such file"),
        ({"passes": ["my-smooth"], "seed": 1}, r"unknown keys \['seed'\]"),
        ({"name": "x"}, "key 'passes'"),
        ({"passes": "my-smooth"}, "passes is a str, expected a list"),
        ({"name": 3, "passes": ["my-smooth"]}, "name is 3"),
        ([{"my-smooth": {}, "my-quantize": {}}], "single `name: "),
        ([{"my-quantize": [4]}], "its options are"),
        ([Quantize], r"is the class Quantize.*call it"),
        (["my-demanding"], r"required options \['needed'\] are missing"),
        ([7], "pass 1 is 7"),
        (3, "found a int"),
    ],
)
def test_malformed_recipes(source: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(source)


def test_yaml_is_plain_data_and_keys_are_unique() -> None:
    with pytest.raises(RecipeError, match="the key 'bits' is given twice"):
        Recipe.from_yaml("passes: [{my-quantize: {bits: 4, bits: 8}}]")
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.from_yaml("passes: [!!python/object/apply:os.getcwd []]")
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.from_yaml("passes: [")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_recipes(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipes()[name]
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
