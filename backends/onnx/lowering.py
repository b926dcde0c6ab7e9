"""From a quantize/dequantize graph to a graph of operators that ONNX has.

    linear(x, dequantize_weight(…))                 →  matmul_nbits(x, blocks)
    linear(dequantize(quantize_per_token(x)), …)    →  matmul_integer(codes, codes) · scales
    linear(dequantize(quantize_per_tensor(x)), …)   →  matmul(dequantize_linear(quantize_linear(x)), …)
    any other use of dequantize_weight(…)           →  dequantize_linear(codes)

What has no ONNX operator of its own keeps its definition and decomposes into plain ones. The lowered graph
computes the same function as the one it was made from and can be run in torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from fxcompress.apply import AppliedGraph
from fxcompress.backends.onnx import activations, convolutions
from fxcompress.backends.onnx.decoding import Decoding
from fxcompress.backends.onnx.graph_constants import Constants
from fxcompress.backends.onnx.grouped_attention import fuse_attention
from fxcompress.backends.onnx.products import Products
from fxcompress.backends.onnx.rewriting import Lowered
from fxcompress.backends.onnx.rotary import fuse_rotary
from fxcompress.capture.values import infer_values
from fxcompress.edits import CompressionState
from fxcompress.form_inputs import form_tensor

__all__ = ["lower"]


def lower(
    applied: AppliedGraph,
    state: CompressionState,
    *,
    portable: bool,
    calls: Sequence[Mapping[str, Any]] = (),
) -> Lowered:
    """Lower a rewritten graph in place.

    Args:
        applied: From :func:`fxcompress.apply.apply_state`; its module is changed.
        state: The forms it was made with.
        portable: Only operators of the ONNX standard; else ONNX Runtime's where they are better.
        calls: Inputs by placeholder, for calls of several sizes; without them attention and rotary
            embeddings stay as they are.

    Raises:
        BackendError: a weight in a dtype that the runtime's kernels lack.
    """
    graph = applied.module.graph
    constants = Constants(graph)
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in applied.form_inputs:
            ref = applied.form_inputs[node.name]
            constants.bind(node, f"{ref.name}.{ref.path}", form_tensor(state, ref))
        elif node.name in applied.program.weight_of:
            name = applied.program.weight_of[node.name]
            constants.bind(node, name, applied.program.weights[name])
    lowered = Lowered(applied.module, constants, applied.program.inputs)
    products = Products(lowered, {**_factors(applied), **applied.dequantized}, portable)
    products.run()
    for weight, text in convolutions.lower_quantized(graph, constants, products.packed_of).items():
        products.note(weight, text)
    graph.eliminate_dead_code()
    Decoding(lowered, products.names, portable).run()
    infer_values(graph)
    activations.lower_static(graph, constants)
    if calls and not portable:
        known = constants.tensors()
        calls = [{**known, **call} for call in calls]
        fuse_rotary(graph, calls)
        fuse_attention(graph, calls)
    graph.eliminate_dead_code()
    constants.drop_unread()
    infer_values(graph)
    graph.lint()
    applied.module.recompile()
    return lowered


def _factors(applied: AppliedGraph) -> dict[fx.Node, str]:
    """What dequantizes a factor of a weight → the weight's name and which factor it is."""
    found = {}
    for node in applied.module.graph.nodes:
        codes = node.args[0] if node.op == "call_function" and node.args else None
        ref = applied.form_inputs.get(codes.name) if isinstance(codes, fx.Node) else None
        if ref is not None and ref.path.endswith((".u.codes", ".v.codes")):
            found[node] = f"{ref.name}.{ref.owner.path.rpartition('.')[2]}"
    return found
