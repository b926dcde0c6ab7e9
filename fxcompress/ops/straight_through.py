"""The straight-through estimator: the value of a rounded tensor with the gradient of the unrounded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcompress.ops._library import composite

__all__ = ["straight_through"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        return gradients[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value``, exactly, whose gradient goes to ``x`` unchanged.

    Args:
        x: Any floating tensor.
        value: What a rounding made of ``x``; same shape.

    Source: Bengio et al., 2013, arXiv:1308.3432.

    Example:
        >>> x = torch.tensor([1.4], requires_grad=True)
        >>> straight_through(x, x.detach().round()).backward(); x.grad.item()
        1.0
    """
    result: Tensor = _StraightThrough.apply(x, value.detach())  # type: ignore[no-untyped-call]
    return result


class _LearnedStep(torch.autograd.Function):
    """Rounding with a learned step (LSQ): the gradients of ``x`` and of the step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        ops = torch.ops.fxcompress
        ctx.save_for_backward(x, scale, zero)
        ctx.bits = bits
        codes = ops.quantize_per_tensor.default(x, scale, zero, bits)
        value: Tensor = ops.dequantize_activation.default(codes, scale, zero, x.dtype)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        x, scale, zero = ctx.saved_tensors
        (given,) = gradients
        bound = 1 << (ctx.bits - 1)
        low, high = -bound - zero, bound - 1 - zero
        ratio = x.to(scale.dtype) / scale
        rounded = torch.round(ratio)
        inside = (rounded >= low) & (rounded <= high)
        slope = torch.where(inside, rounded - ratio, rounded.clamp(low, high))
        return given * inside, (given.to(scale.dtype) * slope).sum().reshape(scale.shape), None, None


@composite("straight_through(Tensor x, Tensor value) -> Tensor")
def _straight_through(x: Tensor, value: Tensor) -> Tensor:
    """See :func:`straight_through`; an operator, so that graphs can hold it."""
    return straight_through(x, value)


@composite("learned_step(Tensor x, Tensor scale, Tensor zero, int bits) -> Tensor")
def _learned_step(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize with one step for all values, whose gradient is that of LSQ.

    In range the step's gradient is ``round(x/s) − x/s``, outside it is the clipped code; the gradient of
    ``x`` is 1 in range and 0 outside.

    Source: Esser et al., 2020, arXiv:1902.08153, section 2.1.
    """
    result: Tensor = _LearnedStep.apply(x, scale, zero, bits)  # type: ignore[no-untyped-call]
    return result
