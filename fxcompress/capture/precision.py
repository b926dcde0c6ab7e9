"""A program in float64 throughout, so that equality can be asked to 1e-9 and not to 1e-6."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.capture.program import Program

__all__ = ["double_program", "widen"]

_NARROW = (torch.float16, torch.bfloat16, torch.float32)


def widen(value: Any) -> Any:
    """Tensors of smaller floats and their dtypes as float64; anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in _NARROW:
        return value.detach().double()
    return torch.float64 if value in _NARROW else value


def double_program(program: Program) -> Program:
    """A copy whose weights are float64 and whose graph never narrows to a smaller float.

    The types of values (``meta["val"]``) stay those of the original.
    """
    module, names = _double_module(program.graph_module)
    return replace(
        program,
        graph_module=module,
        weights={name: widen(tensor) for name, tensor in program.weights.items()},
        weight_of={names[holder]: name for holder, name in program.weight_of.items()},
        inputs=tuple(names[name] for name in program.inputs),
    )


def _double_module(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, str]]:
    """The module with wide dtypes, graphs of higher-order ops included, and its nodes' new names."""
    twin: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, twin))
    for old, new in twin.items():
        new.meta = dict(old.meta)
        new.args = fx.node.map_aggregate(new.args, _dtype)
        new.kwargs = fx.node.map_aggregate(new.kwargs, _dtype)
    copied = fx.GraphModule(module, graph)
    for name, child in list(copied.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, _double_module(child)[0])
    for name, buffer in list(copied.named_buffers(recurse=False)):
        setattr(copied, name, widen(buffer))
    return copied, {old.name: new.name for old, new in twin.items()}


def _dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value
