"""How ops type their dimensions: element-wise ops and ops that only move elements.

Every rule takes ``(typing, node, arguments)`` and returns the dimensions of the result, or None when it
does not know this call.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, fx

from fxcompress.analysis.axes import Dim, quotient
from fxcompress.analysis.axis_typing import AxisTyping, Dims, Effect, Rule, tensors
from fxcompress.analysis.op_arguments import aten_names, describe, op_name

__all__ = ["broadcast", "register", "rule_of"]

_RULES: dict[str, Rule] = {}
_MODULES = ("axis_rules_products", "axis_rules_reductions", "axis_rules_layers")

_ZERO_TO_ZERO = """
    abs neg relu leaky_relu gelu silu tanh erf sqrt square hardswish relu6 hardtanh elu selu celu mish sin
    sinh asinh tan atan sign floor ceil round trunc to _to_copy clone contiguous detach alias dropout
    lift_fresh_copy lift_fresh type_as float double half bfloat16 native_dropout feature_dropout expm1
    log1p prelu real conj softshrink hardshrink nan_to_num positive lift
"""
_OTHERS = """
    sigmoid exp log rsqrt reciprocal cos cosh pow clamp clamp_min clamp_max softplus hardsigmoid log_sigmoid
    eq ne lt le gt ge __and__ __or__ __xor__ logical_and logical_or logical_not logical_xor bitwise_and
    bitwise_or bitwise_not bitwise_xor isnan isinf isfinite isin masked_fill floor_divide remainder fmod
    exp2 log2 log10 acos asin atan2 fill zero copy bool int long bernoulli __lshift__ __rshift__ fmin fmax
    addcmul addcdiv lerp rand_like randn_like zeros_like ones_like empty_like full_like threshold digamma
    lgamma erfc erfinv polar heaviside nextafter sub_ ge_ logit softmin xlogy
"""
_SUMS = "add sub rsub maximum minimum"


def register(names: str) -> Any:
    """Decorator: the rule of these ATen operators."""

    def add(rule: Rule) -> Rule:
        for name in aten_names(names):
            _RULES[name] = rule
        return rule

    return add


def rule_of(name: str, *, mutable: bool = False) -> Rule | None:
    """The rule of an operator; one that works in place follows the rule of the one that does not."""
    for module in _MODULES:  # they register themselves
        importlib.import_module(f"fxcompress.analysis.{module}")
    if name in _RULES:
        return _RULES[name]
    return _RULES.get(name.removesuffix("_")) if mutable else None


def broadcast(typing: AxisTyping, node: fx.Node, operands: list[fx.Node], rank: int | None = None) -> Dims:
    """The dimensions of an element-wise op: those of its operands, aligned at the right and unified."""
    rank = max(len(typing.of(operand)) for operand in operands) if rank is None else rank
    result: Dims = [()] * rank
    reason = f"{describe(node)} combines it with channels of another arrangement"
    for operand in operands:
        held = typing.of(operand)
        for place, dim in enumerate(held, rank - len(held)):
            if not result[place]:
                result[place] = dim
            elif dim:
                typing.axes.unify(result[place], dim, reason)
    return result


@register(_ZERO_TO_ZERO)
def _zero_to_zero(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    sources = list(tensors(*args.values()))
    first = sources[0]
    keeps = not isinstance(args.get("min_val"), int | float) or args["min_val"] <= 0 <= args["max_val"]
    if keeps:
        typing.effects[node] = Effect("any", (first,))
    if not isinstance(node.meta["val"], Tensor):
        return None
    if op_name(node) in ("aten::type_as", "aten::to", "aten::dropout"):
        return typing.of(first)
    if op_name(node) == "aten::prelu":
        return _prelu(typing, node, args)
    return broadcast(typing, node, sources)


def _prelu(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Dims:
    held = typing.of(args["self"])
    (slope,) = typing.of(args["weight"])
    if slope:
        typing.axes.unify(held[1], slope, f"{describe(node)} combines it with another arrangement")
    return held


@register(_OTHERS)
def _element_wise(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    sources = list(tensors(*args.values()))
    return broadcast(typing, node, sources) if sources else None


@register(_SUMS)
def _sum(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    sources = list(tensors(args["self"], args["other"]))
    if len(sources) == 2:
        typing.effects[node] = Effect("all", tuple(sources), role="adds")
    elif 0 in (args["self"], args["other"]):
        typing.effects[node] = Effect("any", tuple(sources))
    return broadcast(typing, node, sources)


@register("where")
def _where(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    if "self" not in args:
        return None
    sources = list(tensors(args["self"], args["other"]))
    if len(sources) == 2:
        typing.effects[node] = Effect("all", tuple(sources), role="scales")
    return broadcast(typing, node, [args["condition"], *sources])


@register("mul multiply")
def _mul(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    sources = list(tensors(args["self"], args["other"]))
    typing.effects[node] = Effect("any", tuple(sources), role="scales")
    return broadcast(typing, node, sources)


@register("div true_divide")
def _div(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    sources = list(tensors(args["self"], args["other"]))
    if sources and sources[0] is args["self"]:
        typing.effects[node] = Effect("any", (sources[0],), role="scales")
    return broadcast(typing, node, sources)


# -- moves -----------------------------------------------------------------------------------------


def moves(typing: AxisTyping, node: fx.Node, args: dict[str, Any], key: str = "self") -> Dims:
    """Note that the result holds the elements of one operand; returns that operand's dimensions."""
    source = args[key]
    typing.effects[node] = Effect("any", (source,))
    return list(typing.of(source))


