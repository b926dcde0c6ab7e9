"""Trained values: what a placeholder of the training graph takes, as a differentiable function of parameters.

Each is a module whose call gives the tensor the graph computes with, and whose :meth:`TrainedValue.stored`
gives the same numbers as they are saved. So what is trained is what is exported, bit for bit.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.formats.codebook import decode_codebook, encode_codebook, largest_magnitudes
from fxcompress.formats.floating import decode_float, encode_float, spread_blocks
from fxcompress.formats.integer import IntFormat, decode_rows, encode, find_parameters, make_term, spread
from fxcompress.formats.packing import pack_codes
from fxcompress.forms import CodebookWeight, FloatWeight, QuantizedWeight, WeightLayout, WeightTerm
from fxcompress.ops.straight_through import straight_through

__all__ = [
    "LowRankUpdate",
    "Numbers",
    "Relative",
    "RoundedCodebook",
    "RoundedFloat",
    "RoundedIntegers",
    "TrainedValue",
    "latent_of",
]


class TrainedValue(nn.Module):
    """A tensor of the training graph that parameters determine."""

    def forward(self) -> Tensor:
        """The tensor, differentiable."""
        return self.value()

    @abstractmethod
    def value(self) -> Tensor:
        """The tensor, differentiable."""

    @abstractmethod
    def stored(self) -> Tensor | WeightTerm:
        """What is saved: a tensor, or the weight term that stands in the tensor's place."""


_NEAR = 0.9  # share of a dense weight near its codes from which they count as made from it


def master(tensor: Tensor) -> nn.Parameter:
    """A trainable copy in float32, or float64 for such tensors: optimisers lose small steps in less."""
    wide = tensor.dtype if tensor.element_size() >= 4 else torch.float32
    return nn.Parameter(tensor.detach().to(wide, copy=True))


def _masked(module: TrainedValue, numbers: Tensor) -> Tensor:
    """``numbers``, zero where the module's mask says so."""
    keep = module.keep
    return numbers.masked_fill(~keep, 0) if isinstance(keep, Tensor) else numbers


class Numbers(TrainedValue):
    """Plain numbers in their own dtype; masked entries stay zero.

    Args:
        start: Where they start.
        keep: Bool mask of the same shape, or None.
        scaling: The tensor is this times the parameter.
    """

    def __init__(self, start: Tensor, keep: Tensor | None = None, scaling: float = 1.0) -> None:
        super().__init__()
        self.dtype, self.scaling = start.dtype, scaling
        self.numbers = master(start)
        self.register_buffer("keep", keep, persistent=False)

    def value(self) -> Tensor:
        """See :class:`TrainedValue`."""
        numbers = _masked(self, self.numbers)
        if self.scaling != 1:
            numbers = numbers * self.scaling
        return numbers.to(self.dtype)

    def stored(self) -> Tensor:
        """See :class:`TrainedValue`."""
        return self.value().detach().clone()


class Relative(TrainedValue):
    """Positive numbers, trained by a factor each, so that one learning rate serves every magnitude.

    Args:
        start: Where they start; zeros stay zero.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach(), persistent=False)
        self.factor = nn.Parameter(torch.ones_like(master(start)))

    def value(self) -> Tensor:
        """See :class:`TrainedValue`."""
        start: Tensor = self.start  # type: ignore[assignment]
        product = start.to(self.factor.dtype) * self.factor.clamp_min(1e-3)
        return product.to(start.dtype)

    def stored(self) -> Tensor:
        """See :class:`TrainedValue`."""
        return self.value().detach().clone()


class LowRankUpdate(TrainedValue):
    """A frozen dense weight plus ``scaling · u·v``: LoRA on a weight that stays dense, added up at once.

    Args:
        weight: The frozen weight.
        layout: How it is read as ``[1, N, K]``.
        rank: Of the update.
        scaling: Its factor, α/r.
        keep: Mask of a pruned weight, whose zeros the update leaves alone.
        generator: Of the first factor; the second starts at zero.

    Source: Hu et al., 2021 (LoRA, arXiv:2106.09685).
    """

    def __init__(
        self,
        weight: Tensor,
        layout: WeightLayout,
        rank: int,
        scaling: float,
        keep: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.layout, self.scaling = layout, scaling
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("keep", keep, persistent=False)
        u, v = first_factors(layout, rank, weight, generator)
        self.u, self.v = master(u), master(v)

    def value(self) -> Tensor:
        """See :class:`TrainedValue`."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        update = self.layout.from_matrix((self.scaling * self.u @ self.v)[None])
        update = _masked(self, update)
        return (weight.to(update.dtype) + update).to(weight.dtype)

    def stored(self) -> Tensor:
        """See :class:`TrainedValue`."""
        return self.value().detach().clone().contiguous()


