"""How ops type dimensions that they reduce, mix, index or create."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxcompress.analysis.axes import Dim, size_value
from fxcompress.analysis.axis_rules import broadcast, moves, place, register
from fxcompress.analysis.axis_typing import AxisTyping, Choice, Dims, Effect, tensors
from fxcompress.analysis.op_arguments import aten_names, describe, op_name


def along(
    typing: AxisTyping, node: fx.Node, source: fx.Node, dims: Any, reason: str, *, judged: bool = False
) -> Any:
    """Type an op that works along some dimensions of one operand, for every tensor that it yields.

    The dimensions are frozen for ``reason``, or noted as a sum, to be ``judged`` later.
    """
    held = typing.of(source)
    if dims is None or dims == []:
        chosen = set(range(len(held)))
    else:
        chosen = {place(dim, len(held)) for dim in ([dims] if isinstance(dims, int) else dims)}
    for dim in chosen:
        if judged:
            typing.sums.append((node, source, held[dim]))
        else:
            typing.axes.freeze(held[dim], reason)
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return _remaining(typing, held, chosen, value, reason)
    return [_remaining(typing, held, chosen, item, reason) for item in value]


def _remaining(typing: AxisTyping, held: Dims, chosen: set[int], value: Tensor, reason: str) -> Dims:
    if value.dim() == len(held):
        return [
            dim if index not in chosen else typing.axes.new_frozen(size_value(value.shape[index]), reason)
            for index, dim in enumerate(held)
        ]
    return [dim for index, dim in enumerate(held) if index not in chosen]


_STATISTICS = """
    mean var std var_mean std_mean amin argmin norm linalg_vector_norm all any prod
    median nanmean cumprod cummax cummin logcumsumexp diff
    min aminmax kthvalue mode flip roll tril triu fft_fft fft_ifft count_nonzero
