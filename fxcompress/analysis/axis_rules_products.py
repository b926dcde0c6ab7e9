"""How products type their dimensions: linear layers, matrix products, einsum, attention, convolutions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import fx

from fxcompress.analysis.axes import Dim, quotient
from fxcompress.analysis.axis_rules import register
from fxcompress.analysis.axis_typing import AxisTyping, Dims, Effect, Product, tensors
from fxcompress.analysis.op_arguments import describe, op_name

_MISMATCH = "multiplies it with channels of another arrangement"


def product(
    typing: AxisTyping,
    node: fx.Node,
    operands: Sequence[tuple[fx.Node, Sequence[Hashable]]],
    result: Sequence[Hashable],
    bias: fx.Node | None = None,
) -> Dims:
    """Type a product whose operands' dimensions are named by labels, as in an einsum."""
    reason = f"{describe(node)} {_MISMATCH}"
    known: dict[Hashable, Dim] = {}
    named: list[tuple[fx.Node, dict[Any, Dim]]] = []
    for operand, labels in operands:
        held: dict[Any, Dim] = {}
        for label, dim in zip(labels, typing.of(operand), strict=True):
            if label in held:
                typing.axes.unify(held[label], dim, reason)
                typing.axes.freeze(dim, f"{describe(node)} takes its diagonal")
            if dim:
                held[label] = dim
                typing.axes.unify(known.setdefault(label, dim), dim, reason)
        named.append((operand, held))
    dims = [known.get(label, ()) for label in result]
    biases = []
    if bias is not None:
        for offset, dim in enumerate(reversed(typing.of(bias)), 1):
            if dim:
                typing.axes.unify(dims[-offset], dim, reason)
        biases.append((bias, tuple(typing.of(bias))))
    record(typing, Product(node, tuple(named), frozenset(result), tuple(biases)))
    return dims


def record(typing: AxisTyping, made: Product) -> None:
    """Note a product, and when its result is zero."""
    typing.products.append(made)
    operands = tuple(operand for operand, _ in made.operands)
    typing.effects[made.node] = Effect("any", operands, tuple(bias for bias, _ in made.biases))


