"""Spellings that ONNX Runtime fuses, in place of those that torch writes."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["spell_for_fusion"]


def spell_for_fusion(model: ir.Model) -> None:
    """``x · (1 / √v)`` → ``x / √v``: how ONNX Runtime recognises a root-mean-square normalisation."""
    for node in list(model.graph):
        if node.op_type != "Reciprocal" or node.domain:
            continue
        (root,), (inverse,) = node.inputs, node.outputs
        producer = root.producer() if root is not None else None
        if producer is None or producer.op_type != "Sqrt" or inverse.is_graph_output():
            continue
        for user, _ in tuple(inverse.uses()):
            if user.op_type == "Mul" and not user.domain:
                _divide(model.graph, user, inverse, root)
        if not inverse.uses():
            model.graph.remove(node, safe=True)


def _divide(graph: ir.Graph, product: ir.Node, inverse: ir.Value, root: ir.Value | None) -> None:
    x = next((value for value in product.inputs if value is not inverse), None)
    if x is None:
        return  # the square of the inverse
    (old,) = product.outputs
    quotient = ir.node("Div", [x, root])
    (new,) = quotient.outputs
    new.name, new.shape, new.type = old.name, old.shape, old.type
    graph.insert_before(product, quotient)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(product, safe=True)
