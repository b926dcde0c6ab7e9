"""Recipes: ordered lists of passes with their options, as Python objects or YAML, checked before any work.

A recipe file::

    name: my-recipe
    passes:
      - smooth-activations
      - quantize-weights: {bits: 8, exclude: ["*.gate.weight"]}
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml

from fxcompress.errors import FxCompressError, RecipeError
from fxcompress.pass_base import Pass
from fxcompress.presets import PRESETS
from fxcompress.registry import check_pass_class, close_matches, pass_class, pass_names

__all__ = ["Recipe", "options_of"]


@dataclass(frozen=True)
class Recipe:
    """An ordered list of passes whose options and order were checked.

    Args:
        passes: The passes in the order in which they run.
        name: What to call the recipe in reports; None for an unnamed one.

    Raises:
        RecipeError: no pass, an option of the wrong type, the same pass twice with the same options, or an
            order that a pass's ``requires``/``conflicts`` forbids; the message names both passes.

    Example:
        >>> Recipe([QuantizeWeights(bits=8), FuseSiblings()]).to_dict()["passes"][1]
        {'fuse-siblings': {}}
    """

    passes: Sequence[Pass]
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        if not self.passes:
            raise RecipeError("recipe: it has no passes.", fix=f"start from a preset: {', '.join(PRESETS)}.")
        for item in self.passes:
            _check_instance(item)
        _check_duplicates(self.passes)
        _check_order(self.passes)
        for index, item in enumerate(self.passes):
            item.check_later(self.passes[index + 1 :])

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    @property
    def needs_calibration(self) -> bool:
        """Whether any pass needs calibration data."""
        return any(item.needs_calibration for item in self.passes)

    @classmethod
    def load(cls, source: Any) -> Recipe:
        """Read a recipe from whatever describes one.

        Args:
            source: A :class:`Recipe`; a pass; a preset's or pass's name; the path of a YAML file; a mapping
                in the shape of such a file; or a list of passes, names and ``{name: options}`` mappings.

        Raises:
            RecipeError: nothing of that name or path, or the recipe itself is wrong.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Pass):
            return cls([source])
        if isinstance(source, str | os.PathLike):
            return cls._named(os.fspath(source))
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        if isinstance(source, Sequence):
            return cls([_read_pass(item, index) for index, item in enumerate(source)])
        raise RecipeError(
            f"recipe: found a {type(source).__name__}.",
            fix="give a preset's name, a YAML file, a pass or a list of passes.",
        )

    @classmethod
    def _named(cls, text: str) -> Recipe:
        if text in PRESETS:
            return cls.from_dict({"name": text, "passes": PRESETS[text]["passes"]})
        path = Path(text)
        if path.suffix in (".yaml", ".yml") or path.is_file():
            try:
                return cls.from_yaml(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise RecipeError(f"recipe {text}: {error.strerror or error}.") from error
            except FxCompressError as error:
                raise RecipeError(f"{text}: {error}") from error
        if text in pass_names():
            return cls([_build(text, {})], name=text)
        raise RecipeError(f"recipe {text!r}: no such preset, pass or file.", fix=_known(text))

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read a recipe from YAML text.

        Raises:
            RecipeError: not YAML, a key given twice, or the recipe itself is wrong.
        """
        try:
            data = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe: not valid YAML: {error}.") from error
        return cls.load(data) if isinstance(data, list) else cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Read a recipe from the shape :meth:`to_dict` gives.

        Raises:
            RecipeError: unknown or missing keys, or the recipe itself is wrong.
        """
        if not isinstance(data, Mapping) or "passes" not in data:
            raise RecipeError("recipe: expected a mapping with the key 'passes', or a list of passes.")
        unknown = set(data) - {"name", "passes"}
        if unknown:
            raise RecipeError(
                f"recipe: unknown keys {sorted(map(str, unknown))}.", fix="use name and passes."
            )
        name, passes = data.get("name"), data["passes"]
        if name is not None and not isinstance(name, str):
            raise RecipeError(f"recipe: name is {name!r}, expected a string.")
        if isinstance(passes, str) or not isinstance(passes, Sequence):
            raise RecipeError(f"recipe: passes is a {type(passes).__name__}, expected a list.")
        return cls([_read_pass(item, index) for index, item in enumerate(passes)], name)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-safe data, every option spelled out, so that new defaults cannot change it."""
        return {"name": self.name, "passes": [{item.name: options_of(item)} for item in self.passes]}

    def to_yaml(self) -> str:
        """The recipe as YAML text; :meth:`from_yaml` reads it back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Plain-data YAML that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise RecipeError(f"recipe: the key {key!r} is given twice{node.start_mark}.")
            seen.add(key) if isinstance(key, str) else None
        return super().construct_mapping(node, deep)


def options_of(item: Pass) -> dict[str, Any]:
    """All options of a pass as JSON-safe values.

    Raises:
        RecipeError: an option holds something that cannot be written as plain data.
    """
    return {
        field.name: _plain(getattr(item, field.name), item.name, field.name)
        for field in dataclasses.fields(item)
        if field.init
    }


def _plain(value: Any, name: str, option: str) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(item, name, option) for item in value]
    if isinstance(value, frozenset | set):
        return sorted((_plain(item, name, option) for item in value), key=repr)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name, option) for key, item in value.items()}
    raise RecipeError(
        f"pass {name!r}, option {option!r}: a {type(value).__name__} cannot be written to a recipe."
    )


