"""How ops carry channel labels for permutations, from any of their values to all others.

Every rule takes ``(search, node)``: some of the node's inputs, or its result, have labels. It labels the
rest, limits the permutation, or raises :class:`BlockedError`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxcompress.analysis.channel_labels import NO_CHANNEL, align, regroup
from fxcompress.analysis.channel_moves import BlockedError
from fxcompress.analysis.op_arguments import arguments, aten_names, describe, op_name, shape_of
from fxcompress.analysis.parameter_views import parameter_view
from fxcompress.analysis.permutation import Search

Rule: TypeAlias = Callable[[Search, fx.Node], None]

_POINTWISE = aten_names(
    """
    add sub rsub mul div neg abs relu relu_ leaky_relu gelu silu silu_ sigmoid tanh exp erf sqrt rsqrt square
    pow clamp clamp_min clamp_max hardtanh relu6 elu selu celu softplus mish hardswish hardsigmoid log_sigmoid
    where maximum minimum masked_fill to _to_copy clone contiguous detach alias type_as
    """
)


def _pointwise(search: Search, node: fx.Node) -> None:
    """All operands and the result have the same labels, broadcast; an operand may be a parameter."""
    rank = len(shape_of(node))
    operands = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
    for source in operands:
        held = search.labels.get(source)
        if held is not None:
            search.assign(node, align(held, rank))
    labels = search.labels[node]
    for source in operands:
        _operand(search, node, source, labels)


def _operand(search: Search, node: fx.Node, source: fx.Node, labels: Tensor) -> None:
    rank = labels.dim()
    shape = shape_of(source)
    size = (1,) * (rank - len(shape)) + tuple(shape)
    labelled = [d for d in range(rank) if labels.shape[d] > 1]
    full = [d for d in labelled if not (isinstance(size[d], int) and size[d] == 1)]
    if not full:
        return  # equal for all channels
    if full != labelled:
        search.limit(labels, full)
        return
    mine = labels.reshape(labels.shape[rank - len(shape) :])
    if source in search.labels or parameter_view(search.program, source) is None:
        search.assign(source, mine)
        return
    view = parameter_view(search.program, source)
    assert view is not None
    if view.shared or len(view.shape) != 1:
        raise BlockedError(f"{view.name}, which {describe(node)} reads, is used elsewhere or is no vector")
    index, values = torch.broadcast_tensors(align(view.index, mine.dim()), mine)
    held = torch.full((view.shape[0],), NO_CHANNEL)
    for place, label in zip(index.flatten().tolist(), values.flatten().tolist(), strict=True):
        if label >= 0 and held[place] >= 0:
            search.unite(held[place : place + 1], torch.tensor([label]))
        elif label >= 0:
            held[place] = label
    search.label_parameter(view.name, 0, held)


def _dropout(search: Search, node: fx.Node) -> None:
    if arguments(node)["train"]:
        raise BlockedError(f"{describe(node)} is random")
    _pointwise(search, node)


def _both_ways(
    search: Search,
    node: fx.Node,
    source: fx.Node,
    there: Callable[[Tensor], Tensor | None],
    back: Callable[[Tensor], Tensor | None],
) -> None:
    for known, other, move in ((source, node, there), (node, source, back)):
        labels = search.labels.get(known)
        if labels is not None:
            moved = move(labels)
            if moved is None:
                raise BlockedError(f"{describe(node)} mixes channels with a dimension of unknown size")
            search.assign(other, moved)


def _reshape(search: Search, node: fx.Node) -> None:
    args = arguments(node)
    source: fx.Node = args["self"] if "self" in args else args["input"]
    if args.get("dtype") is not None:
        raise BlockedError(f"{describe(node)} reinterprets the bits")
    old, new = shape_of(source), shape_of(node)
    _both_ways(
        search, node, source, lambda held: regroup(held, old, new), lambda held: regroup(held, new, old)
    )


def _transpose(search: Search, node: fx.Node) -> None:
    args = arguments(node)
    rank = len(shape_of(node))
    a, b = (args["dim0"], args["dim1"]) if "dim0" in args else (rank - 2, rank - 1)
    _both_ways(
        search,
        node,
        args["self"],
        lambda held: held.transpose(a, b),
        lambda held: held.transpose(a, b),
    )


def _permute(search: Search, node: fx.Node) -> None:
    args = arguments(node)
    rank = len(shape_of(node))
    dims = [int(d) % rank for d in args["dims"]]
    inverse = sorted(range(rank), key=dims.__getitem__)
    _both_ways(
        search, node, args["self"], lambda held: held.permute(dims), lambda held: held.permute(inverse)
    )


def _expand(search: Search, node: fx.Node) -> None:
    """Copies move alike."""
    source = arguments(node)["self"]
    shape = shape_of(source)
    rank = len(shape_of(node))

    def back(held: Tensor) -> Tensor:
        for d in range(rank):
            size = shape[d - (rank - len(shape))] if d >= rank - len(shape) else 1
            if isinstance(size, int) and size == 1 and held.shape[d] > 1:
                held = _same_along(search, held, d)
        return held.reshape(held.shape[rank - len(shape) :])

    _both_ways(search, node, source, lambda held: align(held, rank), back)


def _same_along(search: Search, labels: Tensor, dim: int) -> Tensor:
    """Unite what differs along ``dim`` only; the labels without it."""
    first = labels.narrow(dim, 0, 1)
    one, two = torch.broadcast_tensors(first, labels)
    both = (one >= 0) & (two >= 0)
    search.unite(one[both], two[both])
    return first


def _window(search: Search, node: fx.Node, source: fx.Node, dim: int, start: int, length: int) -> None:
    """The value is elements ``start … start+length-1`` of the source along ``dim``."""

    def there(held: Tensor) -> Tensor:
        return held if held.shape[dim] == 1 else held.narrow(dim, start, length)

    def back(held: Tensor) -> Tensor:
        width = shape_of(source)[dim]
        if held.shape[dim] == 1 or length == width:
            return held
        if not isinstance(width, int):
            raise BlockedError(f"{describe(node)} cuts a dimension of unknown size")
        wide = held.new_full((*held.shape[:dim], width, *held.shape[dim + 1 :]), NO_CHANNEL)
        wide.narrow(dim, start, length).copy_(held)
        return wide

    _both_ways(search, node, source, there, back)


def _slice(search: Search, node: fx.Node) -> None:
    args = arguments(node)
    dim = int(args["dim"]) % len(shape_of(node))
    size = shape_of(args["self"])[dim]
    start, step = args["start"] or 0, args["step"]
    length = shape_of(node)[dim]
    if not all(isinstance(value, int) for value in (size, start, step, length)):
        _both_ways(search, node, args["self"], *(_only_elsewhere(node, dim),) * 2)
        return
    if step != 1:
        raise BlockedError(f"{describe(node)} takes every {step}th channel")
    _window(search, node, args["self"], dim, start % size if start < 0 else start, length)


def _only_elsewhere(node: fx.Node, dim: int) -> Callable[[Tensor], Tensor]:
    def keep(held: Tensor) -> Tensor:
        if held.shape[dim] > 1:
            raise BlockedError(f"{describe(node)} cuts channels at a place known only at run time")
        return held

    return keep


def _split(search: Search, node: fx.Node) -> None:
    """Labels of a split's source; its parts are read by ``getitem``."""
    for user in node.users:
        if user.target is operator.getitem:
            _part(search, user)
        else:
            raise BlockedError(f"{describe(user)} reads all parts of {describe(node)}")


