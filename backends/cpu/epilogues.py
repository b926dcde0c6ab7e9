"""What a product does with its results before it stores them, found in the graph of a block.

    mul(silu(linear(x, G)), linear(x, U))  →  one product, gated
    gelu(linear(x, W))                     →  product, activation function
    add(r, linear(x, W))                   →  product, residual sum

A kernel takes its epilogue as an argument, so that there is one kernel per form, not one per form and
epilogue. A gated product wants a gate and what it gates in one block of outputs: the layout interleaves rows.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxcompress.backends.cpu.generator import GATED

aten = torch.ops.aten

FUNCTIONS = ("none", "relu", "silu", "gelu", "gelu_tanh", "sigmoid")
"""Activation functions by their code in ``templates/epilogue.j2``."""
_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}
_PIECES = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class Epilogue:
    """``function(y)``, times the other half of the outputs if ``gated``, plus a residual if given.

    Args:
        function: One of :data:`FUNCTIONS`.
        gated: Whether outputs come in pairs of a gate and what it multiplies.
        gate_last: The gate's rows are the second half (else the first).
        residual: Whether a tensor like the result is added.
    """

    function: str = "none"
    gated: bool = False
    gate_last: bool = False
    residual: bool = False

    @property
    def code(self) -> int:
        """What kernels take, below 16; the residual is a tensor of its own."""
        return FUNCTIONS.index(self.function) + GATED * self.gated

    @property
    def text(self) -> str:
        """For explanations."""
        names = [] if self.function == "none" else [self.function]
        names += ["gate"] if self.gated else []
        names += ["residual"] if self.residual else []
        return " + ".join(names)


PLAIN = Epilogue()


class FusedProduct(NamedTuple):
    """A product together with what follows it.

    Attributes:
        first: First linear of the group.
        epilogue: What follows.
        residual: The node that is added, or None.
    """

    first: fx.Node
    epilogue: Epilogue
    residual: fx.Node | None


class Found(NamedTuple):
    """Every product of a block with something behind it.

    Attributes:
        products: By the node whose value the product then gives.
        absorbed: By the same, the nodes that are not computed any more.
    """

    products: dict[fx.Node, FusedProduct]
    absorbed: dict[fx.Node, set[fx.Node]]


def apply_gate(y: Tensor, function: str, lanes: int) -> Tensor:
    """The gated product of outputs ``[..., 2·I]`` that lie as a gated layout orders them: ``[..., I]``."""
    gate, other = y.unflatten(-1, (-1, 2, lanes)).unbind(-2)
    product: Tensor = (_TORCH[function](gate) * other).flatten(-2)
    return product


def find_epilogues(
    groups: Mapping[fx.Node, Sequence[fx.Node]], outputs: Collection[fx.Node], lanes: int
) -> Found:
    """What can follow each group of linears inside its kernel.

    Args:
        groups: First linear → all linears of a product, whose kernels take epilogues.
        outputs: Nodes of the block that are read elsewhere.
        lanes: Outputs per vector: a gate has a multiple of them.
    """
    found = Found({}, {})
    for first, group in groups.items():
        steps = _Steps(outputs)
        last, function, gate_last = _gate(steps, group, lanes)
        gated = last is not None
        if last is None and len(group) == 1:
            last, function = _function(steps, first)
        if last is None:
            continue
        last, residual = _residual(steps, last)
        if last is first:
            continue
        epilogue = Epilogue(function, gated, gate_last, residual is not None)
        found.products[last] = FusedProduct(first, epilogue, residual)
        found.absorbed[last] = {*group, *steps.absorbed} - {last}
    return found


class _Steps:
    """Follows values that one node alone reads."""

    def __init__(self, outputs: Collection[fx.Node]) -> None:
        self.outputs = outputs
        self.absorbed: set[fx.Node] = set()

    def only_user(self, node: fx.Node) -> fx.Node | None:
        """The one node that reads ``node``, or None; ``node`` must not be read outside the block."""
        if node in self.outputs or len(node.users) != 1:
            return None
        return next(iter(node.users))

    def function_of(self, node: fx.Node) -> tuple[fx.Node, str]:
        """The node that applies a function to ``node``, and which; without one ``node`` and ``"none"``."""
        user = self.only_user(node)
        name = None if user is None else function_name(user)
        return (node, "none") if user is None or name is None else (user, name)


def function_name(node: fx.Node) -> str | None:
    """Which of :data:`FUNCTIONS` a node computes, or None."""
    if node.target is aten.gelu.default:
        tanh = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none") == "tanh"
        return "gelu_tanh" if tanh else "gelu"
    names: dict[Any, str] = {
        aten.relu.default: "relu",
        aten.silu.default: "silu",
        aten.sigmoid.default: "sigmoid",
    }
    return names.get(node.target)


def _function(steps: _Steps, node: fx.Node) -> tuple[fx.Node, str]:
    after, function = steps.function_of(node)
    if after is not node:
        steps.absorbed.update((node, after))
    return after, function


def _gate(steps: _Steps, group: Sequence[fx.Node], lanes: int) -> tuple[fx.Node | None, str, bool]:
    """The product of gate and up, the gate's function, and whether the gate comes last; None without one."""
    nothing = None, "none", False
    halves = tuple(group) if len(group) == 2 else _halves(steps, group[0]) if len(group) == 1 else None
    if halves is None or not _equal_halves(halves, lanes):
        return nothing
    for index in (0, 1):
        gate, other = halves[index], halves[1 - index]
        after, function = steps.function_of(gate)
        if after is gate:
            continue
        product = steps.only_user(after)
        if product is not None and _multiplies(product, after, other) and steps.only_user(other) is product:
            steps.absorbed.update((*halves, after, product))
            return product, function, index == 1
    return nothing


