"""What every frontend does to its graph before it becomes a Program."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_ASSERTIONS = frozenset(
    {
        "aten::_assert_tensor_metadata",
        "aten::_assert_scalar",
        "aten::_assert_async",
        "aten::sym_constrain_range",
        "aten::sym_constrain_range_for_size",
    }
)


def normalize(
    module: fx.GraphModule, weight_of: Mapping[str, str], constants: Mapping[str, torch.Tensor] | None = None
) -> fx.GraphModule:
    """Drop assertions and guards, merge placeholders of a tied weight, unbroadcast matrices, drop dead code.

    Assertions repeat what capture already checked; they would refuse a float64 run of a float32 graph.
    Looking up one constant place (``x[..., [-2], :]``) is a slice, whose place in ``x`` analyses can read.

    Args:
        module: The captured graph; changed in place.
        weight_of: Placeholder name → canonical name.
        constants: Canonical name → tensor; lifted constants among them are read.
    """
    graph = module.graph
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in weight_of:
            kept = first.setdefault(weight_of[node.name], node)
            if kept is not node:
                node.replace_all_uses_with(kept)
        elif _is_assertion(node):
            graph.erase_node(node)
        elif node.target is aten.bmm.default:
            _unbroadcast(node)
        elif node.target is aten.index.Tensor:
            _slice_of_index(node, weight_of, constants or {})
    _drop_dead_code(graph)
    graph.lint()
    module.recompile()
    return module


def _unbroadcast(node: fx.Node) -> None:
    """``bmm(x, expand(W, [B, K, N]))``, which tracing makes of strided activations → ``matmul(x, W)``."""
    value = node.args[1]
    while (
        isinstance(value, fx.Node)
        and value.target in _VIEWS
        and isinstance(value.args[0], fx.Node)
        and _shape(value) == _shape(value.args[0])
    ):
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.target is not aten.expand.default:
        return
    matrix, shape = value.args[0], _shape(value)
    if isinstance(matrix, fx.Node) and shape is not None and _shape(matrix) == shape[1:] and len(shape) == 3:
        node.target, node.args = aten.matmul.default, (node.args[0], matrix)


def _slice_of_index(
    node: fx.Node, weight_of: Mapping[str, str], constants: Mapping[str, torch.Tensor]
) -> None:
    """``index(x, [None, c])``, ``c`` a constant of shape ``[1]`` → ``slice(x, 1, c, c + 1)``."""
    indices: Any = node.args[1]
    used = [dim for dim, index in enumerate(indices) if index is not None]
    value = indices[used[0]] if len(used) == 1 else None
    while isinstance(value, fx.Node) and value.target in (aten.lift_fresh_copy.default, aten.clone.default):
        value = value.args[0]
    if not isinstance(value, fx.Node) or not weight_of.get(value.name, "").startswith("constant:"):
        return
    constant = constants.get(weight_of[value.name])
    if constant is None or constant.shape != (1,) or constant.dtype not in (torch.int32, torch.int64):
        return
    place = int(constant)
    end = place + 1 if place != -1 else sys.maxsize
    node.target, node.args = aten.slice.Tensor, (node.args[0], used[0], place, end)


def _shape(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _is_assertion(node: fx.Node) -> bool:
    if node.op == "call_module":
        return str(node.target).startswith("_guards")
    return isinstance(node.target, torch._ops.OpOverload) and node.target.name().split(".")[0] in _ASSERTIONS


def _drop_dead_code(graph: fx.Graph) -> None:
    """Remove unread pure nodes; placeholders and mutating ops stay."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            pure = not target._schema.is_mutable
        else:
            pure = node.op == "get_attr" or not node.is_impure()
        if pure:
            graph.erase_node(node)
