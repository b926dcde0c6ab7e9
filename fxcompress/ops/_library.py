"""Registration of composite operators."""

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
