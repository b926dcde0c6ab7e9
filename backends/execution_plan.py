"""What a compiled graph does at run time, as plain data: which values go where, and which steps use them.

Values live in numbered slots. Arguments and constants fill some of them, every step reads slots and fills
others, and the outputs are read at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.apply import AppliedGraph
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.regions import Region
from fxcompress.form_inputs import TensorRef

__all__ = ["ExecutionPlan", "PackedSlot", "Step", "plan_execution", "plan_reference"]


@dataclass(frozen=True)
class Step:
    """One compiled block.

    Args:
        function: Takes one list of the values below, which it may empty; returns the block's outputs.
        sources: Slots it reads, in order.
        targets: Slots of its results.
    """

    function: Callable[[list[Any]], Sequence[Any]]
    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class PackedSlot:
    """A packed tensor: key ``tensor`` of the ``terms`` in a ``layout``."""

    layout: Layout
    terms: tuple[TensorRef, ...]
    tensor: str
    slot: int


@dataclass
class ExecutionPlan:
    """A graph of blocks.

    Args:
        weights: Argument index → name of the weight it takes, of all arguments that are weights.
        compressed: Those of them that are compressed: what stands in their place is checked on every call.
        arguments: ``(argument index, slot)``.
        slots: Number of slots.
        steps: In order.
        forms: ``(tensor of a form, slot)``.
        packed: Packed tensors.
        attributes: ``(slot, constant of the graph)``.
        outputs: Slot of every output, or the output itself where it is a constant; None when the only step
            returns the outputs itself.
        constant_outputs: Which outputs are constants.
    """

    weights: dict[int, str]
    compressed: tuple[int, ...]
    arguments: list[tuple[int, int]]
    slots: int
    steps: list[Step]
    forms: list[tuple[TensorRef, int]]
    packed: list[PackedSlot] = field(default_factory=list)
    attributes: list[tuple[int, Any]] = field(default_factory=list)
    outputs: list[Any] | None = None
    constant_outputs: list[bool] = field(default_factory=list)

    @property
    def produced(self) -> set[int]:
        """Slots that steps fill."""
        return {slot for step in self.steps for slot in step.targets}

    def releases(self) -> list[list[int]]:
        """Which slots to empty after each step, so that activations do not outlive their use."""
        if self.outputs is None:
            return [[] for _ in self.steps]
        pairs = zip(self.outputs, self.constant_outputs, strict=True)
        keep = {slot for slot, constant in pairs if not constant}
        last: dict[int, int] = {}
        for index, step in enumerate(self.steps):
            for slot in (*step.sources, *step.targets):
                last[slot] = index
        found: list[list[int]] = [[] for _ in self.steps]
        produced = self.produced
        for slot, index in last.items():
            if slot in produced and slot not in keep:
                found[index].append(slot)
        return found


def _frame(
    applied: AppliedGraph, compressed: Callable[[str], bool]
) -> tuple[ExecutionPlan, dict[fx.Node, int]]:
    """A plan without steps, and the slots of the graph's inputs."""
    program = applied.program
    names = [node.name for node in program.placeholders()]
    weights = {
        index: program.weight_of[name] for index, name in enumerate(names) if name in program.weight_of
    }
    order = {name: index for index, name in enumerate(names)}
    slots: dict[fx.Node, int] = {}
    arguments, forms = [], []
    for node in applied.module.graph.nodes:
        if node.op == "placeholder":
            slot = slots.setdefault(node, len(slots))
            if node.name in applied.form_inputs:
                forms.append((applied.form_inputs[node.name], slot))
            else:
                arguments.append((order[node.name], slot))
    rewritten = tuple(index for index, name in weights.items() if compressed(name))
    return ExecutionPlan(weights, rewritten, arguments, len(slots), [], forms), slots


def plan_reference(applied: AppliedGraph, compressed: Callable[[str], bool]) -> ExecutionPlan:
    """The rewritten graph itself as the only step."""
    plan, slots = _frame(applied, compressed)
    forward = applied.module.forward
    plan.steps = [Step(lambda values: forward(*values), tuple(slots.values()), ())]
    return plan


def plan_execution(
    applied: AppliedGraph, regions: Sequence[Region], compressed: Callable[[str], bool]
) -> ExecutionPlan:
    """The steps of compiled blocks.

    Args:
        applied: The rewritten graph (its placeholders and output define the calling convention).
        regions: Its compiled blocks.
        compressed: Whether a weight is.
    """
    plan, slots = _frame(applied, compressed)
    read = {slots[node] for region in regions for node in region.values if node in slots}
    plan.forms = [(ref, slot) for ref, slot in plan.forms if slot in read]
    for node in applied.module.graph.nodes:
        if node.op == "get_attr":
            slots[node] = plan.slots
            plan.attributes.append((plan.slots, _attribute(applied.module, str(node.target))))
            plan.slots += 1
    packed: dict[tuple[str, tuple[TensorRef, ...], str], int] = {}
    for region in regions:
        sources = [slots[node] for node in region.values]
        for item, terms in region.packed:
            key = (item.layout.name, terms, item.tensor)
            if key not in packed:
                packed[key] = plan.slots
                plan.packed.append(PackedSlot(item.layout, terms, item.tensor, plan.slots))
                plan.slots += 1
            sources.append(packed[key])
        targets = []
        for node in region.outputs:
            slots[node] = plan.slots
            targets.append(plan.slots)
            plan.slots += 1
        plan.steps.append(Step(region.function, tuple(sources), tuple(targets)))
    output = applied.module.graph.output_node().args[0]
    flat = output if isinstance(output, list | tuple) else [output]
    plan.outputs = [slots[node] if isinstance(node, fx.Node) else node for node in flat]
    plan.constant_outputs = [not isinstance(node, fx.Node) for node in flat]
    return plan


def _attribute(module: torch.nn.Module, path: str) -> Tensor | Any:
    value: Any = module
    for step in path.split("."):
        value = getattr(value, step)
    return value
