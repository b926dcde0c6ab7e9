"""Values computed from one parameter alone: a rearrangement of ``multiplier · parameter + offset``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.analysis.channel_moves import MOVES, BlockedError
from fxcompress.analysis.op_arguments import arguments, aten_names, op_name
from fxcompress.capture.program import Program

_REARRANGE = aten_names(
    """
    to _to_copy type_as clone contiguous detach alias view reshape _unsafe_view flatten unflatten squeeze
    unsqueeze transpose t mT numpy_T permute expand expand_as broadcast_to slice narrow select
    """
)
_AFFINE = aten_names("add sub rsub mul div neg")


@dataclass(frozen=True, eq=False)
class ParameterView:
    """A node whose value is ``multiplier · parameter.flatten()[index] + offset``.

    Args:
        name: Canonical parameter name.
        node: The node.
        shape: Shape of the parameter.
        index: int64, rank of the node's value; a dimension of size 1 broadcasts.
        multiplier, offset: E.g. 1 and 1 for a gain stored as ``γ`` and used as ``1 + γ``.
        shared: Whether anything else reads the parameter or an intermediate value.
    """

    name: str
    node: fx.Node
    shape: tuple[int, ...]
    index: Tensor
    multiplier: float = 1.0
    offset: float = 0.0
    shared: bool = False


def parameter_view(program: Program, node: object) -> ParameterView | None:
    """Read ``node`` as a view of one floating-point parameter; None when it is anything else."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "placeholder":
        return _of_placeholder(program, node)
    name = op_name(node)
    if name not in _REARRANGE and name not in _AFFINE:
        return None
    args = arguments(node)
    if name in _AFFINE and _constant(args) is None and isinstance(args.get("self"), int | float):
        args = {**args, "self": args["other"], "other": args["self"]}
        if name in ("aten::sub", "aten::div"):
            return None
    if name in _AFFINE and name != "aten::neg" and _constant(args) is None:
        return None
    source = parameter_view(program, args.get("self"))
    if source is None:
        return None
    shared = source.shared or len(node.users) > 1
    if name in _AFFINE:
        affine = _affine(name, args, source)
        if affine is None:
            return None
        multiplier, offset = affine
        return ParameterView(source.name, node, source.shape, source.index, multiplier, offset, shared)
    try:
        index = MOVES[name](node, source.index, args)
    except BlockedError:
        return None
    if not isinstance(index, Tensor) or not _is_float(node):
        return None
    return ParameterView(source.name, node, source.shape, index, source.multiplier, source.offset, shared)


def _of_placeholder(program: Program, node: fx.Node) -> ParameterView | None:
    name = program.weight_of.get(node.name)
    if name is None or name not in program.parameters or not _is_float(node):
        return None
    tensor = program.weights[name]
    bindings = sum(1 for other in program.weight_node(name) if other.users)
    shape = tuple(tensor.shape)
    index = torch.arange(tensor.numel()).reshape(shape)
    return ParameterView(name, node, shape, index, shared=len(node.users) > 1 or bindings > 1)


def _affine(name: str, args: dict[str, object], source: ParameterView) -> tuple[float, float] | None:
    """``(multiplier, offset)`` after an op with a constant."""
    a, c = source.multiplier, source.offset
    if name == "aten::neg":
        return -a, -c
    k = _constant(args)
    if k is None or args.get("alpha", 1) != 1 or args.get("rounding_mode") is not None:
        return None
    if name == "aten::add":
        return a, c + k
    if name == "aten::sub":
        return a, c - k
    if name == "aten::rsub":
        return -a, k - c
    if k == 0:
        return None
    return (a * k, c * k) if name == "aten::mul" else (a / k, c / k)


def _constant(args: dict[str, object]) -> float | None:
    other = args.get("other")
    return float(other) if isinstance(other, int | float) else None


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
