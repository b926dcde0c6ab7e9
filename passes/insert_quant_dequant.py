"""Put quantize/dequantize pairs where a standard quantized graph has them, and nothing else.

    linear(x, w)                    →  linear(dq(q(x)), dq(codes))                     weights, linear inputs
    attention(query, key, value)    →  attention(dq(q(query)), dq(q(key)), dq(q(value)))
    matmul(a, b);  a + b            →  matmul(dq(q(a)), dq(q(b)));  dq(q(a)) + dq(q(b))

Codes, scales and zero-points as in :mod:`fxcompress.formats.integer` and the activation quantizers of
:mod:`fxcompress.forms`. Which value an op without weights reads is named through the weights around it
(:mod:`fxcompress.analysis.edges`), so that the pairs reappear in every other graph of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fxcompress.analysis.edges import Edge
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.edits import Edit, Refuse, SetActivation, SetEdge, SetWeight
from fxcompress.errors import RecipeError
from fxcompress.formats import IntFormat, quantize_to_term
from fxcompress.forms import ActivationQuantizer, DynamicPerGroup, DynamicPerToken, EdgeQuantizer
from fxcompress.pass_base import BlockContext, Statistics
from fxcompress.passes._grids import cluster_quantizer, static_quantizer
from fxcompress.passes._selection import (
    Candidate,
    Role,
    SelectivePass,
    candidates,
    describe,
    fitting_format,
    not_smaller,
)

_WEIGHT_SPANS = {"tensor": -1, "channel": 0}
_SPANS = ("token", "group", "tensor", "channel")
_ROLES = ("attention", "product", "sum")


@dataclass(frozen=True)
class InsertQuantDequant(SelectivePass):
    """Insert quantize/dequantize pairs.

    Args:
        weights: Span of a weight's scale: ``"tensor"``, ``"channel"``, ``"group"``, or None to leave weights
            alone. Default ``"channel"``.
        weight_bits: 2…8. Default 8. Symmetric at 8, asymmetric below.
        activations: Span of an activation's scale. Dynamic: ``"token"``, ``"group"`` (of channels of a
            token). Static, calibrated: ``"tensor"``, ``"channel"``. None leaves activations alone. Default
            ``"token"``.
        activation_bits: 2…8. Default 8.
        group_size: Inputs that share a scale, where a span is ``"group"``. Default 64.
        edges: Which other ops' inputs to quantize: ``"attention"`` (queries, keys, values), ``"product"``
            (both factors of a product of activations), ``"sum"`` (both sides of a residual sum). Default
            all three.
        heads: Also quantize inputs of output heads and of embeddings used as heads. Default False.
        include, exclude: Name patterns, see :class:`SelectivePass`; an edge goes with its anchor.

    Raises:
        RecipeError: an option is out of range.

    Example:
        >>> InsertQuantDequant(activations="tensor", edges=("attention",)).needs_calibration
        True
    """

    weights: Literal["tensor", "channel", "group"] | None = "channel"
    weight_bits: int = 8
    activations: Literal["token", "group", "tensor", "channel"] | None = "token"
    activation_bits: int = 8
    group_size: int = 64
    edges: tuple[str, ...] = _ROLES
    heads: bool = False

    name: ClassVar[str] = "insert-quant-dequant"
    summary: ClassVar[str] = "Insert quantize/dequantize pairs at weights, inputs, attention and sums."
    source: ClassVar[str] = "Jacob et al., 2018 (arXiv:1712.05877), section 3; ONNX QuantizeLinear"
    provides: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "quantized-activations"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, choices in (("weights", ("tensor", "channel", "group")), ("activations", _SPANS)):
            value = getattr(self, option)
            if value is not None and value not in choices:
                raise RecipeError(
                    f"{self.name}: {option}={value!r}, expected {', '.join(map(repr, choices))} or null."
                )
        for option in ("weight_bits", "activation_bits"):
            value = getattr(self, option)
            if type(value) is not int or not 2 <= value <= 8:
                raise RecipeError(f"{self.name}: {option}={value!r}, expected an integer 2…8.")
        if type(self.group_size) is not int or self.group_size < 1:
            raise RecipeError(f"{self.name}: group_size={self.group_size!r}, expected a positive number.")
        if not isinstance(self.heads, bool):
            raise RecipeError(f"{self.name}: heads={self.heads!r}, expected true or false.")
        given: object = self.edges
        if not isinstance(given, list | tuple) or any(role not in _ROLES for role in given):
            raise RecipeError(f"{self.name}: edges={given!r}, expected a list of {', '.join(_ROLES)}.")
        object.__setattr__(self, "edges", tuple(given))
        object.__setattr__(self, "needs_calibration", self.activations in ("tensor", "channel"))

    @property
    def format(self) -> IntFormat | None:
        """The weights' number format."""
        if self.weights is None:
            return None
        size = _WEIGHT_SPANS.get(self.weights, self.group_size)
        return IntFormat(bits=self.weight_bits, symmetric=self.weight_bits == 8, group_size=size)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield weights, inputs of weight sites, then activation edges; a :class:`Refuse` for the rest."""
        self.check_patterns(block.program)
        taken = candidates(block)
        for candidate in taken:
            yield from self._weight(block, candidate)
        if self.activations is None:
            return
        for candidate in taken:
            yield from self._input(block, candidate)
        chosen: list[Edge] = []
        for edge in block.edges if self.edges else ():
            reason = self._no_edge(block, edge)
            if reason is None:
                chosen.append(edge)
            elif edge.role in self.edges:
                yield Refuse(edge.anchor, f"{edge.argument} of a {edge.role}: {reason}")
        seen = block.edge_statistics(chosen) if chosen and self.needs_calibration else {}
        for edge in chosen:
            quantizer = self._quantizer([seen[edge]] if edge in seen else [], edge.anchor)
            if quantizer is None:
                yield Refuse(
                    edge.anchor, f"{edge.argument} of a {edge.role}: no calibration token reaches it"
                )
            else:
                held = EdgeQuantizer(edge.argument, edge.signature, quantizer)
                yield SetEdge(edge.anchor, held, f"{edge.role}, {held.describe()}")

    def _weight(self, block: BlockContext, candidate: Candidate) -> Iterator[Edit]:
        name, site, fmt = candidate.name, candidate.primary, self.format
        if block.state.is_compressed(name):
            return
        reason = self.unselected(block.program, name)
        if reason is None and site.kind is SiteKind.OTHER:
            reason = site.reason or "no use of it is a product or a look-up"
        if reason is None and fmt is None:
            reason = "weights are left alone (weights=null)"
        if reason is not None or fmt is None:
            yield Refuse(name, reason or "")
            return
        weight = block.weight(name)
        fmt, note = fitting_format(fmt, site.layout.matrix_shape[2])
        too_big = not_smaller(fmt, site, weight.dtype)
        if too_big is not None:
            yield Refuse(name, too_big)
            return
        yield SetWeight(name, (quantize_to_term(weight, site.layout, fmt),), f"{describe(fmt)}{note}")

    def _input(self, block: BlockContext, candidate: Candidate) -> Iterator[Edit]:
        reason = self._no_input(block, candidate)
        if reason is not None:
            yield Refuse(candidate.name, f"input: {reason}")
            return
        sites = [site for site in candidate.here if site.takes_activation]
        seen = block.statistics(sites) if self.needs_calibration else {}
        quantizer = self._quantizer(list(seen.values()), candidate.name)
        if quantizer is None:
            yield Refuse(candidate.name, "input: no calibration token reaches it")
        else:
            yield SetActivation(candidate.name, quantizer, quantizer.describe())

    def _quantizer(self, seen: Sequence[Statistics], name: str) -> ActivationQuantizer | None:
        """The quantizer of one value; None when calibration never saw it."""
        if self.activations == "token":
            return DynamicPerToken(self.activation_bits)
        if self.activations == "group":
            return DynamicPerGroup(self.activation_bits, self.group_size)
        found = [statistics for statistics in seen if statistics.count]
        if not found:
            return None
        lows, highs = [seen.minimum for seen in found], [seen.maximum for seen in found]  # [K] each
        if self.activations == "tensor":
            return static_quantizer(torch.cat(lows).min(), torch.cat(highs).max(), self.activation_bits, name)
        low, high = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
        return cluster_quantizer(low, high, (1,) * low.numel(), self.activation_bits, name)

    def _no_input(self, block: BlockContext, candidate: Candidate) -> str | None:
        products = [site for site in candidate.here if site.takes_activation]
        reason = self.unselected(block.program, candidate.name)
        if reason is not None:
            return reason
        if not products:
            return "it is looked up, not multiplied"
        if block.state.form(candidate.name).activation is not None:
            return "it is quantized already"
        if candidate.role is not Role.MATRIX and not self.heads:
            return f"{candidate.role.value}: stays unquantized (heads=False)"
        if self.activations != "tensor" and any(map(_needs_one_scale, products)):
            return "a scale per token or channel does not fit this product (use activations='tensor')"
        if self.activations == "channel" and len({site.layout for site in products}) > 1:
            return "the weight is used in two directions, which one scale per channel cannot serve"
        outside = any(site.takes_activation for site in candidate.uses if site not in candidate.here)
        if self.needs_calibration and outside:
            return "the weight is used in several blocks, which one static range cannot serve"
        return None

    def _no_edge(self, block: BlockContext, edge: Edge) -> str | None:
        if edge.role not in self.edges:
            return "not asked for"
        if edge.reason:
            return edge.reason
        held = block.state.form(edge.anchor).edges
        if any(known.signature == edge.signature for known in held):
            return "it is quantized already"
        return self.unselected(block.program, edge.anchor)


def _needs_one_scale(site: Site) -> bool:
    """Whether the last dimension of the input is not all that this product sums over."""
    return site.kind in (SiteKind.CONV, SiteKind.CONV_TRANSPOSED, SiteKind.EINSUM)
