"""Quantize a block's weights and activations, then train it to give what the original block gave.

    block(x; w, b)  →  block(quantized x; quantize(w'), b')    w', b' minimise ‖block − quantized block‖²

Layer-by-layer knowledge distillation of ZeroQuant (Yao et al., 2022, section 4.3): no labels, and one block
at a time, on the inputs that the already quantized blocks before it give. Rounding has no gradient; it is
passed straight through. Keeps: every shape, and all parameters of other blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.analysis.site_types import SiteKind
from fxcompress.edits import Edit, Refuse, SetActivation, SetTensor, SetWeight
from fxcompress.errors import CalibrationError, FormatError, RecipeError
from fxcompress.formats import IntFormat, quantize_to_term
from fxcompress.forms import DynamicPerToken, QuantizedWeight, WeightLayout
from fxcompress.ops.straight_through import straight_through
from fxcompress.pass_base import BlockContext, BlockFunction
from fxcompress.passes._selection import (
    Candidate,
    Role,
    SelectivePass,
    candidates,
    check_group_size,
    describe,
    fitting_format,
    not_smaller,
)

_LOOKS = 4  # how often the loss over all batches is taken; the best moment is kept


@dataclass(frozen=True)
class LayerDistill(SelectivePass):
    """Group-wise weights and token-wise activations, each block distilled from the original.

    Args:
        bits: Width of weight codes, 2…8. Default 8.
        group_size: Inputs that share a scale; 0 = one scale per row. Default: 0 for 8 bits, 64 below.
        activation_bits: Width of activation codes, per token; None leaves activations alone. Default 8.
        steps: Optimiser steps per block, one batch each. Default 100 (the authors' code).
        learning_rate: Of Adam, relative to the root mean square of each tensor, so that one value serves
            layers of every scale. Default 1e-3.
        train_floats: Also train what stays in floating point: gains and biases that only this block uses.
            Default True.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError, FormatError: an option is out of range.
        CalibrationError: the loss is NaN or inf.

    Example:
        >>> LayerDistill(bits=4).format
        IntFormat(bits=4, symmetric=False, group_size=64)
    """

    bits: int = 8
    group_size: int | None = None
    activation_bits: int | None = 8
    steps: int = 100
    learning_rate: float = 1e-3
    train_floats: bool = True

    name: ClassVar[str] = "layer-distill"
    summary: ClassVar[str] = "Quantize weights and activations, and distil each block from the original."
    source: ClassVar[str] = "Yao et al., 2022 (ZeroQuant, arXiv:2206.01861), section 4"
    provides: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "quantized-activations"})
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.steps) is not int or self.steps < 0:
            raise RecipeError(f"{self.name}: steps={self.steps!r}, expected a number of steps.")
        rate = self.learning_rate
        if type(rate) not in (int, float) or not 0 < rate < math.inf:
            raise RecipeError(f"{self.name}: learning_rate={rate!r}, expected a positive number.")
        if not isinstance(self.train_floats, bool):
            raise RecipeError(f"{self.name}: train_floats={self.train_floats!r}, expected true or false.")
        width = self.activation_bits
        if width is not None and (type(width) is not int or not 2 <= width <= 8):
            raise RecipeError(f"{self.name}: activation_bits={width!r}, expected 2…8 or null.")
        try:
            _ = self.format
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}") from None

    @property
    def format(self) -> IntFormat:
        """The weights' number format: symmetric at 8 bits, asymmetric below."""
        eight = self.bits == 8
        size = (0 if eight else 64) if self.group_size is None else self.group_size
        return IntFormat(bits=self.bits, symmetric=eight, group_size=size)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield activations, then distilled tensors and codes; a :class:`Refuse` for other weights."""
        self.check_patterns(block.program)
        if block.index == 0 and self.group_size is not None:
            check_group_size(self.name, block.program, self.group_size)
        chosen: list[Candidate] = []
        for candidate in candidates(block):
            reason = self._unsuitable(block, candidate)
            if reason is None:
                chosen.append(candidate)
            else:
                yield Refuse(candidate.name, reason)
        if not chosen:
            return
        for candidate in chosen:
            linear = all(site.kind is SiteKind.LINEAR for site in candidate.uses)
            free = block.state.form(candidate.name).activation is None
            if self.activation_bits is not None and linear and free:
                quantizer = DynamicPerToken(self.activation_bits)
                yield SetActivation(candidate.name, quantizer, quantizer.describe())
        yield from self._distil(block, chosen)

    def _distil(self, block: BlockContext, chosen: Sequence[Candidate]) -> Iterator[Edit]:
        function = block.function()
        formats = {
            c.name: (c.primary.layout, fitting_format(self.format, c.primary.layout.matrix_shape[2])[0])
            for c in chosen
        }
        names = [*formats, *(self._floats(block, function, formats) if self.train_floats else ())]
        start = {name: block.weight(name).detach() for name in names}
        keep = {name: mask.keep for name, mask in block.state.masks.items() if name in start}
        student = _Student(function, start, formats, keep)
        before, after, best = student.train(self.steps, self.learning_rate, f"{self.name}, {block.name}")
        note = f"block loss {before:.3g} → {after:.3g}"
        for name, value in best.items():
            if name in formats:
                layout, fmt = formats[name]
                yield SetWeight(name, (quantize_to_term(value, layout, fmt),), f"{describe(fmt)}, {note}")
            elif not torch.equal(value, start[name]):
                yield SetTensor(name, value, f"distilled, {note}")

    def _floats(
        self, block: BlockContext, function: BlockFunction, chosen: Mapping[str, object]
    ) -> Iterator[str]:
        """Gains and biases of this block that may be trained."""
        for name in function.parameters:
            vector = block.program.weights[name].dim() < 2
            if name not in chosen and vector and self._may_train(block, name):
                yield name

    def _may_train(self, block: BlockContext, name: str) -> bool:
        excluded = bool(self.exclude) and self.unselected(block.program, name) is not None
        return not excluded and not block.state.is_compressed(name)

    def _unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        site = candidate.primary
        reason = self.unselected(block.program, candidate.name)
        if reason is not None:
            return reason
        if candidate.role is not Role.MATRIX:
            return f"{candidate.role.value}: not part of a distilled block"
        if site.kind is SiteKind.OTHER:
            return site.reason or "no use of it is a product"
        if block.state.is_compressed(candidate.name):
            return "it is compressed already"
        if len(candidate.here) < len(candidate.uses):
            return "used in several blocks, so no block alone can train it"
        fmt = fitting_format(self.format, site.layout.matrix_shape[2])[0]
        return not_smaller(fmt, site, block.weight(candidate.name).dtype)


class _Student:
    """A block whose weights are rounded in every step.

    Args:
        function: The block.
        start: Where every trained tensor starts; not changed.
        formats: Layout and number format of those that are rounded.
        keep: Masks of pruned tensors (bool, their shape), whose zeros stay.
    """

    def __init__(
        self,
        function: BlockFunction,
        start: Mapping[str, Tensor],
        formats: Mapping[str, tuple[WeightLayout, IntFormat]],
        keep: Mapping[str, Tensor],
    ) -> None:
        self.keep = keep
        self.function = function
        self.formats = formats
        self.dtypes = {name: value.dtype for name, value in start.items()}
        self.latent = {name: value.float().clone().requires_grad_(True) for name, value in start.items()}

    def train(self, steps: int, rate: float, where: str) -> tuple[float, float, dict[str, Tensor]]:
        """``(loss before, loss after, tensors)`` of the best moment, which is never worse than the start."""
        groups = [
            {"params": [latent], "lr": rate * max(float(latent.detach().square().mean().sqrt()), 1e-6)}
            for latent in self.latent.values()
        ]
        optimizer = torch.optim.Adam(groups)
        before = least = self.loss()
        best = self.snapshot()
        if not math.isfinite(before):
            raise CalibrationError(f"{where}: the loss is {before} before the first step.")
        look = max(1, steps // _LOOKS)
        for step in range(1, steps + 1):
            with torch.enable_grad():
                loss = self.batch_loss((step - 1) % self.function.batches)
                if not loss.requires_grad:
                    break  # no output of the block depends on what is trained
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            self._mask()
            if step % look == 0 or step == steps:
                found = self.loss()
                if found < least:  # false for NaN
                    least, best = found, self.snapshot()
        return before, least, best

    @torch.no_grad()
    def _mask(self) -> None:
        """Undo the step where a tensor is pruned: its optimiser would otherwise fill the zeros."""
        for name, keep in self.keep.items():
            self.latent[name].masked_fill_(~keep.to(self.latent[name].device), 0)

    def snapshot(self) -> dict[str, Tensor]:
        """The tensors now, in the model's dtypes."""
        return {name: value.detach().to(self.dtypes[name], copy=True) for name, value in self.latent.items()}

    @torch.no_grad()
    def loss(self) -> float:
        """Mean loss over all batches."""
        count = self.function.batches
        return sum(float(self.batch_loss(batch)) for batch in range(count)) / count

    def batch_loss(self, batch: int) -> Tensor:
        """Squared error of the block's outputs over their square."""
        targets = self.function.target(batch)
        outputs = self.function(batch, {name: self._used(name) for name in self.latent})
        parts = [
            (y.float() - target.float()).square().sum() / target.float().square().sum().clamp_min(1e-12)
            for y, target in zip(outputs, targets, strict=True)
            if target.numel()
        ]
        return torch.stack(parts).sum()

    def _used(self, name: str) -> Tensor:
        """The tensor as the compressed model will use it, differentiable."""
        latent, dtype = self.latent[name], self.dtypes[name]
        if name not in self.formats:
            return straight_through(latent, latent.to(dtype).float()).to(dtype)
        layout, fmt = self.formats[name]
        term: QuantizedWeight = quantize_to_term(latent.to(dtype), layout, fmt)
        return straight_through(latent, term.dense(torch.float32)).to(dtype)
