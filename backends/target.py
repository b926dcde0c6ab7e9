"""What a graph is lowered for: the CPU's kernels, or generated Triton kernels on a CUDA device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.backends.cpu.kernel_types import Kernel, LinearSpec
from fxcompress.backends.cpu.lowering import LoweringInterpreter
from fxcompress.backends.cpu.planning import PackedInput, Plan
from fxcompress.backends.cpu.selection import why

if TYPE_CHECKING:
    from fxcompress.backends.triton.devices import Device

__all__ = ["TARGET_VARIABLE", "CpuTarget", "TritonTarget", "target_of"]

TARGET_VARIABLE = "FXCOMPRESS_TARGET"
"""``triton``: lower graphs on the CPU too, for Triton's interpreter (``TRITON_INTERPRET=1``)."""
Choose = Callable[[LinearSpec], tuple[Kernel | None, str]]


class CpuTarget:
    """The CPU of this machine."""

    choose: Choose | None = None  # the default of make_plan

    def prepare(self, graph: fx.Graph) -> None:
        """Nothing."""

    def extend(self, plan: Plan, nodes: Sequence[fx.Node], position: Mapping[fx.Node, int]) -> None:
        """Nothing: plans of other kinds of weights are made elsewhere."""

    def describe(self, weight: fx.Node) -> str | None:
        """What runs for a weight that no plan has, or None when it is dequantized."""
        return None

    def reason(self, spec: LinearSpec) -> tuple[str, str, str]:
        """Why a use has its kernel, the generated kernel's name, and its source."""
        return why(spec)

    def interpreter(
        self, module: fx.GraphModule, plan: Plan, packed: Mapping[PackedInput, Tensor]
    ) -> LoweringInterpreter:
        """What computes a block."""
        return LoweringInterpreter(module, plan, packed)


class TritonTarget(CpuTarget):
    """A CUDA device.

    Args:
        device: What is known of it.
    """

    def __init__(self, device: Device) -> None:
        from fxcompress.backends.triton.selection import choose_kernel

        self.device = device
        self.choose = lambda spec: choose_kernel(spec, device)

    def prepare(self, graph: fx.Graph) -> None:
        """Write products with outlier columns as the kernels' patterns want them."""
        from fxcompress.backends.triton.patterns import separate_outliers

        separate_outliers(graph)

    def extend(self, plan: Plan, nodes: Sequence[fx.Node], position: Mapping[fx.Node, int]) -> None:
        """Plan 2:4 weights, and 8-bit floats with float activations."""
        from fxcompress.backends.triton.singles import plan_singles

        plan_singles(plan, nodes, position, self.device)

    def describe(self, weight: fx.Node) -> str | None:
        """See :class:`CpuTarget`."""
        from fxcompress.backends.triton.singles import describe

        return describe(weight, self.device)

    def reason(self, spec: LinearSpec) -> tuple[str, str, str]:
        """See :class:`CpuTarget`."""
        from fxcompress.backends.triton.selection import why as triton_why

        return triton_why(spec, self.device)

    def interpreter(
        self, module: fx.GraphModule, plan: Plan, packed: Mapping[PackedInput, Tensor]
    ) -> LoweringInterpreter:
        """What computes a block."""
        from fxcompress.backends.triton.lowering import TritonInterpreter

        return TritonInterpreter(module, plan, packed, self.device)


def target_of(values: Iterable[Any]) -> CpuTarget:
    """The target of a graph with these values."""
    devices = {value.device for value in values if isinstance(value, Tensor)}
    cuda = next((device for device in devices if device.type == "cuda"), None)
    if cuda is None and os.environ.get(TARGET_VARIABLE) != "triton":
        return CpuTarget()
    from fxcompress.backends.triton.tuning import current_device

    return TritonTarget(current_device(cuda or torch.device("cpu")))
