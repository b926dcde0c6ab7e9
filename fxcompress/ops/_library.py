"""Registration of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("fxcompress", "FRAGMENT")


def composite(schema: str) -> Callable[[F], F]:
    """Register the decorated function as the implementation of ``fxcompress::<schema>`` on every device.

    The key is CompositeImplicitAutograd: shape inference, gradients and compilation follow from the
    implementation, which must therefore consist of tensor operations that never mutate an input.
    """

    def register(function: F) -> F:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(schema.partition("(")[0], function, "CompositeImplicitAutograd")
        return function

    return register


def opaque(schema: str, *, fake: Callable[..., Any]) -> Callable[[F], F]:
    """Register the decorated function as an operator that no compiler looks into.

    For computations whose intermediate shapes depend on data. There are no gradients.

    Args:
        schema: As for :func:`composite`.
        fake: Gives empty results of the right shape and dtype; called with fake tensors.
    """

    def register(function: F) -> F:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxcompress::{name}", fake, lib=_LIBRARY)
        return function

    return register
