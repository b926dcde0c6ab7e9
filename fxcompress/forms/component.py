"""Serialisable parts of a form: frozen dataclasses of JSON scalars, tensors and other components."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fxcompress.errors import ArtifactError, FormatError

_REGISTRY: dict[str, type[Component]] = {}
C = TypeVar("C", bound="type[Component]")


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """Base of every part of a form. Subclasses set ``kind`` and are registered with :func:`component`."""

    kind: ClassVar[str] = ""

    def to_spec(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return the JSON description; tensors are put into ``tensors`` under ``prefix``-ed keys."""
        spec: dict[str, Any] = {"kind": self.kind}
        for field in dataclasses.fields(self):
            spec[field.name] = _encode(getattr(self, field.name), f"{prefix}.{field.name}", tensors)
        return spec

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of this component by dotted field path."""
        found: dict[str, Tensor] = {}
        self.to_spec("", found)
        return {name.removeprefix("."): tensor for name, tensor in found.items()}

    def parts(self) -> Iterator[tuple[str, Component]]:
        """This component (path ``""``) and all components within, with their dotted field paths."""
        yield "", self
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            inner = enumerate(value) if isinstance(value, tuple) else [("", value)]
            for index, item in inner:
                if isinstance(item, Component):
                    start = f"{field.name}.{index}" if index != "" else field.name
                    for path, part in item.parts():
                        yield f"{start}.{path}".rstrip("."), part

    def describe(self) -> str:
        """A few words for the report."""
        return self.kind

    def same_as(self, other: Component) -> bool:
        """Whether both mean the same: same kind, options and tensors."""
        mine, theirs = self.tensors(), other.tensors()
        return (
            type(self) is type(other)
            and self.to_spec("", {}) == other.to_spec("", {})
            and all(
                tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key])
                for key, tensor in mine.items()
            )
        )

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors of this component."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def component(kind: str) -> Any:
    """Class decorator: register a :class:`Component` under ``kind``, so that artifacts can be read back."""

    def register(cls: C) -> C:
        if kind in _REGISTRY and _REGISTRY[kind].__qualname__ != cls.__qualname__:
            raise ValueError(
                f"component kind {kind!r} is already registered by {_REGISTRY[kind].__qualname__}"
            )
        cls.kind = kind
        _REGISTRY[kind] = cls
        return cls

    return register


def from_spec(spec: dict[str, Any], tensors: Any) -> Component:
    """Rebuild a component from its JSON description; ``tensors`` maps keys to tensors (may be lazy).

    Raises:
        ArtifactError: unknown kind, missing or unexpected field, missing tensor, or values that the component
            refuses.
    """
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in _REGISTRY:
        raise ArtifactError(
            f"form component {kind!r} is unknown to this version.",
            fix="install the version or plug-in that made it.",
        )
    cls = _REGISTRY[kind]
    fields = dataclasses.fields(cls)
    names = {field.name for field in fields}
    # What has a default may be younger than the artifact.
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    given = set(spec) - {"kind"}
    if not needed <= given <= names:
        raise ArtifactError(
            f"form component {kind!r}: fields {sorted(given)} found, {sorted(names)} expected."
        )
    values = {name: _decode(spec[name], tensors) for name in given}
    try:
        return cls(**values)
    except (FormatError, TypeError, AttributeError) as error:  # the last two: values of a wrong type
        raise ArtifactError(f"form component {kind!r}: {error}") from error


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Component):
        return {"component": value.to_spec(key, tensors)}
    if isinstance(value, tuple):
        return [_encode(item, f"{key}.{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{key}: a component field of type {type(value).__name__} cannot be saved")


def _decode(value: Any, tensors: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, tensors) for item in value)
    if isinstance(value, dict):
        if "tensor" in value:
            try:
                return tensors[value["tensor"]]
            except KeyError:
                raise ArtifactError(f"tensor {value['tensor']!r} is missing from the artifact.") from None
        if isinstance(value.get("component"), dict):
            return from_spec(value["component"], tensors)
        raise ArtifactError(f"form field with keys {sorted(value)}: neither a tensor nor a component.")
    return value