"""
_ZERO_OF_ZEROS = aten_names("mean amax amin norm linalg_vector_norm std var")
_MOVES = ("aten::flip", "aten::roll")


@register(_STATISTICS)
def _statistic(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    name = op_name(node)
    source = args.get("self", args.get("input"))
    if not isinstance(source, fx.Node):
        return None
    if isinstance(args.get("other"), fx.Node):  # max.other and min.other are element-wise
        sources = [source, args["other"]]
        typing.effects[node] = Effect("all", tuple(sources), role="adds")
        return broadcast(typing, node, sources)
    if name in _MOVES and not args["dims"]:
        return None
    dims: Any = [-2, -1] if name in ("aten::tril", "aten::triu") else args.get("dims", args.get("dim"))
    for extra in tensors(args.get("prepend"), args.get("append")):
        typing.freeze_all(extra, f"{describe(node)} works along it")
    if name in _ZERO_OF_ZEROS:
        typing.effects[node] = Effect("any", (source,))
    reason = f"{describe(node)} works along it: a masked unit would still count"
    return along(typing, node, source, dims, reason)


_CHOICES = "softmax _softmax log_softmax _log_softmax logsumexp topk max amax argmax"


@register(_CHOICES)
def _choice(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    """Units compete; one that is masked does not if its score is minus infinity, and has no share then."""
    dims = args.get("dim")
    chosen = [dims] if isinstance(dims, int) else dims
    if not chosen or len(chosen) != 1 or args.get("largest") is False:
        return _statistic(typing, node, args)
    source = args.get("self", args.get("input"))
    assert isinstance(source, fx.Node)
    held = typing.of(source)
    index = place(chosen[0], len(held))
    dim, count = held[index], args.get("k", 1)
    reason = f"{describe(node)} works along it: a masked unit would still count"
    if not isinstance(count, int):
        return _statistic(typing, node, args)
    typing.choices.append(Choice(node, source, index, dim, count, reason))
    name = op_name(node)
    if "softmax" in name:
        if "log" not in name:
            typing.effects[node] = Effect("masked", (source,), within=(dim,))
        return held
    value = node.meta["val"]
    if name == "aten::argmax":
        typing.labels[node] = dim
    if name == "aten::amax":
        typing.effects[node] = Effect("any", (source,), without=(dim,))
    if isinstance(value, Tensor):
        return _remaining(typing, held, {index}, value, reason)
    typing.labels[node] = [None, dim]
    return [_remaining(typing, held, {index}, item, reason) for item in value]


@register("sort argsort")
def _sort(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    """Numbers of units are sorted alike whatever the numbers are, as long as their order is the same."""
    numbers = typing.numbers(node, args["self"])
    if numbers is not None and op_name(node) == "aten::sort":
        typing.labels[node] = [numbers, None]
    return _statistic(typing, node, args)


@register("cumsum")
def _cumsum(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    """A masked unit that is zero adds nothing for those behind it; its own sum is not zero."""
    source, held = args["self"], typing.of(args["self"])
    dim = held[place(args["dim"], len(held))]
    typing.effects[node] = Effect("any", (source,), without=(dim,))
    typing.sums.append((node, source, dim))
    return held


@register("histc one_hot")
def _counts(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    """Numbers of units counted, or turned into vectors, along the dimension that they number."""
    source = args["self"]
    (*_, size) = typing.shape(node)
    key = "bins" if op_name(node) == "aten::histc" else "num_classes"
    known = typing.labels.get(source)
    if known is None or isinstance(known, list) or args[key] != size or size != typing.axes.size(known):
        return None
    if key == "bins":
        if args["min"] != 0 or args["max"] != size - 1:
            return None
        typing.literal(node, "max", None, args["max"], known, offset=-1)
    typing.numbers(node, source)
    typing.literal(node, key, None, size, known)
    typing.effects[node] = Effect("masked", (source,), within=(known,))
    return [known] if key == "bins" else [*typing.of(source), known]


@register("sum nansum")
def _sum(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    typing.effects[node] = Effect("any", (args["self"],))
    return along(typing, node, args["self"], args.get("dim"), f"{describe(node)} sums over it", judged=True)


# -- look-ups ------------------------------------------------------------------------------------------


@register("embedding")
def _embedding(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    rows, *columns = typing.of(args["weight"])
    typing.axes.freeze(rows, f"{describe(node)} looks its rows up by data")
    typing.effects[node] = Effect("any", (args["weight"],), role="adds")
    return [*typing.of(args["indices"]), *columns]


@register("index")
def _index(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    indices = [*args["indices"], *[None] * (len(held) - len(args["indices"]))]
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if len(indices) != len(held) or any(not _integer(indices[dim]) for dim in used):
        return None
    for dim in used:
        _looked_up(typing, node, args["self"], held[dim], indices[dim])
    looked = broadcast(typing, node, [indices[dim] for dim in used])
    kept = [entry for dim, entry in enumerate(held) if dim not in used]
    adjacent = used == list(range(used[0], used[-1] + 1))
    first = used[0] if adjacent else 0
    return [*kept[:first], *looked, *kept[first:]]


def _looked_up(typing: AxisTyping, node: fx.Node, table: fx.Node, dim: Dim, index: Any) -> None:
    """Slices of ``table`` are taken by ``index``; by numbers of units, every unit has its own."""
    reason = f"{describe(node)} looks it up by data"
    numbers = typing.numbers(node, index)
    if numbers is None:
        typing.axes.freeze(dim, reason)
        return
    typing.axes.unify(dim, numbers, reason)
    if table in typing.constant and len(typing.of(table)) > 2:
        typing.experts.append(dim)


def _integer(index: fx.Node) -> bool:
    value: Tensor = index.meta["val"]
    return not value.is_floating_point() and value.dtype.itemsize > 1


@register("index_select")
def _index_select(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    dim = place(args["dim"], len(held))
    _looked_up(typing, node, args["self"], held[dim], args["index"])
    held[dim] = typing.of(args["index"])[0]
    return held


@register("gather take_along_dim")
def _gather(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held, looked = typing.of(args["self"]), typing.of(args["index"])
    dim = place(args["dim"], len(held))
    reason = f"{describe(node)} looks it up by data"
    for index, (one, two) in enumerate(zip(held, looked, strict=True)):
        if index == dim:
            _looked_up(typing, node, args["self"], one, args["index"])
        elif typing.axes.size(one) != typing.axes.size(two):
            typing.axes.freeze(one, reason)
            typing.axes.freeze(two, reason)
        else:
            typing.axes.unify(one, two, reason)
    return list(looked)


@register("scatter")
def _scatter(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    """Elements placed by numbers of units: a unit that has no number is left as it was."""
    numbers = typing.labels.get(args["index"])
    held = typing.of(args["self"])
    if numbers is None or isinstance(numbers, list):
        return _placed(typing, node, args)
    dim = place(args["dim"], len(held))
    typing.numbers(node, args["index"])
    typing.taken.append(held[dim])
    reason = f"{describe(node)} places its elements by data"
    typing.axes.unify(held[dim], numbers, reason)
    for placed in tensors(args["index"], args.get("src")):
        for index, (one, two) in enumerate(zip(held, typing.of(placed), strict=True)):
            if index == dim:
                typing.axes.freeze(two, reason)
            else:
                typing.axes.unify(one, two, reason)
    typing.effects[node] = Effect("any", (args["self"],), within=(held[dim],))
    return list(held)


@register("scatter_add scatter_reduce index_add index_copy index_fill index_put masked_scatter")
def _placed(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    """Elements go where data says, so that nothing about channels survives."""
    reason = f"{describe(node)} places its elements by data"
    for source in node.all_input_nodes:
        typing.freeze_all(source, reason)
    return typing.fresh(node, reason)


@register("view_as_complex view_as_real")
def _complex(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    if op_name(node) == "aten::view_as_real":
        return [*held, typing.axes.new_frozen(2, f"{describe(node)} takes numbers apart")]
    typing.axes.freeze(held.pop(), f"{describe(node)} makes one number of it")
    return held


# -- creation ------------------------------------------------------------------------------------------


@register("full zeros ones empty new_full new_zeros new_ones new_empty")
def _create(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    result = [typing.axes.new(size) for size in typing.shape(node)]
    for index, value in enumerate(args["size"]):
        typing.literal(node, "size", index, value, result[index])
    return result


@register("arange linspace")
def _arange(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    """Slopes of heads are computed from their numbers; the numbers of those that stay are picked."""
    (size,) = typing.shape(node)
    if isinstance(size, int):
        typing.numbered[node] = typing.axes.new(size)
        return [typing.numbered[node]]
    return typing.fresh(node, f"{describe(node)} numbers its elements")


@register("eye scalar_tensor tril_indices triu_indices rand randn hann_window")
def _fixed(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    return typing.fresh(node, f"{describe(node)} makes values that depend on the place")


# -- pooling -------------------------------------------------------------------------------------------

_POOLS = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool"


@register(" ".join(f"{kind}{rank}d" for kind in _POOLS.split() for rank in (1, 2, 3)))
def _pool(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    typing.effects[node] = Effect("any", (args["self"],))
    rank = int(op_name(node).removesuffix("d")[-1])
    return along(typing, node, args["self"], list(range(-rank, 0)), f"{describe(node)} slides over it")


_RESIZES = "nearest1d nearest2d nearest3d linear1d bilinear2d trilinear3d bicubic2d"


@register(" ".join(f"upsample_{kind}" for kind in _RESIZES.split()))
def _upsample(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    source = args.get("self", args.get("input"))
    assert isinstance(source, fx.Node)
    typing.effects[node] = Effect("any", (source,))
    rank = int(op_name(node).removesuffix("d")[-1])
    return along(typing, node, source, list(range(-rank, 0)), f"{describe(node)} resizes it")


@register("pad constant_pad_nd")
def _pad(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    widths = args["pad"]
    padded = [
        -1 - index
        for index in range(len(widths) // 2)
        if any(not isinstance(width, int) or width != 0 for width in widths[2 * index : 2 * index + 2])
    ]
    if not padded or args.get("value") in (None, 0, 0.0):
        typing.effects[node] = Effect("any", (args["self"],))
    if not padded:
        return list(typing.of(args["self"]))
    return along(typing, node, args["self"], padded, f"{describe(node)} pads it")
