"""The sum of a run's edits, and what makes an edit illegal; the kinds of edits are in ``edit_types``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxcompress.analysis.channel_group import Route
from fxcompress.edit_types import (
    Edit,
    FuseSites,
    KeepUnits,
    Provenance,
    Refuse,
    RemoveBlock,
    Repack,
    ReviseWeight,
    SetActivation,
    SetCache,
    SetEdge,
    SetMask,
    SetSensitivity,
    SetTensor,
    SetTransform,
    SetWeight,
    StructuralEdit,
    floats_of,
)
from fxcompress.errors import RecipeError, WeightError
from fxcompress.forms import SiteForm, SparsityMask, WeightTerm
from fxcompress.forms.mask import groups_over

__all__ = [
    "CompressionState",
    "Edit",
    "FuseSites",
    "KeepUnits",
    "Provenance",
    "Refuse",
    "RemoveBlock",
    "Repack",
    "ReviseWeight",
    "SetActivation",
    "SetCache",
    "SetEdge",
    "SetMask",
    "SetSensitivity",
    "SetTensor",
    "SetTransform",
    "SetWeight",
    "StructuralEdit",
    "floats_of",
    "without_branches",
]


@dataclass
class CompressionState:
    """The sum of all edits so far over a model's weights.

    Args:
        weights: Original tensors by canonical qualified name (read only; may be lazy).
        tensors: Edited dense values.
        forms: How the sites of a parameter compute.
        fused: Sites computed as one product.
        provenance: Who did what to a parameter.
        kept: Units kept of every channel group that the next cut makes smaller, by the group's name.
        removed: A parameter of every block that the next cut removes.
        closed: Op in which units compete → ``(where, [gone])``: units that must lose there.
        masks: Masks of pruned parameters.
        unpruned: What a pruned parameter was before, until another edit changes it.
        sensitivities: See :class:`SetSensitivity`.
        replaced: Edited dense values that weight terms stand for by now; needed while passes build on them,
            not part of the result.
    """

    weights: Mapping[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    forms: dict[str, SiteForm] = field(default_factory=dict)
    fused: list[tuple[str, ...]] = field(default_factory=list)
    provenance: dict[str, list[Provenance]] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    closed: dict[str, tuple[Route, Tensor]] = field(default_factory=dict)
    masks: dict[str, SparsityMask] = field(default_factory=dict)
    unpruned: dict[str, Tensor] = field(default_factory=dict)
    sensitivities: dict[str, SetSensitivity] = field(default_factory=dict)
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

    def rewrites(self, name: str) -> bool:
        """Whether the form of ``name`` changes the graphs it is in; that of a cache alone does not."""
        form = self.form(name)
        inputs = form.transform_in or form.transform_out or form.activation is not None
        return bool(form.terms or inputs or form.bias is not None or form.edges)

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
        error = edit.error if isinstance(edit, SetWeight | ReviseWeight | SetMask) else None
        if isinstance(edit, SetTensor):
            self.tensors[edit.name] = edit.value
            self.unpruned.pop(edit.name, None)
        elif isinstance(edit, SetWeight | ReviseWeight | Repack):
            self.forms[edit.name] = dataclasses.replace(self.form(edit.name), terms=edit.terms)
            if edit.name in self.tensors:
                self.replaced[edit.name] = self.tensors.pop(edit.name)
            self.unpruned.pop(edit.name, None)
        elif isinstance(edit, SetMask):
            self.unpruned.setdefault(edit.name, self.weight(edit.name))
            self.tensors[edit.name] = edit.value
            self.masks[edit.name] = edit.mask
        elif isinstance(edit, SetSensitivity):
            self.sensitivities[edit.name] = edit
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
        elif isinstance(edit, SetCache):
            self.forms[edit.name] = dataclasses.replace(self.form(edit.name), cache=edit.cache)
        elif isinstance(edit, FuseSites):
            self.fused.append(edit.names)
        elif isinstance(edit, KeepUnits):
            self.kept[edit.group] = edit.kept
        elif isinstance(edit, RemoveBlock):
            self.removed = (*self.removed, edit.name)
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
            dict(self.kept),
            self.removed,
            dict(self.closed),
            dict(self.masks),
            dict(self.unpruned),
            dict(self.sensitivities),
            dict(self.replaced),
        )


def _check(state: CompressionState, edit: Edit) -> None:
    names = edit.names if isinstance(edit, FuseSites) else (edit.name,)
    for name in names:
        if name not in state.weights:
            raise WeightError(f"{name}: the model has no such parameter.")
    if isinstance(edit, SetTensor):
        _check_value(state, edit.name, edit.value)
        _check_zeros(state, edit.name, edit.value)
    elif isinstance(edit, SetMask):
        _check_mask(state, edit)
    elif isinstance(edit, SetEdge):
        if any(edge.signature == edit.edge.signature for edge in state.form(edit.name).edges):
            raise RecipeError(
                f"{edit.name}: {edit.edge.argument!r} of this edge is quantized already.",
                fix="quantize each edge once.",
            )
    elif isinstance(edit, SetCache):
        held = state.form(edit.name).cache
        if held is not None and not held.exact:
            raise RecipeError(f"{edit.name}: the cache of its attention is quantized already.")
    elif isinstance(edit, SetWeight):
        _check_terms(edit.name, edit.terms, state.weight(edit.name))
        if edit.name in state.masks:
            _check_zeros(state, edit.name, _sum(edit.terms, state.weight(edit.name).dtype))
    elif isinstance(edit, ReviseWeight):
        if not state.is_compressed(edit.name):
            raise RecipeError(f"{edit.name}: its weight terms were to be revised, but it has none.")
        _check_terms(edit.name, edit.terms, state.weights[edit.name])
        if edit.name in state.masks:
            stored = without_branches(edit.terms)
            _check_zeros(state, edit.name, _sum(stored, state.weights[edit.name].dtype))
    elif isinstance(edit, Repack):
        current = state.effective(edit.name)
        _check_terms(edit.name, edit.terms, current)
        if not torch.equal(_sum(edit.terms, current.dtype), current):
            raise WeightError(f"{edit.name}: Repack must keep the value, and it changes.")


def _check_value(state: CompressionState, name: str, value: Tensor) -> None:
    current = state.weight(name)
    if value.shape != current.shape or value.dtype != current.dtype:
        raise WeightError(
            f"{name}: replacement is {tuple(value.shape)} {value.dtype},"
            f" expected {tuple(current.shape)} {current.dtype}."
        )
    if not bool(torch.isfinite(value).all()):
        raise WeightError(f"{name}: the replacement contains NaN or inf.")


def _check_terms(name: str, terms: tuple[WeightTerm, ...], current: Tensor) -> None:
    for term in terms:
        if tuple(term.parameter_shape) != tuple(current.shape):
            raise WeightError(
                f"{name}: term has shape {term.parameter_shape}, expected {tuple(current.shape)}."
            )


def without_branches(terms: tuple[WeightTerm, ...]) -> tuple[WeightTerm, ...]:
    """The terms that hold a pruned weight's zeros: a low-rank branch beside them is a product of its own."""
    return tuple(term for term in terms if not term.factored) or terms


