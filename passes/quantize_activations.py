"""Quantize the inputs of matrix products.

    linear(x, w)  →  linear(dequantize(quantize(x)), w)

Dynamic: one symmetric scale per token, computed while the model runs (ZeroQuant, Yao et al., 2022, section
4.1). Static: one scale and zero-point per site, from the least and the greatest value met in calibration.
Keeps: the weight, the bias and the shape and dtype of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.edits import Edit, Refuse, SetActivation
from fxcompress.errors import RecipeError
from fxcompress.forms import (
    ActivationQuantizer,
    DynamicPerToken,
    FloatPerToken,
)
from fxcompress.pass_base import BlockContext
from fxcompress.passes._grids import cluster_quantizer, static_float_quantizer, static_quantizer
from fxcompress.passes._selection import Candidate, Role, SelectivePass, candidates, float_kind

_CONVOLUTIONS = (SiteKind.CONV, SiteKind.CONV_TRANSPOSED)


@dataclass(frozen=True)
class QuantizeActivations(SelectivePass):
    """Quantize the input of every matrix product.

    Args:
        format: ``"int"`` (default), ``"fp8-e4m3"`` or ``"fp8-e5m2"`` (8-bit floating point, no zero-point).
        bits: Code width, 2…8. Default 8.
        mode: ``"dynamic"``: per token, no data needed. ``"static"``: per tensor, calibrated; cheaper at run
            time and possible for convolutions, but one outlier widens the grid for all. ``"cluster"``: per
            cluster of channels, calibrated, for inputs that reorder-channels has put in order. Default
            ``"dynamic"``.
        heads: Also quantize the inputs of output heads and of tied embeddings. Default False: their result is
            the model's output, and no later layer evens out its error.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range.
        CalibrationError: (static) the calibration data gave NaN or inf.

    Example:
        >>> QuantizeActivations(mode="static").needs_calibration
        True
    """

    format: str = field(default="int", kw_only=True)
    bits: int = 8
    mode: Literal["dynamic", "static", "cluster"] = "dynamic"
    heads: bool = False

    name: ClassVar[str] = "quantize-activations"
    summary: ClassVar[str] = "Quantize the inputs of matrix products, per token or calibrated per tensor."
    source: ClassVar[str] = "Yao et al., 2022 (ZeroQuant, arXiv:2206.01861), section 4.1"
    provides: ClassVar[frozenset[str]] = frozenset({"quantized-activations"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise RecipeError(f"{self.name}: bits={self.bits!r}, expected an integer 2…8.")
        if self.mode not in ("dynamic", "static", "cluster"):
            raise RecipeError(f"{self.name}: mode={self.mode!r}, expected 'dynamic', 'static' or 'cluster'.")
        if self.mode == "cluster" and self.format != "int":
            raise RecipeError(f"{self.name}: mode='cluster' does not apply to format={self.format!r}.")
        if not isinstance(self.heads, bool):
            raise RecipeError(f"{self.name}: heads={self.heads!r}, expected true or false.")
        float_kind(self.name, self.format, self.bits)
        # Only one of the modes needs data; an instance may say so, the class cannot.
        object.__setattr__(self, "needs_calibration", self.mode != "dynamic")

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetActivation` or a :class:`Refuse` for every weight of the block."""
        self.check_patterns(block.program)
        chosen = []
        for candidate in candidates(block):
            reason = self._unsuitable(block, candidate)
            if reason is None:
                chosen.append(candidate)
            else:
                yield Refuse(candidate.name, reason)
        if self.mode == "dynamic":
            kind = float_kind(self.name, self.format, self.bits)
            dynamic = DynamicPerToken(self.bits) if kind is None else FloatPerToken(kind)
            for candidate in chosen:
                yield SetActivation(candidate.name, dynamic, dynamic.describe())
            return
        statistics = (
            block.statistics([site for candidate in chosen for site in _products(candidate)])
            if chosen
            else {}
        )
        for candidate in chosen:
            found = [statistics[site.input.name] for site in _products(candidate) if site.input is not None]
            if all(seen.count == 0 for seen in found):
                yield Refuse(candidate.name, "no calibration token reaches it")
                continue
            lows = [seen.minimum for seen in found if seen.count]  # [K] each; two directions differ in K
            highs = [seen.maximum for seen in found if seen.count]
            low, high = torch.cat(lows).min(), torch.cat(highs).max()
            if self.mode == "cluster":
                clusters = block.state.form(candidate.name).clusters
                quantizer: ActivationQuantizer = cluster_quantizer(
                    torch.stack(lows).amin(0), torch.stack(highs).amax(0), clusters, self.bits, candidate.name
                )
            else:
                quantizer = self._static(low, high, candidate.name)
            reason = f"{quantizer.describe()}, calibrated range {float(low):.4g}…{float(high):.4g}"
            yield SetActivation(candidate.name, quantizer, reason)

    def _static(self, low: Tensor, high: Tensor, name: str) -> ActivationQuantizer:
        kind = float_kind(self.name, self.format, self.bits)
        if kind is None:
            return static_quantizer(low, high, self.bits, name)
        return static_float_quantizer(torch.maximum(-low, high), kind, name)

    def _unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        reason = self.unselected(block.program, candidate.name)
        products = _products(candidate)
        if reason is not None:
            return reason
        if not products:
            return candidate.primary.reason or "its input is looked up, not multiplied"
        if block.state.form(candidate.name).activation is not None:
            return "its input is quantized already"
        if candidate.role is not Role.MATRIX and not self.heads:
            return f"{candidate.role.value}: its input stays unquantized (heads=False)"
        if self.mode == "cluster":
            width = candidate.primary.layout.matrix_shape[2]
            if sum(block.state.form(candidate.name).clusters) != width:
                return "its input channels are in no clusters (run reorder-channels first)"
        if self.mode != "dynamic":
            outside = any(site.takes_activation for site in candidate.uses if site not in candidate.here)
            return "used in several blocks, which one static range cannot serve" if outside else None
        return next((why for why in map(_no_tokens, products) if why is not None), None)


def _products(candidate: Candidate) -> list[Site]:
    return [site for site in candidate.here if site.takes_activation]


def _no_tokens(site: Site) -> str | None:
    """Why a scale per token (all dimensions but the last) would not factor out of this product."""
    if site.kind in _CONVOLUTIONS:
        return "a convolution sums over positions and channels: it has no scale per token (use mode='static')"
    if site.kind is SiteKind.EINSUM and not _contracts_last(site):
        return "its einsum does not sum over the last dimension only: no scale per token (use mode='static')"
    return None


def _contracts_last(site: Site) -> bool:
    """Whether exactly the last subscript of the activation is summed over."""
    equation, operands = site.node.args[0], site.node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list | tuple) or len(operands) != 2:
        return False
    terms, output = equation.replace(" ", "").split("->")
    mine = terms.split(",")[list(operands).index(site.input)]
    return [letter for letter in mine if letter not in output] == [mine[-1]]
