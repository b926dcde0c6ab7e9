"""How ops that only move, copy or drop elements act on channel labels.

Every rule takes ``(node, labels, arguments)`` for one labelled input and returns the labels of the result (a
list for ops with several results), or raises :class:`BlockedError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from torch import Tensor, fx

from fxcompress.analysis.channel_labels import NO_CHANNEL, align, regroup
from fxcompress.analysis.op_arguments import aten_names, describe, shape_of

Result: TypeAlias = Tensor | list[Tensor]
Move: TypeAlias = Callable[[fx.Node, Tensor, dict[str, Any]], Result]


class BlockedError(Exception):
    """Channels cannot be followed through an op; the message says which and why."""


def _keep(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    return labels


def _dropout(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    return labels  # zeroing and rescaling elements commutes with a scale, in training mode too


def _reshape(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    if args.get("dtype") is not None:
        raise BlockedError(f"{describe(node)} reinterprets the bits")
    found = regroup(labels, shape_of(_source(args)), shape_of(node))
    if found is None:
        raise BlockedError(f"{describe(node)} mixes channels with a dimension of unknown size")
    return found


def _transpose(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    return labels.transpose(_integer(node, args["dim0"]), _integer(node, args["dim1"]))


def _swap_last(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    return labels.transpose(-2, -1) if labels.dim() >= 2 else labels


def _reverse_dims(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    return labels.permute(*reversed(range(labels.dim())))


def _permute(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    return labels.permute([_integer(node, d) for d in args["dims"]])


def _movedim(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    return labels.movedim(args["source"], args["destination"])


def _expand(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    return align(labels, len(shape_of(node)))


def _repeat(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    labels = align(labels, len(shape_of(node)))
    times = [
        1 if size == 1 else _integer(node, r) for size, r in zip(labels.shape, args["repeats"], strict=True)
    ]
    return labels.repeat(times)


def _repeat_interleave(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    if args.get("dim") is None:
        raise BlockedError(f"{describe(node)} flattens")
    dim = _integer(node, args["dim"])
    return (
        labels if labels.shape[dim] == 1 else labels.repeat_interleave(_integer(node, args["repeats"]), dim)
    )


def _slice(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    dim = _integer(node, args["dim"])
    if labels.shape[dim] == 1:
        return labels
    index: list[slice] = [slice(None)] * labels.dim()
    start = 0 if args["start"] is None else _integer(node, args["start"])
    end = None if args["end"] is None else _integer(node, args["end"])
    index[dim] = slice(start, end, _integer(node, args["step"]))
    return labels[tuple(index)]


def _narrow(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    dim = _integer(node, args["dim"])
    if labels.shape[dim] == 1:
        return labels
    return labels.narrow(dim, _integer(node, args["start"]), _integer(node, args["length"]))


def _select(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    dim = _integer(node, args["dim"])
    return labels.select(dim, 0 if labels.shape[dim] == 1 else _integer(node, args["index"]))


def _split(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    dim = _integer(node, args["dim"])
    parts = node.meta["val"]
    if labels.shape[dim] == 1:
        return [labels for _ in parts]
    return list(labels.split([_integer(node, part.shape[dim]) for part in parts], dim))


def _unbind(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    dim = _integer(node, args["dim"])
    if labels.shape[dim] == 1:
        return [labels.squeeze(dim) for _ in node.meta["val"]]
    return list(labels.unbind(dim))


def _same_along(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    """Reordering or choosing along ``dim``/``dims``: fine where labels do not vary."""
    given = args.get("dims", args.get("dim"))
    dims = given if isinstance(given, list | tuple) else [given]
    if not dims or any(labels.shape[_integer(node, d)] > 1 for d in dims):
        raise BlockedError(f"{describe(node)} rearranges channels by data")
    return labels


def _gather(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    dim = _integer(node, args["dim"])
    if labels.shape[dim] > 1:
        raise BlockedError(f"{describe(node)} picks channels by data")
    for d, size in enumerate(shape_of(node)):
        if labels.shape[d] > 1:
            labels = labels.narrow(d, 0, _integer(node, size))
    return labels


def _index(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    """``x[i, :, j]``: dimensions indexed by tensors must not carry channels."""
    dim, first, adjacent, width = 0, -1, True, 0
    kept: list[int] = []
    indexed: list[int] = []
    for index in args["indices"]:
        if index is None:
            kept.append(dim)
            dim += 1
            continue
        value = index.meta["val"]
        mask = not value.is_floating_point() and value.dtype.itemsize == 1
        consumed = value.dim() if mask else 1
        adjacent = adjacent and (not indexed or indexed[-1] == dim - 1)
        first = dim if first < 0 else first
        indexed += range(dim, dim + consumed)
        width = max(width, 1 if mask else value.dim())
        dim += consumed
    if any(labels.shape[d] > 1 for d in indexed):
        raise BlockedError(f"{describe(node)} picks channels by data")
    kept += range(dim, labels.dim())
    sizes = [labels.shape[d] for d in kept]
    place = sum(1 for d in kept if d < first) if adjacent else 0
    return labels.reshape(sizes[:place] + [1] * width + sizes[place:])


def _pad(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    if args.get("mode", "constant") != "constant" or args.get("value") not in (None, 0, 0.0):
        raise BlockedError(f"{describe(node)} pads with something other than zeros")
    padding = args["pad"]
    for place in range(len(padding) // 2):
        dim = labels.dim() - 1 - place
        if labels.shape[dim] == 1:
            continue
        before, after = (_integer(node, p) for p in padding[2 * place : 2 * place + 2])
        if before < 0 or after < 0:
            raise BlockedError(f"{describe(node)} crops by negative padding")
        labels = _padded(labels, dim, before, after)
    return labels


def _padded(labels: Tensor, dim: int, before: int, after: int) -> Tensor:
    shape = list(labels.shape)
    shape[dim] += before + after
    wide = labels.new_full(shape, NO_CHANNEL)
    wide.narrow(dim, before, labels.shape[dim]).copy_(labels)
    return wide


def _reduce(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
    """Sum or mean over dimensions along which labels do not vary."""
    given = args.get("dim")
    dims = range(labels.dim()) if given is None or given == [] else given
    numbers = sorted((_integer(node, d) % labels.dim() for d in dims), reverse=True)
    if any(labels.shape[d] > 1 for d in numbers):
        raise BlockedError(f"{describe(node)} sums over channels")
    if not args.get("keepdim"):
        for d in numbers:
            labels = labels.squeeze(d)
    return labels


def _pool(dims: int) -> Move:
    """Averages over the last ``dims`` dimensions."""

    def move(node: fx.Node, labels: Tensor, args: dict[str, Any]) -> Result:
        if any(size > 1 for size in labels.shape[-dims:]):
            raise BlockedError(f"{describe(node)} averages over channels")
        return labels

    return move


def _source(args: dict[str, Any]) -> fx.Node:
    value = args.get("self", args.get("input"))
    if not isinstance(value, fx.Node):
        raise BlockedError("an op has no tensor as its first argument")
    return value


def _integer(node: fx.Node, value: Any) -> int:
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if not isinstance(value, int):
        raise BlockedError(f"{describe(node)} cuts channels at a place known only at run time")
    return value


def _table() -> Iterator[tuple[str, Move]]:
    rules: tuple[tuple[str, Move], ...] = (
        ("to _to_copy type_as clone contiguous detach detach_ alias lift_fresh lift_fresh_copy", _keep),
        ("dropout", _dropout),
        ("view reshape _unsafe_view _reshape_alias view_as reshape_as", _reshape),
        ("flatten unflatten squeeze unsqueeze", _reshape),
        ("transpose swapaxes", _transpose),
        ("t mT", _swap_last),
        ("numpy_T", _reverse_dims),
        ("permute", _permute),
        ("movedim", _movedim),
        ("expand expand_as broadcast_to", _expand),
        ("repeat", _repeat),
        ("repeat_interleave", _repeat_interleave),
        ("slice", _slice),
        ("narrow", _narrow),
        ("select", _select),
        ("split split_with_sizes chunk unsafe_split unsafe_chunk tensor_split", _split),
        ("unbind", _unbind),
        ("flip roll index_select", _same_along),
        ("gather", _gather),
        ("index", _index),
        ("pad constant_pad_nd", _pad),
        ("sum mean", _reduce),
        ("adaptive_avg_pool1d", _pool(1)),
        ("adaptive_avg_pool2d", _pool(2)),
    )
    for names, rule in rules:
        for name in aten_names(names):
            yield name, rule


MOVES: dict[str, Move] = dict(_table())
"""Rules by schema name, for ops whose first tensor argument carries the labels."""