def place(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim


@register("view reshape _unsafe_view flatten unflatten view_as reshape_as")
def _view(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    if "dtype" in args:
        return None
    held = moves(typing, node, args)
    reason = f"{describe(node)} cuts through it"
    result = typing.axes.regroup(held, typing.shape(node), reason)
    sizes = args.get("size", args.get("shape"))
    if op_name(node) == "aten::unflatten":
        first = place(args["dim"], len(held))
        for index, value in enumerate(args["sizes"]):
            typing.literal(node, "sizes", index, value, result[first + index])
    elif sizes is not None:
        key = "size" if "size" in args else "shape"
        for index, value in enumerate(sizes):
            typing.literal(node, key, index, value, result[index])
    return result


@register("permute")
def _permute(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    return [held[dim] for dim in args["dims"]]


@register("transpose swapaxes swapdims")
def _transpose(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    one, two = (value for key, value in args.items() if key != "self")
    held[one], held[two] = held[two], held[one]
    return held


@register("t numpy_T mT adjoint")
def _t(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    if op_name(node) in ("aten::mT", "aten::adjoint"):
        return [*held[:-2], held[-1], held[-2]]
    return held[::-1]


@register("movedim moveaxis")
def _movedim(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    sources, targets = args["source"], args["destination"]
    sources, targets = ([v] if isinstance(v, int) else list(v) for v in (sources, targets))
    rank = len(held)
    fixed = {place(t, rank): held[place(s, rank)] for s, t in zip(sources, targets, strict=True)}
    moved = {place(s, rank) for s in sources}
    rest = iter([dim for index, dim in enumerate(held) if index not in moved])
    return [fixed[index] if index in fixed else next(rest) for index in range(rank)]


@register("unsqueeze")
def _unsqueeze(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    held.insert(place(args["dim"], len(held) + 1), ())
    return held


@register("squeeze")
def _squeeze(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    dims = args.get("dim")
    chosen = range(len(held)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {place(dim, len(held)) for dim in chosen}
    return [dim for index, dim in enumerate(held) if index not in gone or dim]


@register("expand broadcast_to expand_as")
def _expand(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    shape = typing.shape(node)
    sizes = args.get("size")
    if sizes is None:
        like = typing.of(args["other"])
        reason = f"{describe(node)} combines it with channels of another arrangement"
        for dim, other in zip(reversed(held), reversed(like), strict=False):
            if dim:
                typing.axes.unify(dim, other, reason)
        return list(like)
    result: Dims = []
    for index, size in enumerate(shape):
        old = index - (len(shape) - len(held))
        dim = held[old] if old >= 0 else ()
        result.append(dim or typing.axes.new(size))
        typing.literal(node, "size", index, sizes[index], result[-1])
    return result


@register("repeat")
def _repeat(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    counts = args["repeats"]
    held = [()] * (len(counts) - len(held)) + held
    result: Dims = []
    for index, (dim, size) in enumerate(zip(held, typing.shape(node), strict=True)):
        count = quotient(size, typing.axes.size(dim))
        if count is None:
            return None
        copies = typing.axes.new(count)
        result.append((*copies, *dim))
        typing.literal(node, "repeats", index, counts[index], copies)
    return result


@register("repeat_interleave")
def _repeat_interleave(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    if not isinstance(args.get("repeats"), int) or args.get("dim") is None or "self" not in args:
        return None
    held = moves(typing, node, args)
    dim = place(args["dim"], len(held))
    copies = typing.axes.new(args["repeats"])
    held[dim] = (*held[dim], *copies)
    typing.literal(node, "repeats", None, args["repeats"], copies)
    if isinstance(args.get("output_size"), int):
        typing.literal(node, "output_size", None, args["output_size"], held[dim])
    return held


@register("slice narrow")
def _slice(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    index = place(args["dim"], len(held))
    size, kept = typing.axes.size(held[index]), typing.shape(node)[index]
    if size == kept:
        return held
    reason = f"{describe(node)} cuts through it"
    start, step = args.get("start") or 0, args.get("step", 1)
    if not isinstance(size, int) or not isinstance(kept, int) or not isinstance(start, int):
        typing.axes.freeze(held[index], reason)
        held[index] = typing.axes.new_frozen(kept, reason)
        return held
    if kept == 0:  # empty whatever is cut
        held[index] = typing.axes.new(0)
        return held
    start = min(place(start, size), size)
    if step != 1:
        return _stride(typing, held, index, (size, kept, start, step), reason)
    pieces = [piece for piece in (start, kept, size - start - kept) if piece]
    dims = typing.axes.segment(held[index], pieces, reason)
    held[index] = dims[1 if start else 0]
    if start:
        typing.literal(node, "start", None, start, dims[0])
    if "length" in args:
        typing.literal(node, "length", None, kept, held[index])
    elif start + kept < size:
        typing.literal(node, "end", None, start + kept, *dims[: 2 if start else 1])
    return held


def _stride(
    typing: AxisTyping, held: Dims, index: int, numbers: tuple[int, int, int, int], reason: str
) -> Dims:
    """Every ``step``-th element, when that is one of each of ``kept`` runs."""
    size, kept, start, step = numbers
    if size != kept * step or start >= step:
        typing.axes.freeze(held[index], reason)
        held[index] = typing.axes.new_frozen(kept, reason)
        return held
    outer, inner = typing.axes.regroup([held[index]], [kept, step], reason)
    typing.axes.freeze(inner, reason)
    held[index] = outer
    return held


@register("select")
def _select(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    typing.axes.freeze(held.pop(place(args["dim"], len(held))), f"{describe(node)} takes one element of it")
    return held


@register("unbind")
def _unbind(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    typing.axes.freeze(held.pop(place(args["dim"], len(held))), f"{describe(node)} takes its elements apart")
    return [held] * len(node.meta["val"])


@register("split chunk split_with_sizes tensor_split")
def _split(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = moves(typing, node, args)
    index = place(args["dim"], len(held))
    sizes = [int(item.shape[index]) for item in node.meta["val"]]
    pieces = typing.axes.segment(held[index], sizes, f"{describe(node)} cuts through it")
    typing.pieces[node] = pieces
    return [[*held[:index], piece, *held[index + 1 :]] for piece in pieces]


def _unify_rest(typing: AxisTyping, node: fx.Node, held: list[Dims], skip: int | None) -> Dims:
    reason = f"{describe(node)} combines it with channels of another arrangement"
    result = list(held[0])
    for other in held[1:]:
        for index, dim in enumerate(other):
            if index != skip:
                typing.axes.unify(result[index], dim, reason)
    return result


@register("cat concat concatenate")
def _cat(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    parts = [part for part in args["tensors"] if part.meta["val"].dim() > 1 or part.meta["val"].shape[0] != 0]
    typing.effects[node] = Effect("part", tuple(parts))
    held = [typing.of(part) for part in parts]
    index = place(args["dim"], len(held[0]))
    result = _unify_rest(typing, node, held, index)
    result[index] = typing.axes.concat([dims[index] for dims in held])
    return result


@register("stack")
def _stack(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    parts = list(args["tensors"])
    typing.effects[node] = Effect("part", tuple(parts))
    result = _unify_rest(typing, node, [typing.of(part) for part in parts], None)
    new: Dim = typing.axes.new_frozen(len(parts), f"{describe(node)} puts values side by side")
    result.insert(place(args["dim"], len(result) + 1), new)
    return result