def _part(search: Search, node: fx.Node) -> None:
    parent, index = node.args[0], node.args[1]
    if not isinstance(parent, fx.Node) or not isinstance(index, int) or op_name(parent) not in _SPLITS:
        raise BlockedError(f"{describe(node)} picks one of several results")
    args = arguments(parent)
    dim = int(args["dim"]) % len(shape_of(node))
    sizes = [part.shape[dim] for part in parent.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        _both_ways(search, node, args["self"], *(_only_elsewhere(node, dim),) * 2)
        return
    _window(search, node, args["self"], dim, sum(sizes[:index]), sizes[index])


def _attention(search: Search, node: fx.Node) -> None:
    args = arguments(node)
    for key, what in (("query", "queries"), ("key", "keys"), ("attn_mask", "the mask")):
        if isinstance(args[key], fx.Node) and args[key] in search.labels:
            raise BlockedError(f"{describe(node)} uses it as {what}")
    value = args["value"]
    heads, own = shape_of(node)[-3], shape_of(value)[-3]
    repeat = 1
    if heads != own:
        if not (isinstance(heads, int) and isinstance(own, int)) or heads % own:
            raise BlockedError(f"{describe(node)} has an unknown number of heads")
        repeat = heads // own

    def there(held: Tensor) -> Tensor:
        return held if held.shape[-3] == 1 else held.repeat_interleave(repeat, -3)

    def back(held: Tensor) -> Tensor:
        if held.shape[-3] == 1 or repeat == 1:
            return held
        return _same_along(search, held.unflatten(-3, (own, repeat)), held.dim() - 2).squeeze(-3)

    _both_ways(search, node, value, there, back)
    _mixes_positions(search, node)


def _matmul(search: Search, node: fx.Node) -> None:
    args = arguments(node)
    x: fx.Node = args["self"]
    y: fx.Node = args["other"] if "other" in args else args["mat2"]
    if x in search.labels or len(shape_of(x)) != len(shape_of(y)):
        raise BlockedError(f"{describe(node)} sums over channels")
    _both_ways(search, node, y, lambda held: held, lambda held: held)
    _mixes_positions(search, node)


def _mixes_positions(search: Search, node: fx.Node) -> None:
    labels = search.labels[node]
    if labels.shape[-2] > 1:
        raise BlockedError(f"{describe(node)} sums over channels")
    search.limit(labels, range(labels.dim() - 1))


_SPLITS = aten_names("split split_with_sizes chunk unsafe_split unsafe_chunk tensor_split")


def _table(rows: Sequence[tuple[str, Any]]) -> dict[str, Rule]:
    return {name: rule for names, rule in rows for name in aten_names(names)}


RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_SPLITS, _split),
    "getitem": _part,
    **_table(
        (
            ("dropout", _dropout),
            ("view reshape _unsafe_view _reshape_alias view_as reshape_as", _reshape),
            ("flatten unflatten squeeze unsqueeze", _reshape),
            ("transpose swapaxes t mT", _transpose),
            ("permute", _permute),
            ("expand expand_as broadcast_to", _expand),
            ("slice", _slice),
            ("scaled_dot_product_attention", _attention),
            ("matmul bmm mm", _matmul),
        )
    ),
}
"""Rules by schema name; an op without one ends the search."""