def first_factors(
    layout: WeightLayout, rank: int, like: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``(u: [N, r] zeros, v: [r, K] uniform in ±1/√K)``, the usual start of LoRA."""
    _, rows, columns = layout.matrix_shape
    dtype = like.dtype if like.element_size() >= 4 else torch.float32
    v = (torch.rand(rank, columns, generator=generator, dtype=torch.float64) * 2 - 1) / columns**0.5
    return torch.zeros(rows, rank, dtype=dtype, device=like.device), v.to(like.device, dtype)


class _Rounded(torch.autograd.Function):
    """Integer rounding: straight through in range for the weight, LSQ's gradient for the scale."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, scale: Tensor, zero: Tensor | None, fmt: IntFormat, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(w, scale, zero)
        ctx.fmt = fmt
        codes = encode(w, scale, zero, fmt)
        return decode_rows(codes, scale, zero, fmt.bits, fmt.group_size, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        w, scale, zero = ctx.saved_tensors
        fmt: IntFormat = ctx.fmt
        given, columns = gradients[0].to(w.dtype), w.shape[-1]
        ratio = w / spread(scale.to(w.dtype), fmt.group_size, columns)
        offset: Any = fmt.fixed_zero
        if zero is not None:
            offset = spread(zero.to(w.dtype), fmt.group_size, columns)
        code = torch.round(ratio) + offset
        inside = (code >= fmt.qmin) & (code <= fmt.qmax)
        step = None
        if ctx.needs_input_grad[1]:
            clipped = code.clamp(fmt.qmin, fmt.qmax) - offset
            slope = given * torch.where(inside, clipped - ratio, clipped)
            step = _sum_groups(slope, scale.shape, fmt.group_size).to(scale.dtype)
        return given * inside, step, None, None, None


def _sum_groups(x: Tensor, shape: torch.Size, group_size: int) -> Tensor:
    """``x: [B, N, K]`` summed over what shares a scale."""
    if shape[1] == 1 and x.shape[1] != 1 and group_size == -1:
        return x.sum((1, 2), keepdim=True)
    if group_size <= 0:
        return x.sum(2, keepdim=True)
    padded = nn.functional.pad(x, (0, shape[2] * group_size - x.shape[2]))
    total: Tensor = padded.unflatten(2, (shape[2], group_size)).sum(3)
    return total


class RoundedIntegers(TrainedValue):
    """A weight of integer codes, rounded anew in every step from a latent weight.

    Args:
        term: The codes it starts from; they are what the first step computes with.
        latent: The weight before rounding, ``[B, N, K]``; see :func:`latent_of`.
        steps: ``"learned"``: each scale is trained with LSQ's gradient; ``"fixed"``; ``"range"``: scales and
            zero-points are found from the latent weight in every step (LLM-QAT).
        dtype: Of the parameter.
        keep: Mask of a pruned weight ``[B, N, K]``, or None.
    """

    def __init__(
        self, term: QuantizedWeight, latent: Tensor, steps: str, dtype: torch.dtype, keep: Tensor | None
    ) -> None:
        super().__init__()
        self.layout, self.format, self.steps, self.dtype = term.layout, term.format, steps, dtype
        self.latent = master(latent)
        self.register_buffer("keep", keep, persistent=False)
        self.register_buffer("zero", term.zero, persistent=False)
        self.scale = Relative(term.scale)
        self.scale.requires_grad_(steps == "learned")

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(latent, scale, zero)`` of this step."""
        latent = _masked(self, self.latent)
        if self.steps == "range":
            return latent, *find_parameters(latent.detach(), self.format)
        zero = self.zero
        return latent, self.scale(), zero if isinstance(zero, Tensor) else None

    def value(self) -> Tensor:
        """See :class:`TrainedValue`."""
        rounded = _Rounded.apply(*self.parts(), self.format, self.dtype)  # type: ignore[no-untyped-call]
        return self.layout.from_matrix(rounded).contiguous()

    @torch.no_grad()
    def stored(self) -> QuantizedWeight:
        """See :class:`TrainedValue`."""
        latent, scale, zero = self.parts()
        return make_term(encode(latent, scale, zero, self.format), scale, zero, self.layout, self.format)


class RoundedCodebook(TrainedValue):
    """A weight of codes into a table, each the nearest entry to a latent weight in every step.

    Args:
        term: The codes it starts from.
        latent: ``[B, N, K]``.
        steps: ``"learned"``: scales are trained; ``"fixed"``; ``"range"``: the group's largest magnitude.
        dtype: Of the parameter.
    """

    def __init__(self, term: CodebookWeight, latent: Tensor, steps: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.term, self.steps, self.dtype = term, steps, dtype
        self.latent = master(latent)
        self.register_buffer("table", term.table, persistent=False)
        self.scale = None if term.scale is None else Relative(term.scale)
        if self.scale is not None:
            self.scale.requires_grad_(steps == "learned")

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """``(codes, scale)`` of this step."""
        table: Tensor = self.table  # type: ignore[assignment]
        scale = None if self.scale is None else self.scale()
        if self.scale is not None and self.steps == "range":
            scale = largest_magnitudes(self.latent.detach(), self.term.format)
        codes = encode_codebook(
            self.latent.detach(), table, None if scale is None else scale.detach(), self.term.group_size
        )
        return codes, scale

    def value(self) -> Tensor:
        """See :class:`TrainedValue`."""
        codes, scale = self.parts()
        table: Tensor = self.table  # type: ignore[assignment]
        flat = table.reshape(1, -1) if table.dtype != torch.bfloat16 else table
        decoded = decode_codebook(codes, flat, scale, self.term.group_size, self.dtype)
        through = straight_through(self.latent, decoded.to(self.latent.dtype)).to(self.dtype)
        if decoded.requires_grad:  # the scale's own gradient, the value counted once
            through = _Both.apply(through, decoded)  # type: ignore[no-untyped-call]
        return self.term.layout.from_matrix(through).contiguous()

    @torch.no_grad()
    def stored(self) -> CodebookWeight:
        """See :class:`TrainedValue`."""
        codes, scale = self.parts()
        term = self.term
        return CodebookWeight(
            *(term.bits, term.group_size, term.shape, term.perm, term.batch_dims, term.row_dims),
            pack_codes(codes, term.bits).contiguous(),
            term.table,
            scale,
        )


class _Both(torch.autograd.Function):
    """One of two equal tensors, whose gradient goes to both."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return a.view_as(a)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, Any]:
        return gradients[0], gradients[0]


class RoundedFloat(TrainedValue):
    """A weight of 8-bit floating-point codes, rounded anew in every step; scales stay.

    Args:
        term: The codes it starts from.
        latent: ``[B, N, K]``.
        dtype: Of the parameter.
    """

    def __init__(self, term: FloatWeight, latent: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.term, self.dtype = term, dtype
        self.latent = master(latent)
        self.register_buffer("scale", term.scale, persistent=False)

    def codes(self) -> Tensor:
        """The codes of this step."""
        term, scale = self.term, self.scale
        wide = spread_blocks(scale, term.block_rows, term.block_columns, *self.latent.shape[1:])  # type: ignore[arg-type]
        return encode_float(self.latent.detach(), wide, term.format.dtype)

    def value(self) -> Tensor:
        """See :class:`TrainedValue`."""
        term, scale = self.term, self.scale
        decoded = decode_float(self.codes(), scale, term.block_rows, term.block_columns, self.dtype)  # type: ignore[arg-type]
        through = straight_through(self.latent, decoded.to(self.latent.dtype)).to(self.dtype)
        return term.layout.from_matrix(through).contiguous()

    @torch.no_grad()
    def stored(self) -> FloatWeight:
        """See :class:`TrainedValue`."""
        term = self.term
        return dataclasses.replace(term, codes=self.codes().contiguous())


def latent_of(term: WeightTerm, target: Tensor | None) -> Tensor:
    """The weight before rounding from which the codes of ``term`` follow: ``[B, N, K]``.

    Where the dense weight rounds to other codes than the solver chose, it is moved just inside the cell of
    the solver's code: training starts at the solver's solution and knows which way the weight leaned.

    Args:
        term: A :class:`QuantizedWeight`, :class:`CodebookWeight` or :class:`FloatWeight`.
        target: The dense weight in the parameter's shape, or None when it is not known. One that the codes do
            not stand for (most of it steps away) is not used.
    """
    wide = torch.float64 if target is not None and target.dtype == torch.float64 else torch.float32
    layout: WeightLayout = term.layout  # type: ignore[attr-defined]
    value = layout.to_matrix(term.dense(wide))
    if target is None or not isinstance(term, QuantizedWeight):
        return value
    wanted = layout.to_matrix(target.detach()).to(wide)
    step = spread(term.scale.to(wide), term.group_size, value.shape[-1])
    if not float(((wanted - value).abs() <= 2 * step).float().mean()) > _NEAR:  # NaN is far as well
        return value
    # Not quite half a step: the latent weight itself is rounded too.
    return torch.minimum(torch.maximum(wanted, value - 0.499 * step), value + 0.499 * step)