@register("linear")
def _linear(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    rank = len(typing.of(args["input"]))
    batch = list(range(rank - 1))
    weight = ["n", "k"] if len(typing.of(args["weight"])) == 2 else ["k"]
    result = [*batch, *weight[:-1]]
    return product(
        typing, node, [(args["input"], [*batch, "k"]), (args["weight"], weight)], result, args["bias"]
    )


@register("matmul mm bmm mv dot")
def _matmul(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    one, two = tensors(*args.values())
    return _matrices(typing, node, one, two)


def _matrices(typing: AxisTyping, node: fx.Node, one: fx.Node, two: fx.Node, bias: Any = None) -> Dims:
    left, right = len(typing.of(one)), len(typing.of(two))
    rows = ["m"] if left > 1 else []
    columns = ["n"] if right > 1 else []
    batch = list(range(-max(left, right, 2), -2))
    left_labels = [*batch[len(batch) - max(left - 2, 0) :], *rows, "k"]
    right_labels = [*batch[len(batch) - max(right - 2, 0) :], "k", *columns]
    return product(typing, node, [(one, left_labels), (two, right_labels)], [*batch, *rows, *columns], bias)


@register("addmm addmv")
def _addmm(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    bias, one, two = tensors(*args.values())
    return _matrices(typing, node, one, two, bias)


@register("baddbmm")
def _baddbmm(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    return _matrices(typing, node, args["batch1"], args["batch2"], args["self"])


@register("einsum")
def _einsum(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    equation = str(args["equation"]).replace(" ", "")
    sources, arrow, target = equation.partition("->")
    operands = []
    ellipsis = max(len(typing.of(operand)) for operand in args["tensors"])
    for operand, term in zip(args["tensors"], sources.split(","), strict=True):
        rank = len(typing.of(operand)) - len(term.replace("...", ""))
        operands.append((operand, _labels(term, list(range(ellipsis - rank, ellipsis)))))
    if not arrow:
        letters = [label for _, labels in operands for label in labels]
        kept = sorted({x for x in letters if isinstance(x, str) and letters.count(x) == 1})
        result = [*sorted({x for x in letters if isinstance(x, int)}), *kept]
    else:
        rank = len(node.meta["val"].shape) - len(target.replace("...", ""))
        result = _labels(target, list(range(ellipsis - rank, ellipsis)))
    return product(typing, node, operands, result)


def _labels(term: str, ellipsis: list[int]) -> list[Any]:
    before, dots, after = term.partition("...")
    return [*before, *(ellipsis if dots else []), *after]


@register("scaled_dot_product_attention")
def _attention(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    query, key, value = args["query"], args["key"], args["value"]
    q, k, v = (list(typing.of(item)) for item in (query, key, value))
    if args.get("enable_gqa") and len(q) > 2 and len(k) > 2:
        count = quotient(typing.axes.size(q[-3]), typing.axes.size(k[-3]))
        if count is None:
            return None
        copies = typing.axes.new(count)
        k[-3], v[-3] = (*k[-3], *copies), (*v[-3], *copies)
    reason = f"{describe(node)} {_MISMATCH}"
    batch: Dims = []
    for place in range(-len(q), -2):
        dims = [held[place] for held in (q, k, v) if len(held) >= -place and held[place]]
        for dim in dims[1:]:
            typing.axes.unify(dims[0], dim, reason)
        batch.append(dims[0] if dims else ())
    typing.axes.unify(q[-1], k[-1], reason)
    mixed = f"{describe(node)} takes a softmax over it"
    for dim in (k[-2], v[-2]):
        typing.axes.freeze(dim, mixed)
    if args.get("scale") is None:
        typing.axes.freeze(q[-1], f"{describe(node)} scales its scores by the number of these channels")
    _mask(typing, args.get("attn_mask"), batch, reason, mixed)
    if batch:
        typing.heads.append(batch[-1])
    pair = ((query, {"d": q[-1]}), (key, {"d": k[-1]}))
    typing.products.append(Product(node, pair, frozenset()))
    typing.effects[node] = Effect("any", (value,))
    return [*batch, q[-2], v[-1]]


def _mask(typing: AxisTyping, mask: Any, batch: Dims, reason: str, mixed: str) -> None:
    if not isinstance(mask, fx.Node):
        return
    held = typing.of(mask)
    for offset, dim in enumerate(reversed(held), 1):
        if offset <= 2:
            typing.axes.freeze(dim, mixed)
        elif dim:
            typing.axes.unify(batch[2 - offset], dim, reason)


# -- convolutions ----------------------------------------------------------------------------------


@register("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d")
def _convolution(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    source, weight, bias, groups = args["input"], args["weight"], args["bias"], args["groups"]
    held, kernel = typing.of(source), typing.of(weight)
    rank = len(kernel) - 2
    spatial = f"{describe(node)} slides over it"
    for dim in (*held[len(held) - rank :], *kernel[2:]):
        typing.axes.freeze(dim, spatial)
    transposed = "conv_transpose" in op_name(node) or bool(args.get("transposed"))
    outputs, inputs = (kernel[1], kernel[0]) if transposed else (kernel[0], kernel[1])
    reason = f"{describe(node)} {_MISMATCH}"
    channels = held[len(held) - rank - 1]
    result = _grouped(typing, node, (channels, outputs, inputs), (groups, transposed), reason)
    biases = []
    if isinstance(bias, fx.Node):
        typing.axes.unify(result, typing.of(bias)[0], reason)
        biases.append((bias, (result,)))
    group, inner, made = _parts(typing, channels, result, groups, reason)
    data: dict[Any, Dim] = {"g": group, "i": inner}
    filters: dict[Any, Dim] = {"g": group, "i": inner, "o": made}
    record(typing, Product(node, ((source, data), (weight, filters)), frozenset("go"), tuple(biases)))
    if groups > 1:
        typing.literal(node, "groups", None, groups, group)
    sizes = typing.shape(node)[len(held) - rank :]
    return [*held[: len(held) - rank - 1], result, *(typing.axes.new_frozen(s, spatial) for s in sizes)]


def _grouped(
    typing: AxisTyping,
    node: fx.Node,
    dims: tuple[Dim, Dim, Dim],
    how: tuple[int, bool],
    reason: str,
) -> Dim:
    """Unify the input channels with the filters' inputs; returns the output channels."""
    (channels, outputs, inputs), (groups, transposed) = dims, how
    if groups == 1:
        typing.axes.unify(channels, inputs, reason)
        return outputs
    size = typing.axes.size(channels)
    assert isinstance(size, int)
    group, inner = typing.axes.regroup([channels], [groups, size // groups], reason)
    if transposed:
        typing.axes.unify(channels, inputs, reason)
        return (*group, *outputs)
    typing.axes.unify(inner, inputs, reason)
    each, _ = typing.axes.regroup([outputs], [groups, typing.axes.count(outputs) // groups], reason)
    typing.axes.unify(group, each, reason)
    return outputs


def _parts(typing: AxisTyping, channels: Dim, result: Dim, groups: int, reason: str) -> tuple[Dim, Dim, Dim]:
    if groups == 1:
        return (), channels, result
    group, inner = typing.axes.regroup([channels], [groups, typing.axes.count(channels) // groups], reason)
    _, made = typing.axes.regroup([result], [groups, typing.axes.count(result) // groups], reason)
    return group, inner, made


@register("bilinear")
def _bilinear(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    rank = len(typing.of(args["input1"])) - 1
    batch = list(range(rank))
    operands = [(args["input1"], [*batch, "i"]), (args["input2"], [*batch, "j"])]
    return product(typing, node, [*operands, (args["weight"], ["n", "i", "j"])], [*batch, "n"], args["bias"])
