"""Frontend 3: a plain ``fx.GraphModule``, traced to pre-dispatch ATen with its weights lifted to inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.capture.export import capture_model
from fxcompress.capture.program import Program
from fxcompress.errors import CaptureError


def capture_graph_module(
    module: fx.GraphModule, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Program:
    """Capture an ``fx.GraphModule`` (any level: modules, functions, ATen).

    Weights keep the qualified names they have in ``module``. Shapes are dynamic where the graph allows.

    Raises:
        CaptureError: not a GraphModule, or it cannot be traced.
    """
    if not isinstance(module, fx.GraphModule):
        raise CaptureError(
            f"expected an fx.GraphModule, found {type(module).__name__}.",
            fix="use capture_model for other modules.",
        )
    if not any(isinstance(value, Tensor) for value in [*args, *(kwargs or {}).values()]):
        raise CaptureError("capture_graph_module: no tensor among the example inputs.")
    with torch.no_grad():
        return capture_model(module, args, kwargs)