def _halves(steps: _Steps, linear: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two halves that one linear's outputs are cut into along the last dimension, or None."""
    if linear in steps.outputs:
        return None
    users = list(linear.users)
    if len(users) == 1 and users[0].target in _PIECES and users[0] not in steps.outputs:
        cut = users[0]
        pieces = sorted(cut.users, key=lambda node: int(node.args[1]))  # type: ignore[arg-type]
        dim = cut.kwargs.get("dim", cut.args[2] if len(cut.args) > 2 else 0)
        places = [node.args[1] for node in pieces if node.target is operator.getitem]
        if places != [0, 1] or not _is_last(linear, dim):
            return None
        steps.absorbed.add(cut)
        return pieces[0], pieces[1]
    slices = [node for node in users if node.target is aten.slice.Tensor and _is_last(linear, node.args[1])]
    if len(slices) != 2 or len(users) != 2:
        return None
    slices.sort(key=lambda node: int(node.args[2]))  # type: ignore[arg-type]
    half = linear.meta["val"].shape[-1] // 2
    starts = [node.args[2] for node in slices]
    plain = all(len(node.args) < 5 or node.args[4] == 1 for node in slices)
    return (slices[0], slices[1]) if starts == [0, half] and plain else None


def _is_last(node: fx.Node, dim: Any) -> bool:
    return isinstance(dim, int) and dim in (-1, node.meta["val"].dim() - 1)


def _equal_halves(halves: Sequence[fx.Node], lanes: int) -> bool:
    widths = [node.meta["val"].shape[-1] for node in halves]
    return widths[0] == widths[1] and isinstance(widths[0], int) and widths[0] % lanes == 0


def _multiplies(node: fx.Node, one: fx.Node, two: fx.Node) -> bool:
    return node.target is aten.mul.Tensor and set(node.args[:2]) == {one, two}


def _residual(steps: _Steps, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The sum behind ``node`` and what is added; ``node`` itself and None without one."""
    total = steps.only_user(node)
    if total is None or total.target is not aten.add.Tensor or total.kwargs:
        return node, None
    others = [argument for argument in total.args if argument is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return node, None
    if not _alike(node.meta.get("val"), others[0].meta.get("val")):
        return node, None
    steps.absorbed.update((node, total))
    return total, others[0]


def _alike(one: Any, two: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.dtype != two.dtype:
        return False
    if one.dim() != two.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(one.shape, two.shape, strict=True))
