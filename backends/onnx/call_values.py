"""Values of a graph's nodes in given calls: what a rewriting is proven with where patterns do not suffice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

__all__ = ["value_in"]


def value_in(graph: fx.Graph, wanted: fx.Node, call: Mapping[str, Any]) -> Tensor | None:
    """A node's value from the placeholders in ``call`` alone; None when it depends on anything else."""
    needed, stack = {wanted}, [wanted]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                stack.append(source)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            if node.name not in call:
                return None
            values[node] = call[node.name]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        else:
            return None
        if node is wanted:
            break
    found = values[wanted]
    return found if isinstance(found, Tensor) else None
