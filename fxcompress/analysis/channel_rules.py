"""How ops that compute act on scaled channels: which commute with a positive scale per channel.

Every rule takes ``(flow, node, arguments)``, may freeze or merge channels, and returns the labels of the
result (None: nothing of the result is scaled).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxcompress.analysis.channel_flow import Flow
from fxcompress.analysis.channel_labels import NO_CHANNEL, align, constant_along, static_size
from fxcompress.analysis.channel_moves import BlockedError
from fxcompress.analysis.op_arguments import describe, shape_of

Rule: TypeAlias = Callable[[Flow, fx.Node, dict[str, Any]], Tensor | None]


def _homogeneous(flow: Flow, node: fx.Node, args: dict[str, Any]) -> Tensor | None:
    """f(a·x) = a·f(x) for a > 0."""
    return flow.live(args["self"])


def _mul(flow: Flow, node: fx.Node, args: dict[str, Any]) -> Tensor | None:
    one, two = flow.live(args["self"]), flow.live(args["other"])
    if one is not None and two is not None:
        flow.freeze(node, one, f"{describe(node)} multiplies two scaled values")
        one, two = flow.live(args["self"]), flow.live(args["other"])
    return _broadcast(node, one if two is None else two)


def _div(flow: Flow, node: fx.Node, args: dict[str, Any]) -> Tensor | None:
    if args.get("rounding_mode") is not None:
        raise BlockedError(f"{describe(node)} rounds")
    flow.freeze(node, flow.live(args["other"]), f"{describe(node)} divides by it")
    return _broadcast(node, flow.live(args["self"]))


def _add(flow: Flow, node: fx.Node, args: dict[str, Any]) -> Tensor | None:
    x, y = args["self"], args["other"]
    one, two = flow.live(x), flow.live(y)
    if one is not None and two is not None:
        rank = max(one.dim(), two.dim())
        reason = f"{describe(node)} adds values scaled differently"
        return flow.merge(node, align(one, rank), align(two, rank), reason)
    labels, other = (two, x) if one is None else (one, y)
    if labels is None:
        return None
    if isinstance(other, int | float) and other == 0:
        return labels
    if not flow.accompany(node, labels, other):
        what = describe(other) if isinstance(other, fx.Node) else f"the constant {other}"
        flow.freeze(node, labels, f"{describe(node)} adds it to {what}, which is not scaled along")
    return _broadcast(node, flow.classes.live(labels))


def _masked_fill(flow: Flow, node: fx.Node, args: dict[str, Any]) -> Tensor | None:
    value = args["value"]
    if not isinstance(value, int | float) or value != 0:
        raise BlockedError(f"{describe(node)} fills with a value that is not scaled along")
    return _broadcast(node, flow.live(args["self"]))


def _where(flow: Flow, node: fx.Node, args: dict[str, Any]) -> Tensor | None:
    one, two = flow.live(args["self"]), flow.live(args["other"])
    reason = f"{describe(node)} chooses between a scaled and an unscaled value"
    if one is not None and two is not None:
        rank = len(shape_of(node))
        return flow.merge(node, align(one, rank), align(two, rank), reason)
    labels, other = (two, args["self"]) if one is None else (one, args["other"])
    if not isinstance(other, int | float) or other != 0:
        raise BlockedError(reason)
    return _broadcast(node, labels)


def _cat(flow: Flow, node: fx.Node, args: dict[str, Any]) -> Tensor | None:
    rank = len(shape_of(node))
    dim = int(args["dim"]) % rank
    parts = [part for part in args["tensors"] if not _is_empty(part, dim, rank)]
    held = [flow.live(part) for part in parts]
    flat = [None if labels is None else constant_along(labels, dim) for labels in held]
    first = flat[0]
    if first is not None and all(labels is not None and torch.equal(labels, first) for labels in flat):
        return first
    pieces: list[Tensor] = []
    for part, labels in zip(parts, held, strict=True):
        size = static_size(shape_of(part)[dim])
        if size is None:
            raise BlockedError(f"{describe(node)} joins channels along a dimension of unknown size")
        if labels is None:
            labels = torch.full((1,) * rank, NO_CHANNEL)
        pieces.append(labels.expand(*labels.shape[:dim], size, *labels.shape[dim + 1 :]))
    common = [max(piece.shape[d] for piece in pieces) for d in range(rank)]
    return torch.cat([p.expand(*common[:dim], p.shape[dim], *common[dim + 1 :]) for p in pieces], dim)


def _stack(flow: Flow, node: fx.Node, args: dict[str, Any]) -> Tensor | None:
    rank = len(shape_of(node))
    dim = int(args["dim"]) % rank
    unscaled = torch.full((1,) * (rank - 1), NO_CHANNEL)
    held = [flow.live(part) for part in args["tensors"]]
    pieces = torch.broadcast_tensors(*[unscaled if labels is None else labels for labels in held])
    return torch.stack(list(pieces), dim)


def _matmul(flow: Flow, node: fx.Node, args: dict[str, Any]) -> Tensor | None:
    x, y = args.get("self"), args.get("other", args.get("mat2"))
    return _product(flow, node, x, y)


def _product(flow: Flow, node: fx.Node, x: Any, y: Any) -> Tensor | None:
    """``x @ y`` of two activations: rows of x or columns of y keep their channels, the summed ones cannot."""
    if min(len(shape_of(x)), len(shape_of(y))) < 2:
        raise BlockedError(f"{describe(node)} multiplies by a vector")
    for value, dim in ((x, -1), (y, -2)):
        labels = flow.live(value)
        if labels is not None and constant_along(labels, dim) is None:
            flow.freeze(node, labels, f"{describe(node)} sums over channels")
    one, two = flow.live(x), flow.live(y)
    if one is not None and two is not None:
        flow.freeze(node, one, f"{describe(node)} multiplies two scaled values")
        one, two = flow.live(x), flow.live(y)
    rank = len(shape_of(node))
    if two is not None:
        kept = constant_along(two, -2)
        return None if kept is None else align(kept, rank)
    kept = None if one is None else constant_along(one, -1)
    return None if kept is None else align(kept, rank)


def _attention(flow: Flow, node: fx.Node, args: dict[str, Any]) -> Tensor | None:
    """Attention mixes positions of the value, never its channels."""
    for key, what in (("query", "queries"), ("key", "keys"), ("attn_mask", "the mask")):
        flow.freeze(node, flow.live(args[key]), f"{describe(node)} uses it as {what}")
    labels = flow.live(args["value"])
    if labels is None:
        return None
    kept = constant_along(labels, -2)
    if kept is None:
        raise BlockedError(f"{describe(node)} sums over channels")
    if args.get("enable_gqa") and kept.shape[-3] > 1:
        heads = static_size(shape_of(node)[-3])
        if heads is None or heads % kept.shape[-3]:
            raise BlockedError(f"{describe(node)} has an unknown number of heads")
        kept = kept.repeat_interleave(heads // kept.shape[-3], -3)
    return kept


def _einsum(flow: Flow, node: fx.Node, args: dict[str, Any]) -> Tensor | None:
    equation = str(args["equation"]).replace(" ", "")
    if "->" not in equation or "." in equation:
        raise BlockedError(f"{describe(node)} has the equation {equation!r}, which is not followed")
    terms, output = equation.split("->")
    pairs = list(zip(terms.split(","), args["tensors"], strict=True))
    for letters, value in pairs:
        labels = flow.live(value)
        if len(set(letters)) < len(letters):
            raise BlockedError(f"{describe(node)} takes a diagonal")
        if labels is not None and not _constant_outside(labels, letters, output):
            flow.freeze(node, labels, f"{describe(node)} sums over channels")
    scaled = [(letters, value) for letters, value in pairs if flow.live(value) is not None]
    for _, value in scaled[1:]:
        flow.freeze(node, flow.live(value), f"{describe(node)} multiplies two scaled values")
    if not scaled:
        return None
    labels = flow.live(scaled[0][1])
    return None if labels is None else _spread(labels, scaled[0][0], output)


def _constant_outside(labels: Tensor, letters: str, output: str) -> bool:
    return all(letter in output or labels.shape[d] == 1 for d, letter in enumerate(letters))


def _spread(labels: Tensor, letters: str, output: str) -> Tensor:
    """Put the dimensions ``letters`` of ``labels`` where ``output`` has them."""
    sizes = {letter: labels.shape[d] for d, letter in enumerate(letters)}
    kept = [letter for letter in output if letter in sizes]
    order = [letters.index(letter) for letter in kept]
    dropped = [d for d in range(len(letters)) if d not in order]
    return labels.permute(*order, *dropped).reshape([sizes.get(letter, 1) for letter in output])


def _broadcast(node: fx.Node, labels: Tensor | None) -> Tensor | None:
    return None if labels is None else align(labels, len(shape_of(node)))


def _is_empty(part: fx.Node, dim: int, rank: int) -> bool:
    """Whether a piece of a concatenation has no elements (an unused cache)."""
    shape: Sequence[Any] = shape_of(part)
    return any(static_size(size) == 0 for size in shape) or len(shape) != rank


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("aten::relu", "aten::relu_", "aten::leaky_relu", "aten::abs", "aten::neg"), _homogeneous
    ),
    "aten::mul": _mul,
    "aten::div": _div,
    "aten::add": _add,
    "aten::sub": _add,
    "aten::masked_fill": _masked_fill,
    "aten::where": _where,
    "aten::cat": _cat,
    "aten::concat": _cat,
    "aten::stack": _stack,
    **dict.fromkeys(("aten::matmul", "aten::bmm", "aten::mm"), _matmul),
    "aten::scaled_dot_product_attention": _attention,
    "aten::einsum": _einsum,
}
"""Rules by schema name; ops in neither this table nor MOVES freeze what they read."""