def _sum(terms: tuple[WeightTerm, ...], dtype: torch.dtype) -> Tensor:
    return SiteForm(terms=terms).dense(dtype)


def _check_zeros(state: CompressionState, name: str, value: Tensor) -> None:
    """Refuse a value that is not zero where the parameter was pruned."""
    mask = state.masks.get(name)
    filled = 0 if mask is None else mask.broken_by(value)
    if filled and mask is not None:
        done_by = [entry.pass_name for entry in state.provenance.get(name, []) if entry.action == "SetMask"]
        raise RecipeError(
            f"{name}: would fill {filled} of the {mask.pruned} entries that {done_by[-1]} pruned.",
            fix="put the pruning pass behind this one, or keep the weight out of one of them.",
        )


def _check_mask(state: CompressionState, edit: SetMask) -> None:
    name, mask, old = edit.name, edit.mask, state.masks.get(edit.name)
    _check_value(state, name, edit.value)
    if mask.keep.shape != edit.value.shape:
        raise WeightError(
            f"{name}: mask has shape {tuple(mask.keep.shape)}, expected {tuple(edit.value.shape)}."
        )
    filled = mask.broken_by(edit.value)
    if filled:
        raise WeightError(f"{name}: {filled} entries are masked and not zero.")
    if old is None:
        return
    if mask.pruned < old.pruned:
        raise RecipeError(
            f"{name}: a mask of {mask.pruned} zeros would replace one of {old.pruned}.",
            fix="prune at least as much as the pass before.",
        )
    if old.m and groups_over(mask.matrix, old.n, old.m):
        raise RecipeError(
            f"{name}: the new mask does not keep the {old.n}:{old.m} pattern of the old one.",
            fix="use one pattern in a recipe.",
        )
