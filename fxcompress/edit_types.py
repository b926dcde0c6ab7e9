"""The kinds of edits: serialisable changes that a pass yields, each keyed by a parameter's full name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from fxcompress.forms import (
    ActivationQuantizer,
    CacheForm,
    Component,
    EdgeQuantizer,
    SparsityMask,
    Transform,
    WeightTerm,
)


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
class SetMask:
    """Prune ``name``: its dense value becomes ``value``, and stays zero where the mask says so.

    A mask may replace an earlier one that keeps no fewer entries; an N:M pattern stays.
    """

    name: str
    value: Tensor
    mask: SparsityMask
    reason: str = ""
    error: float | None = None


@dataclass(frozen=True, eq=False)
class SetSensitivity:
    """Note how much pruning ``name`` would hurt, for passes that divide zeros among layers.

    Args:
        measure: What ``value`` is; see :mod:`fxcompress.passes.allocate_sparsity`.
        value: The larger, the fewer zeros.
        spread: How far the sparsity of a layer may lie from the mean of all.
        bounds: Least and greatest sparsity of a layer.
    """

    name: str
    measure: str
    value: float
    spread: float
    bounds: tuple[float, ...] = (0.0, 1.0)
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Repack:
    """Store ``name`` by other ``terms`` of exactly the same value."""

    name: str
    terms: tuple[WeightTerm, ...]
    reason: str = ""


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
class SetCache:
    """Keep keys and values of an attention in the form ``cache``.

    ``name`` is the weight its values come from last.
    """

    name: str
    cache: CacheForm
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
class KeepUnits:
    """Keep the units ``kept`` of a channel group and cut the others.

    Until the end of the pass they are masked (zeroed); then the model is cut, which computes the same.
    See :mod:`fxcompress.analysis.channel_group`.

    Args:
        group: The group's name, which begins with the name of a parameter.
        kept: ``[n]`` int64, ascending, at least one.
    """

    group: str
    kept: Tensor
    reason: str = ""

    @property
    def name(self) -> str:
        """The parameter this edit is keyed by."""
        return self.group.rpartition(":")[0]


@dataclass(frozen=True, eq=False)
class RemoveBlock:
    """Take a repeated block out of the model: what enters it leaves it.

    ``name`` is any parameter that only this block uses. Until the end of the pass the block is stepped over.
    """

    name: str
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Refuse:
    """The pass looked at ``name`` and left it alone, because of ``reason``.

    Changes nothing; feeds the coverage.
    """

    name: str
    reason: str


StructuralEdit: TypeAlias = KeepUnits | RemoveBlock
Edit: TypeAlias = (
    SetTensor
    | SetWeight
    | ReviseWeight
    | SetMask
    | SetSensitivity
    | Repack
    | SetActivation
    | SetTransform
    | SetEdge
    | SetCache
    | FuseSites
    | StructuralEdit
    | Refuse
)


@dataclass(frozen=True)
class Provenance:
    """Which pass did what to a parameter, in order."""

    pass_name: str
    action: str
    reason: str
    error: float | None = None


def names_of(edit: Edit) -> tuple[str, ...]:
    """The parameters that an edit is for."""
    return edit.names if isinstance(edit, FuseSites) else (edit.name,)


def floats_of(edit: Edit) -> Iterator[tuple[str, Tensor]]:
    """Floating tensors inside the components of an edit."""
    parts: list[Component] = []
    if isinstance(edit, SetWeight | ReviseWeight | Repack):
        parts = list(edit.terms)
    elif isinstance(edit, SetActivation):
        parts = [edit.activation]
    elif isinstance(edit, SetEdge):
        parts = [edit.edge]
    elif isinstance(edit, SetCache):
        parts = [edit.cache]
    elif isinstance(edit, SetTransform):
        parts = [*edit.transform_in, *edit.transform_out]
        if edit.bias is not None:
            yield "bias", edit.bias
    for part in parts:
        for key, tensor in part.tensors().items():
            if tensor.is_floating_point():  # there is no isfinite for 8-bit floating point
                yield key, tensor.float() if tensor.element_size() == 1 else tensor
