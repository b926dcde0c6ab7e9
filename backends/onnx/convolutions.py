"""Convolutions between quantizers, in the shape that ONNX Runtime makes one integer kernel of.

The runtime wants the bias in int32 and the next quantizer directly behind the convolution, so a batch
normalisation behind it moves into the scales of its output channels and the bias: the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.analysis.op_arguments import arguments, op_name
from fxcompress.backends.onnx.activations import static_parameters
from fxcompress.backends.onnx.graph_constants import Constants
from fxcompress.backends.onnx.operators import ops
from fxcompress.backends.onnx.weights import Packed

__all__ = ["lower_quantized"]

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def lower_quantized(
    graph: fx.Graph, constants: Constants, packed_of: Callable[[Any], Packed | None]
) -> dict[fx.Node, str]:
    """Rewrite convolutions of a calibrated activation with a symmetric weight, one scale per output.

    Returns:
        ``dequantize_weight`` node → what became of it.
    """
    done: dict[fx.Node, str] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _CONVOLUTIONS:
            continue
        x, weight = node.args[:2]
        packed, calibrated = packed_of(weight), static_parameters(x)
        if packed is None or calibrated is None or not _one_scale_per_output(packed):
            continue
        assert isinstance(weight, fx.Node)
        _rewrite(graph, constants, node, weight, packed, constants.value(calibrated[0]))
        done[weight] = "QDQ Conv"
    return done


def _one_scale_per_output(packed: Packed) -> bool:
    layout = packed.layout
    rows = layout.row_dims == 1 and not layout.batch_dims and layout.perm == tuple(range(len(layout.perm)))
    return rows and packed.zero is None and packed.per_row


def _rewrite(
    graph: fx.Graph, constants: Constants, node: fx.Node, weight: fx.Node, packed: Packed, x_scale: Tensor
) -> None:
    given = arguments(node)
    bias_node, codes_node = given["bias"], weight.args[0]
    assert isinstance(codes_node, fx.Node)
    codes = (packed.unpacked()[0].to(torch.int16) - (1 << (packed.bits - 1))).reshape(packed.layout.shape)
    scale = packed.row_scales()[0].reshape(-1).double()  # [O]
    bias = torch.zeros_like(scale) if bias_node is None else _known(constants, bias_node)
    if bias is None:
        return
    normalisation = _batch_norm_behind(node, constants)
    if normalisation is not None:
        norm, factor, shift = normalisation
        scale, bias = scale * factor, bias.double() * factor + shift
        sign = torch.where(scale < 0, -1, 1)
        codes = codes * sign.to(torch.int16).reshape(-1, *[1] * (codes.dim() - 1))
        scale = scale.abs().clamp_min(torch.finfo(torch.float32).tiny)
        norm.replace_all_uses_with(node)
        graph.erase_node(norm)
    name = constants.name(codes_node).removesuffix(".terms.0.codes")
    dtype = weight.args[-1]
    step = x_scale.double() * scale
    rounded = torch.round(bias.double() / step).clamp(-(2**31), 2**31 - 1).to(torch.int32)
    add = constants.add
    q = add((node, "conv codes"), f"{name}.codes", lambda: codes.to(torch.int8).contiguous())
    s = add((node, "conv scale"), f"{name}.scale", lambda: scale.to(dtype))  # type: ignore[arg-type]
    z = add((node, "conv zero"), f"{name}.zero", lambda: torch.zeros(scale.shape, dtype=torch.int8))
    b = add((node, "conv bias"), f"{name}.bias_codes", lambda: rounded)
    t = add((node, "conv bias scale"), f"{name}.bias_scale", lambda: step.to(dtype))  # type: ignore[arg-type]
    with graph.inserting_before(node):
        dense = graph.call_function(ops.dequantize_linear.default, (q, s, z, 0, 0))
        offset = graph.call_function(ops.dequantize_linear.default, (b, t, None, 0, 0))
    node.args = (
        given["input"],
        dense,
        offset,
        *(given[k] for k in ("stride", "padding", "dilation", "groups")),
    )
    node.kwargs = {}


def _known(constants: Constants, node: fx.Node) -> Tensor | None:
    """A bias as a tensor; one that a form gives is cast where it is used."""
    if node.op == "call_function" and op_name(node) == "aten::to" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    value: Tensor | None = constants.value(node)
    return value


def _batch_norm_behind(node: fx.Node, constants: Constants) -> tuple[fx.Node, Tensor, Tensor] | None:
    """``(node, factor [O], shift [O])`` of a batch normalisation that alone reads the convolution."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if op_name(user) != "aten::batch_norm":
        return None
    given = arguments(user)
    if given["training"] or given["input"] is not node:
        return None
    mean, variance = (constants.value(given[key]) for key in ("running_mean", "running_var"))
    if mean is None or variance is None:
        return None
    deviation = (variance.double() + given["eps"]).sqrt()
    gain, offset = constants.value(given["weight"]), constants.value(given["bias"])
    factor = 1 / deviation if gain is None else gain.double() / deviation
    shift = -mean.double() * factor
    return user, factor, shift if offset is None else shift + offset.double()
