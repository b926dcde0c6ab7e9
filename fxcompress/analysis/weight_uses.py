"""Follow a parameter forward through ops that only rearrange it, to the op that consumes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from fxcompress.capture.program import Program

aten = torch.ops.aten

_SAME_DIMS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
}


@dataclass(frozen=True, eq=False)
class WeightUse:
    """One consuming op of a parameter.

    Args:
        name: Canonical parameter name.
        weight: The placeholder.
        value: What ``node`` takes.
        chain: Nodes between, in order, ``value`` included when it is not the placeholder.
        dims: For every dimension of ``value``, the parameter's dimension it is.
        selected: Parameter dimensions removed by indexing (one expert of many).
        node: The consumer.
    """

    name: str
    weight: fx.Node
    value: fx.Node
    chain: tuple[fx.Node, ...]
    dims: tuple[int, ...]
    selected: tuple[int, ...]
    node: fx.Node


def weight_uses(program: Program) -> Iterator[WeightUse]:
    """Every use of every floating-point parameter of rank 2 and more, placeholders in call order."""
    for placeholder in program.placeholders():
        name = program.weight_of.get(placeholder.name)
        if name is None or name not in program.parameters:
            continue
        tensor = program.weights[name]
        if tensor.dim() < 2 or not tensor.is_floating_point():
            continue
        yield from _follow(name, placeholder, placeholder, (), tuple(range(tensor.dim())), ())


def _follow(
    name: str,
    weight: fx.Node,
    value: fx.Node,
    chain: tuple[fx.Node, ...],
    dims: tuple[int, ...],
    selected: tuple[int, ...],
) -> Iterator[WeightUse]:
    for user in value.users:
        if user.op == "output":
            continue
        step = _rearrange(user, value, dims)
        if step is None:
            yield WeightUse(name, weight, value, chain, dims, selected, user)
        else:
            new_dims, removed = step
            yield from _follow(name, weight, user, (*chain, user), new_dims, selected + removed)


def _rearrange(
    node: fx.Node, value: fx.Node, dims: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """New ``(dims, removed)`` when ``node`` only rearranges ``value``; None when it consumes it."""
    if node.op != "call_function" or not node.args or node.args[0] is not value:
        return None
    target, arguments = node.target, cast("tuple[Any, ...]", node.args)
    if target in _SAME_DIMS:
        return dims, ()
    rank = len(dims)
    if target in (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default):
        if target is aten.numpy_T.default:
            return dims[::-1], ()
        return ((*dims[:-2], dims[-1], dims[-2]), ()) if rank >= 2 else (dims, ())
    if target is aten.transpose.int:
        a, b = int(arguments[1]) % rank, int(arguments[2]) % rank
        order = list(dims)
        order[a], order[b] = order[b], order[a]
        return tuple(order), ()
    if target is aten.permute.default:
        return tuple(dims[int(d) % rank] for d in arguments[1]), ()
    if target is aten.select.int and rank == 3:
        d = int(arguments[1]) % rank
        return (*dims[:d], *dims[d + 1 :]), (dims[d],)
    if target is aten.unbind.int and rank == 3:
        return None
    return None
