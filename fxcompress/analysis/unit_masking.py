"""Judge, once all axes are known, along which of them cutting a unit equals masking it.

A masked unit is one whose slices are zero in every parameter. Where its axis is contracted or summed,
what it adds must then be exactly zero: the zero has to survive from the parameters up to that op.
A masked expert is also one that is never chosen: wherever experts compete, its score is minus infinity.
Everywhere else ops treat units apart (the rules freeze axes where they do not), so that nothing else can
notice that a unit is gone.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

from torch import fx

from fxcompress.analysis.axes import Axis, Dim
from fxcompress.analysis.axis_typing import AxisTyping, Choice, Effect
from fxcompress.analysis.channel_group import Kind
from fxcompress.analysis.op_arguments import describe

__all__ = ["Judgement"]

_OUTPUT = "it is an output of the model"


class Judgement:
    """Which axes stay whole, and why."""

    def __init__(self, typing: AxisTyping, kinds: Mapping[Axis, Kind]) -> None:
        self.typing = typing
        self.reasons: dict[Axis, str] = {}
        self.choices: dict[Axis, dict[Choice, None]] = {}
        self._zero: dict[fx.Node, frozenset[Axis]] = {}
        for dim, reason in typing.axes.frozen:
            for axis in self.atoms(dim):
                self.freeze(axis, reason)
        grouped = [choice for choice in typing.choices if len(typing.axes.leaves(choice.dim)) > 1]
        for choice in (*grouped, *typing.choices):
            self._judge_choice(choice, kinds)
        self._find_repeated()
        self._find_zeros()
        self._judge()

    def atoms(self, dim: Dim) -> frozenset[Axis]:
        """The variables inside a dimension."""
        return self.typing.atoms(dim)

    def live(self, dims: Iterable[Dim]) -> set[Axis]:
        """Variables of fixed size inside dimensions that are not frozen so far."""
        return {
            axis
            for dim in dims
            for axis in self.atoms(dim)
            if axis not in self.reasons and isinstance(axis.size, int)
        }

    def freeze(self, axis: Axis, reason: str) -> None:
        """The axis stays whole; the first reason is kept, unless the model's output is one."""
        if axis not in self.reasons or reason == _OUTPUT:
            self.reasons[axis] = reason

    def least(self, axis: Axis) -> int:
        """How many units of an axis are chosen; one after the other where those chosen are taken out."""
        counts = [choice.count for choice in self.choices.get(axis, {}) if choice.node in self.typing.labels]
        if any(axis in self.atoms(dim) for dim in self.typing.taken):
            return max(1, sum(counts))
        return max(counts, default=1)

    def _judge_choice(self, choice: Choice, kinds: Mapping[Axis, Kind]) -> None:
        """Experts may compete, one with all others; so many must stay as are chosen."""
        axes = self.atoms(choice.dim)
        experts = {axis for axis in axes if kinds.get(axis) == "experts"}
        for axis in axes:
            self.choices.setdefault(axis, {})[choice] = None
            if axis not in experts:
                self.freeze(axis, choice.reason)
            elif self.typing.axes.leaves(choice.dim) != [axis]:
                self.freeze(axis, f"{describe(choice.node)} chooses among groups of experts")
            elif isinstance(axis.size, int) and self.least(axis) >= axis.size:
                self.freeze(axis, f"{describe(choice.node)} chooses all {axis.size} of them")

    def _find_repeated(self) -> None:
        """An axis that occurs twice in one dimension has no slices of its own there."""
        for dims in self.typing.weights.values():
            for dim in dims:
                self._check_product(dim)

    def _check_product(self, dim: Dim) -> None:
        seen: set[Axis] = set()
        for leaf in self.typing.axes.leaves(dim):
            own = self.atoms((leaf,))
            for axis in own & seen:
                self.freeze(axis, "it occurs twice in one dimension")
            seen |= own
            for part in leaf.parts or ():
                self._check_product(part)

    def _find_zeros(self) -> None:
        typing = self.typing
        for node in typing.program.graph.nodes:
            held = typing.dims.get(node)
            if held is None:
                continue
            flat = [dim for entry in held for dim in (entry if isinstance(entry, list) else [entry]) if dim]
            self._zero[node] = frozenset(self._zeros(node, self.live(flat)))

    def _zeros(self, node: fx.Node, live: set[Axis]) -> Iterable[Axis]:
        if node in self.typing.mutated or not live:
            return ()
        if node.op == "placeholder":
            return live if node.name in self.typing.program.weight_of else ()
        if node.target is operator.getitem:
            return live & self._zero.get(node.args[0], frozenset())  # type: ignore[arg-type]
        effect = self.typing.effects.get(node)
        if effect is None or not effect.operands:
            return ()
        if effect.within is not None:
            live = live & self.live(effect.within)
        return self._masked(effect, live - self.live(effect.without))

    def _masked(self, effect: Effect, live: set[Axis]) -> Iterable[Axis]:
        if effect.kind == "masked":
            return {axis for axis in live if axis in self.choices}
        zeros = [self._zero.get(operand, frozenset()) for operand in effect.operands]
        if effect.kind == "any":
            found = live.intersection(frozenset().union(*zeros))
            for bias in effect.biases:
                found &= self._zero.get(bias, frozenset())
            return found
        if effect.kind == "all":
            return live.intersection(*zeros)
        held = [self.live(self.typing.of(operand)) for operand in effect.operands]
        return {
            axis
            for axis in live
            if all(axis in zero or axis not in own for zero, own in zip(zeros, held, strict=True))
        }

    def _judge(self) -> None:
        for made in self.typing.products:
            for index in range(len(made.operands)):
                for axis in self.live(made.contracted(index)):
                    if not any(axis in self._zero[operand] for operand, _ in made.operands):
                        self.freeze(axis, _added(made.node))
        for node, source in self.typing.poles:
            if self.typing.dims.get(source) is not None:
                for axis in self._zero[source]:
                    self.freeze(axis, f"{describe(node)} is not finite where masking makes it zero")
        for node, source, dim in self.typing.sums:
            for axis in self.live([dim]) - self._zero[source]:
                self.freeze(axis, _added(node))


def _added(node: fx.Node) -> str:
    return f"{describe(node)} adds it up, and a masked unit need not be zero there"
