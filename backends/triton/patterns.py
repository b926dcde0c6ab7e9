"""What else of a captured graph has a kernel: quantizers behind gates and norms, second terms, caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxcompress.analysis.op_arguments import arguments
from fxcompress.backends.cpu.planning import weight_of_linear

__all__ = ["Joined", "Norm", "gate_of", "join_terms", "norm_of", "separate_outliers"]

aten = torch.ops.aten
ops = torch.ops.fxcompress
MOST_RANK = 128


def separate_outliers(graph: fx.Graph) -> int:
    """Write products with ``codes + outlier columns`` as two products; returns how many.

    linear(x, dequantize(…) + columns)  →  linear(x, dequantize(…)) + linear(x[columns], values)
    """
    found = 0
    for node in list(graph.nodes):
        if node.target is not aten.linear.default:
            continue
        turned = node.args[1].target is aten.t.default
        total = node.args[1].args[0] if turned else node.args[1]
        parts = _codes_and_columns(total, turned)
        if parts is None:
            continue
        codes, columns, values = parts
        x, bias = node.args[0], node.args[2:]
        with graph.inserting_before(node):
            weight = graph.call_function(aten.t.default, (codes,)) if turned else codes
            y = graph.call_function(aten.linear.default, (x, weight, *bias))
            chosen = graph.call_function(aten.index_select.default, (x, -1, columns))
            beside = graph.call_function(aten.linear.default, (chosen, values))
            new = graph.call_function(aten.add.Tensor, (y, beside))
        shape = node.meta["val"]
        for made in (y, beside, new):
            made.meta["val"] = shape
        if turned:
            weight.meta["val"] = node.args[1].meta["val"]
        x_value, size = x.meta["val"], columns.meta["val"].shape[0]
        chosen.meta["val"] = x_value.new_empty((*x_value.shape[:-1], size))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        found += 1
    if found:
        graph.eliminate_dead_code()
    return found


def _codes_and_columns(total: Any, turned: bool) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor or len(total.users) != 1:
        return None
    codes, placed = total.args[:2]
    if not isinstance(codes, fx.Node) or codes.target is not ops.dequantize_weight.default:
        return None
    if isinstance(placed, fx.Node) and placed.target is aten.t.default and turned:
        placed = placed.args[0]
    elif turned:
        return None
    if not isinstance(placed, fx.Node) or placed.target is not aten.index_copy.default:
        return None
    empty, _, columns, values = placed.args[:4]
    if not isinstance(empty, fx.Node) or empty.target is not aten.new_zeros.default:
        return None
    if not isinstance(columns, fx.Node) or not isinstance(values, fx.Node):
        return None
    return codes, columns, values


@dataclass(frozen=True)
class Joined:
    """A sum of two products that one kernel computes.

    Args:
        main: The product with codes.
        tensors: Nodes of the second term by the kernel's name for them.
        inner: Nodes computed inside the kernel.
    """

    main: fx.Node
    tensors: dict[str, fx.Node]
    inner: tuple[fx.Node, ...]


def join_terms(node: fx.Node) -> Joined | None:
    """``linear(x, codes) + linear(x[columns], values)`` or ``+ linear(linear(x, v), u)`` as one product."""
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return None
    main, beside = node.args
    if not isinstance(main, fx.Node) or not isinstance(beside, fx.Node):
        return None
    if weight_of_linear(main) is None or len(main.users) != 1 or len(beside.users) != 1:
        return None
    if beside.target is not aten.linear.default or len(beside.args) != 2:
        return None
    first, second = beside.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or len(first.users) != 1:
        return None
    if first.target is aten.index_select.default and first.args[:2] == (main.args[0], -1):
        columns = first.args[2]
        assert isinstance(columns, fx.Node)
        return Joined(main, {"columns": columns, "values": second}, (main, first, beside))
    plain = first.target is aten.linear.default and len(first.args) == 2 and first.args[0] is main.args[0]
    if not plain or not isinstance(first.args[1], fx.Node):
        return None
    v = first.args[1]
    if _rank(v) > MOST_RANK or weight_of_linear(first) is not None or weight_of_linear(beside) is not None:
        return None
    return Joined(main, {"v": v, "u": second}, (main, first, beside))


def _rank(v: fx.Node) -> int:
    value = v.meta.get("val")
    return int(value.shape[0]) if isinstance(value, Tensor) and value.dim() == 2 else MOST_RANK + 1


def gate_of(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(gate, up)`` where ``x = silu(gate) · up``, of one shape."""
    if x.target is not aten.mul.Tensor:
        return None
    for one, other in (x.args[:2], x.args[1::-1]):
        if isinstance(one, fx.Node) and one.target is aten.silu.default and isinstance(other, fx.Node):
            gate = one.args[0]
            assert isinstance(gate, fx.Node)
            if _same_type(gate, other) and _same_type(one, x):
                return gate, other
    return None


class Norm(NamedTuple):
    """A normalisation over the last dimension; ``kind`` is ``"rms-norm"`` or ``"layer-norm"``."""

    kind: str
    x: fx.Node
    tensors: tuple[fx.Node, ...]  # weight, and the bias of a layer norm: [K]
    eps: float


def norm_of(x: fx.Node) -> Norm | None:
    """The normalisation that a node is the result of; both with a weight, in the dtype of their input.

    ``weight · (input · rsqrt(mean(input²) + eps))``, and ``layer_norm`` with weight and bias.
    """
    if x.target is aten.layer_norm.default:
        return _layer_norm(x)
    if x.target is not aten.mul.Tensor:
        return None
    for weight, normal in (x.args[:2], x.args[1::-1]):
        if not isinstance(weight, fx.Node) or not isinstance(normal, fx.Node):
            continue
        if _dims(weight) == 1 and normal.target is aten.to.dtype and isinstance(normal.args[0], fx.Node):
            found = _root_mean_square(normal.args[0])
            if found is not None and _same_type(found[0], x):
                return Norm("rms-norm", found[0], (weight,), found[1])
    return None


def _layer_norm(node: fx.Node) -> Norm | None:
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if not isinstance(weight, fx.Node) or not isinstance(bias, fx.Node) or _dims(weight) != 1:
        return None
    return Norm("layer-norm", x, (weight, bias), float(given["eps"])) if _same_type(x, node) else None


def _root_mean_square(product: fx.Node) -> tuple[fx.Node, float] | None:
    if product.target is not aten.mul.Tensor:
        return None
    wide, root = product.args[:2]
    if (
        not isinstance(wide, fx.Node)
        or not isinstance(root, fx.Node)
        or root.target is not aten.rsqrt.default
    ):
        return None
    shifted = root.args[0]
    if not isinstance(shifted, fx.Node) or shifted.target not in (aten.add.Tensor, aten.add.Scalar):
        return None
    mean, eps = shifted.args[:2]
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim or not isinstance(eps, float | int):
        return None
    square = mean.args[0]
    along = list(mean.args[1])  # type: ignore[arg-type]
    if along != [-1] or len(mean.args) < 3 or mean.args[2] is not True or not isinstance(square, fx.Node):
        return None
    if square.target is not aten.pow.Tensor_Scalar or square.args != (wide, 2):
        return None
    if wide.target is not aten.to.dtype or wide.args[1] is not torch.float32:
        return None
    source = wide.args[0]
    assert isinstance(source, fx.Node)
    return source, float(eps)


def _dims(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def _same_type(one: fx.Node, two: fx.Node) -> bool:
    a, b = one.meta.get("val"), two.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.dtype == b.dtype and a.dim() == b.dim() and bool(a.shape == b.shape)
