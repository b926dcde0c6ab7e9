"""The normal form of a weight site: ``y = T_out(Σ term_i(Q_act(T_in(x)))) + bias``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.forms.activation import ActivationQuantizer
from fxcompress.forms.cache import CacheForm
from fxcompress.forms.component import Component, component
from fxcompress.forms.emit import Emit
from fxcompress.forms.terms import WeightTerm


@dataclass(frozen=True, eq=False)
class Transform(Component):
    """A change of the site's input or output basis that could not be folded into a neighbour."""

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """Describe the transformed ``x: [..., K]`` of ``dtype``; see :mod:`fxcompress.forms.emit`."""
        raise FormatError(f"{type(self).__name__} does not implement emit()")


def _as(emit: Emit, field: str, value: Tensor, dtype: torch.dtype) -> Any:
    """The component's tensor ``field``, whose value is ``value``, in ``dtype``."""
    tensor = emit.tensor(field)
    return tensor if value.dtype == dtype else emit.call(torch.ops.aten.to.dtype, tensor, dtype)


@component("scale")
@dataclass(frozen=True, eq=False)
class Scale(Transform):
    """Multiply the last dimension by ``factor: [K]``."""

    factor: Tensor

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """A product in the dtype of ``x``."""
        return emit.call(torch.ops.aten.mul.Tensor, x, _as(emit, "factor", self.factor, dtype))


@component("permute")
@dataclass(frozen=True, eq=False)
class Permute(Transform):
    """Reorder the last dimension: channel p of the result is channel ``order[p]``.

    Args:
        order: ``[K]`` int64, a permutation.
    """

    order: Tensor

    def __post_init__(self) -> None:
        if self.order.dim() != 1 or self.order.dtype != torch.int64:
            raise FormatError(
                f"Permute: order is {tuple(self.order.shape)} {self.order.dtype}, expected an int64 vector."
            )

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """A gather."""
        return emit.call(torch.ops.aten.index_select.default, x, -1, emit.tensor("order"))


@component("shift")
@dataclass(frozen=True, eq=False)
class Shift(Transform):
    """Add ``offset: [K]`` to the last dimension."""

    offset: Tensor

    def emit(self, x: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """A sum in the dtype of ``x``."""
        return emit.call(torch.ops.aten.add.Tensor, x, _as(emit, "offset", self.offset, dtype))


@component("edge-quantizer")
@dataclass(frozen=True, eq=False)
class EdgeQuantizer(Component):
    """Quantize one argument of an op that is no weight site, see :mod:`fxcompress.analysis.edges`.

    Args:
        argument: Name of the argument.
        signature: The edge's name, the same in every graph of the model.
        quantizer: How.
    """

    argument: str
    signature: str
    quantizer: ActivationQuantizer

    def describe(self) -> str:
        """E.g. ``"query: int8 activations per token"``."""
        return f"{self.argument}: {self.quantizer.describe()}"


@component("site-form")
@dataclass(frozen=True, eq=False)
class SiteForm(Component):
    """How a site computes after compression. An empty form leaves the site as it was.

    Args:
        terms: Summands that replace the weight; empty = the (possibly edited) dense weight.
        activation: Quantizer of the site's input, or None.
        transform_in: Applied to the input in order, before the quantizer. A look-up has no such input: with
            ``W·diag(factor)`` in place of W it gives its rows times the factor, so a ``Scale`` is applied to
            its result.
        transform_out: Applied to the output in order, before the bias.
        bias: Replacement bias ``[N]``, or None to keep the model's own.
        clusters: Sizes of clusters of neighbouring input channels (after ``transform_in``) with similar
            ranges, which an activation quantizer may use. Empty: not clustered.
        edges: Quantizers of values computed from this weight last, where ops other than weight sites read
            them.
        cache: How the cache of the attention whose values come from this weight is kept, or None.
    """

    terms: tuple[WeightTerm, ...] = ()
    activation: ActivationQuantizer | None = None
    transform_in: tuple[Transform, ...] = ()
    transform_out: tuple[Transform, ...] = ()
    bias: Tensor | None = None
    clusters: tuple[int, ...] = ()
    edges: tuple[EdgeQuantizer, ...] = ()
    cache: CacheForm | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Sum of the terms in the parameter's shape.

        Raises:
            FormatError: the form has no terms.
        """
        if not self.terms:
            raise FormatError("SiteForm.dense: the form has no weight terms.")
        total = self.terms[0].dense(dtype)
        for term in self.terms[1:]:
            total = total + term.dense(dtype)
        return total
