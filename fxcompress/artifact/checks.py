"""What a form read from disk must satisfy before any kernel is given its tensors.

Shapes and dtypes that follow from a component's own fields are checked by its constructor; what is left is
that JSON put values of the right type everywhere, and that the form fits the parameter it stands for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fxcompress.artifact.content import TensorInfo
from fxcompress.errors import ArtifactError, FxCompressError
from fxcompress.forms import (
    ActivationQuantizer,
    CacheForm,
    CacheStore,
    Component,
    EdgeQuantizer,
    Scale,
    Shift,
    SiteForm,
    Transform,
    WeightTerm,
    from_spec,
)

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "bool": lambda value: type(value) is bool,
    "str": lambda value: type(value) is str,
    "float": lambda value: type(value) in (int, float),
    "tuple[int, ...]": lambda value: type(value) is tuple and all(type(v) is int and v >= 0 for v in value),
    "Tensor": lambda value: isinstance(value, Tensor),
    "Tensor | None": lambda value: value is None or isinstance(value, Tensor),
}
"""Annotation of a component's field → whether a value satisfies it."""


def build_form(name: str, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SiteForm:
    """Rebuild the form of ``name`` from its manifest entry.

    Raises:
        ArtifactError: the description is malformed or of an unknown kind.
    """
    try:
        form = from_spec(dict(spec), tensors)
    except ArtifactError as error:
        raise ArtifactError(f"{name}: {error}") from error
    except (FxCompressError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{name}: its form is malformed ({error}).") from error
    if not isinstance(form, SiteForm):
        raise ArtifactError(f"{name}: {type(form).__name__} found where a site form is expected.")
    return form


def check_form(name: str, form: SiteForm, info: TensorInfo) -> None:
    """Check every part of ``form`` against the parameter it stands for.

    Args:
        name: Parameter name, for messages.
        form: A form, possibly over meta tensors.
        info: The parameter as the model had it.

    Raises:
        ArtifactError: a part has the wrong type, or a tensor the wrong shape or dtype.
    """
    for term in _components(name, "terms", form.terms, WeightTerm):
        shape = tuple(term.parameter_shape)
        _require(shape == info.shape, name, f"a term of shape {shape}, the parameter has {info.shape}")
    if form.activation is not None:
        _components(name, "activation", (form.activation,), ActivationQuantizer)
    for field, transforms in (("transform_in", form.transform_in), ("transform_out", form.transform_out)):
        for transform in _components(name, field, transforms, Transform):
            if isinstance(transform, Scale):
                _check_vector(name, field, transform.factor)
            elif isinstance(transform, Shift):
                _check_vector(name, field, transform.offset)
    _components(name, "edges", form.edges, EdgeQuantizer)
    for edge in form.edges:
        _components(name, "edges", (edge.quantizer,), ActivationQuantizer)
    if form.cache is not None:
        _components(name, "cache", (form.cache,), CacheForm)
        _components(name, "cache", (form.cache.key, form.cache.value), CacheStore)
    sizes = form.clusters
    _require(_TYPES["tuple[int, ...]"](sizes), name, f"clusters is {sizes!r}, expected a list of sizes")
    if form.bias is not None:
        _check_vector(name, "bias", form.bias)


def _components(name: str, field: str, values: object, kind: type[Any]) -> tuple[Any, ...]:
    _require(isinstance(values, tuple), name, f"{field} is no list")
    assert isinstance(values, tuple)
    for value in values:
        _require(isinstance(value, kind), name, f"{field} holds {type(value).__name__}, no {kind.__name__}")
        _check_types(name, value)
    return values


def _check_types(name: str, component: Component) -> None:
    """Every field of a plain type holds a value of that type; components within are checked too."""
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        check = _TYPES.get(str(field.type))
        _require(check is None or check(value), name, f"{field.name} is {value!r}, expected {field.type}")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Component):
                _check_types(name, part)


def _check_vector(name: str, field: str, tensor: object) -> None:
    is_vector = isinstance(tensor, Tensor) and tensor.ndim == 1 and tensor.is_floating_point()
    _require(is_vector, name, f"{field} is no floating vector")


def _require(condition: bool, name: str, problem: str) -> None:
    if not condition:
        raise ArtifactError(f"{name}: its form does not fit: {problem}.")