def _known(text: str) -> str:
    return close_matches(text, {*PRESETS, *pass_names()})


def _read_pass(item: Any, index: int) -> Pass:
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        return _build(item, {})
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, options),) = item.items()
        if not isinstance(name, str):
            raise RecipeError(f"recipe: pass {index + 1} has the name {name!r}, expected a string.")
        if options is not None and not isinstance(options, Mapping):
            raise RecipeError(f"pass {name!r}: its options are {options!r}, expected a mapping.")
        return _build(name, dict(options or {}))
    if isinstance(item, type) and issubclass(item, Pass):
        raise RecipeError(f"recipe: pass {index + 1} is the class {item.__name__}.", fix="call it: add ().")
    raise RecipeError(
        f"recipe: pass {index + 1} is {item!r}.", fix="write a name, or a single `name: {option: value}`."
    )


def _build(name: str, options: dict[str, Any]) -> Pass:
    cls = pass_class(name)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for option in options:
        if option not in fields:
            known = close_matches(str(option), fields) if fields else "it has no options."
            raise RecipeError(f"pass {name!r}: unknown option {option!r}.", fix=known)
    missing = [
        field.name
        for field in fields.values()
        if field.name not in options
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"pass {name!r}: required options {missing} are missing.")
    types = _types(cls)
    values = {option: _coerce(name, option, value, types[option]) for option, value in options.items()}
    try:
        return cls(**values)
    except (ValueError, TypeError, FxCompressError) as error:
        raise RecipeError(f"pass {name!r}: {error}") from error


def _types(cls: type[Pass]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except NameError as error:  # a class made inside a function, annotated with a name that only exists there
        raise RecipeError(f"pass {cls.name!r}: the type of an option cannot be resolved: {error}.") from error


def _adapter(hint: Any) -> pydantic.TypeAdapter[Any]:
    try:
        return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
    except pydantic.PydanticUserError:  # the type brings its own configuration
        return pydantic.TypeAdapter(hint)


def _coerce(name: str, option: str, value: Any, hint: Any) -> Any:
    """Check plain data against an option's type by JSON's rules: a list may become a tuple, "8" never 8."""
    try:
        return _adapter(hint).validate_json(json.dumps(value), strict=True)
    except (pydantic.ValidationError, TypeError, ValueError) as error:
        raise _wrong_type(name, option, value, hint, error) from error


def _check_instance(item: Any) -> None:
    if not isinstance(item, Pass):
        raise RecipeError(f"recipe: {item!r} is not a pass.", fix="use Recipe.load for names and mappings.")
    check_pass_class(type(item))
    types = _types(type(item))
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        try:
            _adapter(types[field.name]).validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            raise _wrong_type(item.name, field.name, value, types[field.name], error) from error


def _wrong_type(name: str, option: str, value: Any, hint: Any, error: Exception) -> RecipeError:
    if isinstance(error, pydantic.ValidationError):
        details = sorted({problem["msg"].removeprefix("Input should be ") for problem in error.errors()})
        expected = ", or ".join(details)
    else:
        expected = str(getattr(hint, "__name__", hint))
    return RecipeError(f"pass {name!r}, option {option!r}: found {value!r}, expected {expected}.")


def _check_duplicates(passes: Sequence[Pass]) -> None:
    for index, item in enumerate(passes):
        for earlier, other in enumerate(passes[:index]):
            if type(item) is type(other) and options_of(item) == options_of(other):
                raise RecipeError(
                    f"recipe: pass {index + 1} repeats pass {earlier + 1}: {item.name!r}, same options.",
                    fix="remove one of them.",
                )


def _check_order(passes: Sequence[Pass]) -> None:
    provided: dict[str, str] = {}
    for index, item in enumerate(passes):
        for capability in sorted(item.conflicts):
            if capability in provided:
                raise RecipeError(
                    f"recipe: {item.name!r} cannot run after {provided[capability]!r}, which already gives"
                    f" {capability!r}.",
                    fix=f"put {item.name!r} before {provided[capability]!r}.",
                )
        for capability in sorted(item.requires - provided.keys()):
            later = [other.name for other in passes[index + 1 :] if capability in other.provides]
            fix = (
                f"put {later[0]!r} before {item.name!r}."
                if later
                else f"add a pass that gives {capability!r} before it."
            )
            raise RecipeError(
                f"recipe: {item.name!r} requires {capability!r}, which no earlier pass gives.", fix=fix
            )
        for capability in item.provides:
            provided.setdefault(capability, item.name)
