"""How norms and grouped products of experts type their dimensions."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxcompress.analysis.axis_rules import _RULES, register
from fxcompress.analysis.axis_rules_products import product
from fxcompress.analysis.axis_typing import AxisTyping, Effect, tensors
from fxcompress.analysis.op_arguments import describe


@register("layer_norm rms_norm")
def _layer_norm(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    held = list(typing.of(args["input"]))
    count = len(args["normalized_shape"])
    reason = f"{describe(node)} normalizes over it: a masked unit would still count"
    for dim in held[len(held) - count :]:
        typing.axes.freeze(dim, reason)
    for gain in tensors(args["weight"], args.get("bias")):
        for dim, own in zip(held[len(held) - count :], typing.of(gain), strict=True):
            typing.axes.unify(dim, own, reason)
    return held


@register("batch_norm instance_norm")
def _batch_norm(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    """Every channel by itself; with gain and bias zero, the channel is."""
    held = list(typing.of(args["input"]))
    own = tensors(args["weight"], args["bias"], args["running_mean"], args["running_var"])
    for vector in own:
        typing.axes.unify(held[1], typing.of(vector)[0], f"{describe(node)} combines it with other channels")
    gain, bias = args["weight"], args["bias"]
    if isinstance(gain, fx.Node):
        biases = (bias,) if isinstance(bias, fx.Node) else ()
        typing.effects[node] = Effect("any", (gain,), biases, role="scales")
    return held


@register("group_norm")
def _group_norm(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    """Groups of channels are normalized by themselves; inside a group, every channel counts."""
    held, groups = list(typing.of(args["input"])), args["num_groups"]
    reason = f"{describe(node)} normalizes over it: a masked unit would still count"
    size = typing.axes.size(held[1])
    if not isinstance(size, int):
        return None
    group, inner = typing.axes.regroup([held[1]], [groups, size // groups], reason)
    for dim in (inner, *held[2:]):
        typing.axes.freeze(dim, reason)
    for vector in tensors(args["weight"], args["bias"]):
        typing.axes.unify(held[1], typing.of(vector)[0], f"{describe(node)} combines it with other channels")
    typing.literal(node, "num_groups", None, groups, group)
    if isinstance(args["weight"], fx.Node):
        biases = tuple(tensors(args["bias"]))
        typing.effects[node] = Effect("any", (args["weight"],), biases, role="scales")
    return held


def _grouped_product(typing: AxisTyping, node: fx.Node, args: dict[str, Any]) -> Any:
    """Rows sorted by expert, each multiplied with its expert's matrix: ``[T, K] · [E, K, N]``."""
    rows, matrices, *rest = tensors(*args.values())
    if len(typing.of(rows)) != 2 or len(typing.of(matrices)) != 3:
        return None
    reason = f"{describe(node)} deals its rows by data"
    typing.axes.freeze(typing.of(rows)[0], reason)
    experts = typing.of(matrices)[0]
    typing.experts.append(experts)
    if len(rest) != 1:
        typing.axes.freeze(experts, reason)
    for ends in rest:  # where each expert's rows end; a masked one has none
        typing.axes.unify(experts, typing.of(ends)[0], reason)
    return product(typing, node, [(rows, ["t", "k"]), (matrices, ["e", "k", "n"])], ["t", "n"])


for _name in ("aten::_grouped_mm", "transformers::grouped_mm_fallback", "transformers::grouped_mm"):
    _RULES[_name] = _grouped_product
