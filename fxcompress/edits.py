"""Edits: the serialisable changes a pass yields, each keyed by a parameter's full name, and their sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from fxcompress.errors import RecipeError, WeightError
from fxcompress.forms import ActivationQuantizer, EdgeQuantizer, SiteForm, Transform, WeightTerm


@dataclass(frozen=True, eq=False)
class SetTensor:
    """Replace parameter ``name`` by ``value`` (same shape and dtype).

    For folded norm gains, scaled weights and biases.
    """

    name: str
    value: Tensor
    reason: str = ""


@dataclass(frozen=True, eq=False)
class SetWeight:
    """Replace the dense weight of ``name`` by ``terms``.

    ``error`` is the solver's relative output error if known.
    """

    name: str
    terms: tuple[WeightTerm, ...]
    reason: str = ""
    error: float | None = None


@dataclass(frozen=True, eq=False)
class ReviseWeight:
    """Replace the terms of ``name``, which is compressed already, by ``terms`` that build on them.

    For passes made for that: rounding the factors of a low-rank weight, adding a low-rank term to codes.
    ``error`` is the relative output error against the dense weight, if known.
    """

    name: str
    terms: tuple[WeightTerm, ...]
    reason: str = ""
    error: float | None = None


@dataclass(frozen=True, eq=False)
class SetActivation:
    """Quantize the input of every matrix-product use of ``name``."""

    name: str
    activation: ActivationQuantizer
    reason: str = ""


@dataclass(frozen=True, eq=False)
class SetTransform:
    """Append explicit input/output transforms to the site ``name``; ``bias`` replaces its bias when given.

    ``clusters``: sizes of clusters of neighbouring input channels, see :class:`~fxcompress.forms.SiteForm`.
    """

    name: str
    transform_in: tuple[Transform, ...] = ()
    transform_out: tuple[Transform, ...] = ()
    bias: Tensor | None = None
    clusters: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, eq=False)
class SetEdge:
    """Quantize the value on an activation edge; ``name`` is the edge's anchor.

    See :mod:`fxcompress.analysis.edges`.
    """

    name: str
    edge: EdgeQuantizer
    reason: str = ""


@dataclass(frozen=True, eq=False)
class FuseSites:
    """Compute the sites ``names`` (same input) as one product at run time; ``name`` is the first of them."""

    names: tuple[str, ...]
    reason: str = ""

    @property
    def name(self) -> str:
        """The parameter this edit is keyed by."""
        return self.names[0]


@dataclass(frozen=True, eq=False)
class Refuse:
    """The pass looked at ``name`` and left it alone, because of ``reason``.

    Changes nothing; feeds the coverage.
    """

    name: str
    reason: str


Edit: TypeAlias = (
    SetTensor | SetWeight | ReviseWeight | SetActivation | SetTransform | SetEdge | FuseSites | Refuse
)


@dataclass(frozen=True)
class Provenance:
    """Which pass did what to a parameter, in order."""

    pass_name: str
    action: str
    reason: str
    error: float | None = None


@dataclass
class CompressionState:
    """The sum of all edits so far over a model's weights.

    Args:
        weights: Original tensors by canonical qualified name (read only; may be lazy).
        tensors: Edited dense values.
        forms: Forms by parameter.
        fused: Sibling sites that run as one product.
        provenance: Which passes did what.
        replaced: Edited dense values that weight terms stand for by now; needed while passes build on them,
            not part of the result.
    """

    weights: Mapping[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    forms: dict[str, SiteForm] = field(default_factory=dict)
    fused: list[tuple[str, ...]] = field(default_factory=list)
    provenance: dict[str, list[Provenance]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """The current *dense* tensor of ``name``: edited value or original.

        Raises:
            RecipeError: ``name`` was already replaced by weight terms and has no dense value any more.
            WeightError: no such parameter.
        """
        if name in self.forms and self.forms[name].terms:
            done_by = ", ".join(p.pass_name for p in self.provenance.get(name, []) if p.action == "SetWeight")
            raise RecipeError(
                f"{name}: already compressed by {done_by or 'an earlier pass'}.", fix="reorder the recipe."
            )
        if name in self.tensors:
            return self.tensors[name]
        try:
            return self.weights[name]
        except KeyError:
            raise WeightError(f"{name}: the model has no such parameter.") from None

    def dense_target(self, name: str) -> Tensor:
        """The dense value that ``name`` has, or had before weight terms replaced it."""
        return self.replaced.get(name, self.weights[name]) if self.is_compressed(name) else self.weight(name)

    def effective(self, name: str) -> Tensor:
        """The value ``name`` has now when computed densely: dequantized terms, edited tensor or original."""
        if name in self.forms and self.forms[name].terms:
            return self.forms[name].dense(self.weights[name].dtype)
        return self.weight(name)

    def is_compressed(self, name: str) -> bool:
        """Whether weight terms replaced ``name``."""
        return name in self.forms and bool(self.forms[name].terms)

    def form(self, name: str) -> SiteForm:
        """The form of ``name`` (empty when untouched)."""
        return self.forms.get(name, SiteForm())

    def apply(self, edit: Edit, pass_name: str) -> None:
        """Add one edit.

        Raises:
            WeightError: unknown parameter, or a replacement of another shape, or with NaN/inf.
            RecipeError: a second weight replacement, or a dense edit after one.
        """
        _check(self, edit)
        error = edit.error if isinstance(edit, SetWeight | ReviseWeight) else None
        if isinstance(edit, SetTensor):
            self.tensors[edit.name] = edit.value
        elif isinstance(edit, SetWeight):
            self.forms[edit.name] = dataclasses.replace(self.form(edit.name), terms=edit.terms)
            if edit.name in self.tensors:
                self.replaced[edit.name] = self.tensors.pop(edit.name)
        elif isinstance(edit, ReviseWeight):
            self.forms[edit.name] = dataclasses.replace(self.form(edit.name), terms=edit.terms)
        elif isinstance(edit, SetActivation):
            self.forms[edit.name] = dataclasses.replace(self.form(edit.name), activation=edit.activation)
        elif isinstance(edit, SetTransform):
            old = self.form(edit.name)
            self.forms[edit.name] = dataclasses.replace(
                old,
                transform_in=old.transform_in + edit.transform_in,
                transform_out=old.transform_out + edit.transform_out,
                bias=old.bias if edit.bias is None else edit.bias,
                clusters=edit.clusters or old.clusters,
            )
        elif isinstance(edit, SetEdge):
            old = self.form(edit.name)
            self.forms[edit.name] = dataclasses.replace(old, edges=(*old.edges, edit.edge))
        elif isinstance(edit, FuseSites):
            self.fused.append(edit.names)
        entry = Provenance(pass_name, type(edit).__name__, edit.reason, error)
        for name in edit.names if isinstance(edit, FuseSites) else (edit.name,):
            self.provenance.setdefault(name, []).append(entry)

    def copy(self) -> CompressionState:
        """An independent state sharing the tensors."""
        return CompressionState(
            self.weights,
            dict(self.tensors),
            dict(self.forms),
            list(self.fused),
            {name: list(entries) for name, entries in self.provenance.items()},
            dict(self.replaced),
        )


def _check(state: CompressionState, edit: Edit) -> None:
    names = edit.names if isinstance(edit, FuseSites) else (edit.name,)
    for name in names:
        if name not in state.weights:
            raise WeightError(f"{name}: the model has no such parameter.")
    if isinstance(edit, SetTensor):
        current = state.weight(edit.name)
        if edit.value.shape != current.shape or edit.value.dtype != current.dtype:
            raise WeightError(
                f"{edit.name}: replacement is {tuple(edit.value.shape)} {edit.value.dtype},"
                f" expected {tuple(current.shape)} {current.dtype}."
            )
        if not bool(torch.isfinite(edit.value).all()):
            raise WeightError(f"{edit.name}: the replacement contains NaN or inf.")
    elif isinstance(edit, SetEdge):
        if any(edge.signature == edit.edge.signature for edge in state.form(edit.name).edges):
            raise RecipeError(
                f"{edit.name}: {edit.edge.argument!r} of this edge is quantized already.",
                fix="quantize each edge once.",
            )
    elif isinstance(edit, SetWeight | ReviseWeight):
        if isinstance(edit, ReviseWeight) and not state.is_compressed(edit.name):
            raise RecipeError(f"{edit.name}: its weight terms were to be revised, but it has none.")
        current = state.weight(edit.name) if isinstance(edit, SetWeight) else state.weights[edit.name]
        shape = current.shape
        for term in edit.terms:
            if tuple(term.parameter_shape) != tuple(shape):
                raise WeightError(
                    f"{edit.name}: term has shape {term.parameter_shape}, expected {tuple(shape)}."
                )
