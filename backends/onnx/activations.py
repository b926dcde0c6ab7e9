"""Quantized activations in ONNX: per token as codes and scales, calibrated ones as QuantizeLinear pairs."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxcompress.backends.onnx.graph_constants import Constants
from fxcompress.backends.onnx.operators import ops

__all__ = ["dynamic_codes", "integer_bias", "is_static", "lower_static", "static_parameters"]

fxc = torch.ops.fxcompress


def dynamic_codes(x: Any) -> tuple[fx.Node, fx.Node] | None:
    """``(codes, scale)`` when ``x`` is an activation quantized per token at run time, else None."""
    if (
        not isinstance(x, fx.Node)
        or x.target is not fxc.dequantize_activation.default
        or x.args[2] is not None
    ):
        return None
    codes, scale = x.args[:2]
    for index, part in enumerate((codes, scale)):
        if not isinstance(part, fx.Node) or part.target is not operator.getitem or part.args[1] != index:
            return None
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    source = codes.args[0]
    known = (fxc.quantize_per_token.default, fxc.quantize_outlier_split.default)
    if not isinstance(source, fx.Node) or source is not scale.args[0] or source.target not in known:
        return None
    return codes, scale


def is_static(x: Any) -> bool:
    """Whether ``x`` is an activation quantized to 8 bits with calibrated parameters."""
    return static_parameters(x) is not None


def static_parameters(x: Any) -> tuple[fx.Node, fx.Node] | None:
    """``(scale, zero)`` placeholders of a calibrated 8-bit activation ``x``, or None."""
    if not isinstance(x, fx.Node) or x.target is not fxc.dequantize_activation.default:
        return None
    codes, scale, zero = x.args[:3]
    if not isinstance(codes, fx.Node) or codes.target is not fxc.quantize_per_tensor.default:
        return None
    if codes.args[3] != 8 or codes.args[1] is not scale or codes.args[2] is not zero:
        return None
    assert isinstance(scale, fx.Node)
    assert isinstance(zero, fx.Node)
    return scale, zero


def integer_bias(
    graph: fx.Graph, constants: Constants, node: fx.Node, bias: Any, x: Any, scale: torch.Tensor, dtype: Any
) -> Any:
    """The bias of a product of matrices as int32 codes; without, the runtime keeps the product in float.

    Its step is that of the integer product, so the rounding is far below one unit of the activations.
    Products of more than two dimensions have no such kernel and keep their bias, as do biases that are no
    constants.
    """
    value, found = constants.value(bias), static_parameters(x)
    if value is None or found is None or x.meta["val"].dim() != 2:
        return bias
    step = constants.value(found[0]).double() * scale.double()
    codes = torch.round(value.double() / step).clamp(-(2**31), 2**31 - 1).to(torch.int32)
    name = constants.name(bias)
    q = constants.add((node, "bias codes"), f"{name}.codes", lambda: codes)
    s = constants.add((node, "bias scale"), f"{name}.scale", lambda: step.to(dtype))
    with graph.inserting_before(node):
        return graph.call_function(ops.dequantize_linear.default, (q, s, None, 0, 0))


def lower_static(graph: fx.Graph, constants: Constants) -> None:
    """Turn calibrated quantizers with ONNX's own meaning into QuantizeLinear and DequantizeLinear.

    Narrower integers, 8-bit floats (whose pairs the runtime takes for integers) and scales found at run time
    keep their definitions.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is fxc.quantize_per_tensor.default and node.args[3] == 8:
            _quantize(graph, constants, node, node.args[1], _narrow(constants, node.args[2]), 0)
        elif node.target is fxc.quantize_per_cluster.default and node.args[4] == 8:
            scale, zero = _spread(constants, node, node.args[1:4])
            _quantize(graph, constants, node, scale, zero, -1)
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not _is_quantized(node.args[0]):
            continue
        source = node.args[0]
        if node.target is fxc.dequantize_activation.default:
            _dequantize(graph, constants, node, source, 0)
        elif node.target is fxc.dequantize_per_cluster.default:
            _dequantize(graph, constants, node, source, -1)


def _is_quantized(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is ops.quantize_linear.default


def _quantize(
    graph: fx.Graph, constants: Constants, node: fx.Node, scale: Any, zero: fx.Node, axis: int
) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    dtype = x.meta["val"].dtype
    with graph.inserting_before(node):
        new = graph.call_function(ops.quantize_linear.default, (x, _as(constants, scale, dtype), zero, axis))
    new.meta["val"] = torch.empty_like(x.meta["val"], dtype=constants.value(zero).dtype)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _dequantize(graph: fx.Graph, constants: Constants, node: fx.Node, source: fx.Node, axis: int) -> None:
    _, scale, zero, _ = source.args
    with graph.inserting_before(node):
        new = graph.call_function(
            ops.dequantize_linear.default, (source, _as(constants, scale, node.args[-1]), zero, axis, 0)
        )
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _as(constants: Constants, scale: Any, dtype: Any) -> fx.Node:
    value = constants.value(scale)
    if value.dtype == dtype:
        found: fx.Node = scale
        return found
    return constants.add((scale, dtype), constants.name(scale), lambda: value.to(dtype))


def _unsigned(zero: torch.Tensor) -> torch.Tensor:
    """A signed zero-point for codes counted from 0: what integer kernels of x86 processors multiply."""
    return (zero + 128).to(torch.uint8)


def _narrow(constants: Constants, zero: Any) -> fx.Node:
    """An int32 zero-point of signed codes as one of uint8 codes; both mean the same values."""
    return constants.add((zero, "uint8"), constants.name(zero), lambda: _unsigned(constants.value(zero)))


def _spread(constants: Constants, node: fx.Node, parameters: Any) -> tuple[fx.Node, fx.Node]:
    """Scale and zero-point per channel, from those of the clusters."""
    scale, zero, ends = parameters
    width = node.meta["val"].shape[-1]
    cluster = torch.bucketize(torch.arange(width), constants.value(ends), right=True)
    scales, zeros = constants.value(scale)[cluster], _unsigned(constants.value(zero)[cluster])
    return (
        constants.add((scale, "channels"), constants.name(scale), lambda: scales),
        constants.add((zero, "channels"), constants.name(zero), lambda: zeros),
    )
