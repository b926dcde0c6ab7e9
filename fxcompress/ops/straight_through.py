"""The straight-through estimator: the value of a rounded tensor with the gradient of the unrounded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
