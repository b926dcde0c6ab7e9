"""Read the arguments of an ATen call by their schema names, whatever way they were passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx


def aten_names(names: str) -> frozenset[str]:
    """Schema names of ATen operators, from a list separated by white space."""
    return frozenset(f"aten::{name}" for name in names.split())


def op_name(node: fx.Node) -> str:
    """Schema name without overload, e.g. ``"aten::view"``; empty for anything but an ATen-like operator."""
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def describe(node: fx.Node) -> str:
    """The operator and the node, for messages."""
    if node.op == "output":
        return "the output of the model"
    return f"{op_name(node) or node.target} ({node.name})"


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator call by schema name, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise TypeError(f"{node.name} calls {target}, which has no schema")
    values: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value if argument.has_default_value() else None
    return values


def replace_argument(
    node: fx.Node, args: Any, kwargs: Any, name: str, function: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of a call like ``node``'s with ``function`` applied to the argument ``name``."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise TypeError(f"{node.name} calls {target}, which has no schema")
    if name in kwargs:
        return tuple(args), {**kwargs, name: function(kwargs[name])}
    place = [argument.name for argument in target._schema.arguments].index(name)
    return (*args[:place], function(args[place]), *args[place + 1 :]), dict(kwargs)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Shape of a node's tensor value; sizes are ints or symbolic."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.name} is no tensor but {type(value).__name__}")
    return tuple(value.shape)
