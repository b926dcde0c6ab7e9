"""Plans of compiled graphs as JSON: slots, steps by number, weights and layouts by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fxcompress.backends.cpu.kernel_types import LinearSpec
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.cpu.named_layouts import layout_named
from fxcompress.backends.cpu.roofline import KernelUse
from fxcompress.backends.execution_plan import ExecutionPlan, PackedSlot, Step
from fxcompress.backends.target import CpuTarget
from fxcompress.errors import BindingError
from fxcompress.form_inputs import TensorRef

__all__ = ["NotKeptError", "plan_from_entry", "plan_to_entry", "use_from_entry", "use_to_entry"]


class NotKeptError(Exception):
    """Why a step is not kept."""


def plan_to_entry(plan: ExecutionPlan) -> dict[str, Any]:
    """A plan without its functions and constants.

    Raises:
        NotKeptError: it holds what JSON or this machine has no name for.
    """
    if plan.outputs is None:
        raise NotKeptError("it runs uncompiled")
    outputs = list(zip(plan.outputs, plan.constant_outputs, strict=True))
    if any(constant and not isinstance(value, int | float | None) for value, constant in outputs):
        raise NotKeptError("an output is a constant of another kind")
    for item in plan.packed:
        if layout_named(item.layout.name) != item.layout:
            raise NotKeptError(f"its weights lie in the layout {item.layout.name}")
    return {
        "weights": [[index, name] for index, name in plan.weights.items()],
        "compressed": list(plan.compressed),
        "arguments": plan.arguments,
        "slots": plan.slots,
        "steps": [[step.sources, step.targets] for step in plan.steps],
        "forms": [[_ref_to(ref), slot] for ref, slot in plan.forms],
        "packed": [
            [item.layout.name, [_ref_to(ref) for ref in item.terms], item.tensor, item.slot]
            for item in plan.packed
        ],
        "outputs": outputs,
    }


def plan_from_entry(
    entry: dict[str, Any], functions: Sequence[Any], constants: Mapping[str, Tensor]
) -> ExecutionPlan:
    """The plan of an entry whose ``functions`` (one number per step) have been added.

    Raises:
        BindingError: a layout is unknown here.
    """
    steps = [
        Step(functions[number], tuple(sources), tuple(targets))
        for number, (sources, targets) in zip(entry["functions"], entry["steps"], strict=True)
    ]
    packed = [
        PackedSlot(_layout(name), tuple(map(_ref_from, terms)), tensor, slot)
        for name, terms, tensor, slot in entry["packed"]
    ]
    return ExecutionPlan(
        weights=dict(entry["weights"]),
        compressed=tuple(entry["compressed"]),
        arguments=[(index, slot) for index, slot in entry["arguments"]],
        slots=entry["slots"],
        steps=steps,
        forms=[(_ref_from(ref), slot) for ref, slot in entry["forms"]],
        packed=packed,
        attributes=[(int(slot), value) for slot, value in constants.items()],
        outputs=[value for value, _ in entry["outputs"]],
        constant_outputs=[constant for _, constant in entry["outputs"]],
    )


def _layout(name: str) -> Layout:
    found = layout_named(name)
    if found is None:
        raise BindingError(f"the layout {name} is unknown here.")
    return found


def _ref_to(ref: TensorRef) -> list[str]:
    return [ref.name, ref.path]


def _ref_from(entry: list[str]) -> TensorRef:
    return TensorRef(*entry)


def use_to_entry(use: KernelUse) -> list[Any]:
    """A product that a plan runs, for explanations."""
    spec = {**asdict(use.spec), "dtype": str(use.spec.dtype).removeprefix("torch.")}
    return [spec, [_ref_to(ref) for ref in use.terms], use.layout.name]


def use_from_entry(entry: list[Any]) -> KernelUse:
    """See :func:`use_to_entry`."""
    spec, terms, layout = entry
    restored = LinearSpec(**{**spec, "dtype": getattr(torch, spec["dtype"])})
    return KernelUse(restored, tuple(map(_ref_from, terms)), _layout(layout), CpuTarget())
