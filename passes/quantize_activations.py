"""Quantize the inputs of matrix products.

    linear(x, w)  →  linear(dequantize(quantize(x)), w)

Dynamic: one symmetric scale per token, computed while the model runs (ZeroQuant, Yao et al., 2022, section
4.1). Static: one scale and zero-point per site, from the least and the greatest value met in calibration.
Keeps: the weight, the bias and the shape and dtype of the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.edits import Edit, Refuse, SetActivation
from fxcompress.errors import RecipeError
from fxcompress.forms import ActivationQuantizer, DynamicPerToken, FloatPerToken
from fxcompress.pass_base import BlockContext
from fxcompress.passes._grids import cluster_quantizer, static_float_quantizer, static_quantizer
from fxcompress.passes._input_rows import unsupported
from fxcompress.passes._output_error import input_error, sample_rows
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
        max_error: Leave the inputs of sites as they are ("16-bit") where quantizing them would change the
            sites' outputs by more than this: ‖(x − Q(x))·Wᵀ‖ / ‖x·Wᵀ‖ on calibration tokens, the largest of
            the sites that read the value. Needs data. Default None: quantize all. A second pass of the other
            mode may take what this one left.
        tokens: Calibration tokens ``max_error`` is judged on. Default 256.
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
    max_error: float | None = None
    tokens: int = 256

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
        if self.max_error is not None and (
            type(self.max_error) not in (int, float) or not 0 < self.max_error < math.inf
        ):
            raise RecipeError(f"{self.name}: max_error={self.max_error!r}, expected a positive number.")
        if type(self.tokens) is not int or self.tokens < 1:
            raise RecipeError(f"{self.name}: tokens={self.tokens!r}, expected a positive integer.")
        float_kind(self.name, self.format, self.bits)
        # Only some settings need data; an instance may say so, the class cannot.
        needs = self.mode != "dynamic" or self.max_error is not None
        object.__setattr__(self, "needs_calibration", needs)

    def activation_format(self) -> tuple[str, int] | None:
        """See :meth:`Pass.activation_format`."""
        return (self.mode, self.bits) if self.format == "int" and self.mode != "cluster" else None

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
        if chosen and self.mode != "dynamic":  # all at once: the block runs once
            block.statistics([site for candidate in chosen for site in _products(candidate)])
        edits = [self._quantizer(block, candidate) for candidate in chosen]
        if self.max_error is not None:
            edits = self._only_harmless(block, chosen, edits)
        yield from edits

    def _quantizer(self, block: BlockContext, candidate: Candidate) -> SetActivation | Refuse:
        if self.mode == "dynamic":
            kind = float_kind(self.name, self.format, self.bits)
            dynamic = DynamicPerToken(self.bits) if kind is None else FloatPerToken(kind)
            return SetActivation(candidate.name, dynamic, dynamic.describe())
        statistics = block.statistics(_products(candidate))
        inputs = [statistics[site.input.name] for site in _products(candidate) if site.input is not None]
        found = [seen for seen in inputs if seen.count]
        if not found:
            return Refuse(candidate.name, "no calibration token reaches it")
        low = torch.stack([seen.minimum.min() for seen in found]).min()
        high = torch.stack([seen.maximum.max() for seen in found]).max()
        quantizer: ActivationQuantizer
        if self.mode == "cluster":
            lows = torch.stack([seen.minimum for seen in found]).amin(0)  # [K]
            highs = torch.stack([seen.maximum for seen in found]).amax(0)
            clusters = block.state.form(candidate.name).clusters
            quantizer = cluster_quantizer(lows, highs, clusters, self.bits, candidate.name)
        else:
            quantizer = self._static(low, high, candidate.name)
        reason = f"{quantizer.describe()}, calibrated range {float(low):.4g}…{float(high):.4g}"
        return SetActivation(candidate.name, quantizer, reason)

    def _only_harmless(
        self, block: BlockContext, chosen: Sequence[Candidate], edits: Sequence[SetActivation | Refuse]
    ) -> list[SetActivation | Refuse]:
        """Refuse what would change outputs by more than ``max_error``."""
        assert self.max_error is not None
        sites = [site for candidate in chosen for site in _products(candidate)]
        samples = sample_rows(block, [site for site in sites if unsupported(site) is None], self.tokens)
        found: list[float | str] = []
        worst: dict[fx.Node, float] = {}  # sites that read one value are decided together
        for candidate, edit in zip(chosen, edits, strict=True):
            products = _products(candidate)
            why = next((reason for site in products if (reason := unsupported(site)) is not None), None)
            if isinstance(edit, Refuse) or why is not None:
                found.append(why or "")
                continue
            error = max(input_error(block, site, samples[site], edit.activation) for site in products)
            found.append(error)
            for site in products:
                assert site.input is not None
                worst[site.input] = max(error, worst.get(site.input, 0.0))
        kept: list[SetActivation | Refuse] = []
        for candidate, edit, error_or_why in zip(chosen, edits, found, strict=True):
            if isinstance(edit, Refuse):
                kept.append(edit)
            elif isinstance(error_or_why, str):
                kept.append(Refuse(edit.name, f"its error cannot be measured (max_error): {error_or_why}"))
            else:
                error = max(worst[site.input] for site in _products(candidate) if site.input is not None)
                words = f"quantizing its input changes outputs by {error:.2g}"
                if error > self.max_error:
                    kept.append(Refuse(edit.name, f"{words}, more than max_error={self.max_error:g}"))
                else:
                    kept.append(dataclasses.replace(edit, reason=f"{edit.reason}; error {error:.2g}"))
        return kept

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
