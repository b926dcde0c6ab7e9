"""Ways a graph may come to hold an operator, shared by the operator tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

Function = Callable[..., Any]

decomposes_export = pytest.mark.filterwarnings("ignore:.*isinstance.*LeafSpec.*:FutureWarning")
"""For ExportedProgram.run_decompositions, which in torch 2.13 copies a class that torch itself deprecates."""


def operators(graph: fx.Graph) -> list[str]:
    """Qualified names of the fxcompress operators of a graph, in order."""
    names = [str(node.target).removesuffix(".default") for node in graph.nodes if node.op == "call_function"]
    return [name.removeprefix("fxcompress.") for name in names if name.startswith("fxcompress.")]


def pre_dispatch(function: Function, args: Sequence[Tensor]) -> fx.GraphModule:
    return make_fx(function, pre_dispatch=True, tracing_mode="symbolic")(*args)


def decomposed(function: Function, args: Sequence[Tensor]) -> fx.GraphModule:
    return make_fx(function, tracing_mode="symbolic")(*args)


def dynamo(function: Function, args: Sequence[Tensor]) -> fx.GraphModule:
    """What a torch.compile backend is given."""
    torch._dynamo.reset()
    seen: list[fx.GraphModule] = []

    def backend(graph_module: fx.GraphModule, _: Sequence[Tensor]) -> Function:
        seen.append(graph_module)
        return graph_module.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    assert len(seen) == 1
    return seen[0]


def compiled(function: Function, dynamic: bool = False) -> Function:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
