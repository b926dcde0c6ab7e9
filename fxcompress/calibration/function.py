"""One block as a differentiable function of tensors given for its parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxcompress.calibration.walk import BlockRunner, Plan, Walk
from fxcompress.edits import CompressionState
from fxcompress.errors import CalibrationError

__all__ = ["ProgramBlock"]


class ProgramBlock:
    """The manager's :class:`fxcompress.pass_base.BlockFunction`: what a block computes from its inputs.

    Inputs are those of the compressed model: the blocks before were run with their edits. One batch and one
    block's weights are in memory at a time.

    Args:
        plan: The program's plan.
        walk: Stands at the block.
        state: The run's state, read at each call.
        where: For messages.
    """

    def __init__(self, plan: Plan, walk: Walk, state: CompressionState, where: str) -> None:
        self._plan, self._walk, self._state, self._where = plan, walk, state, where
        block = plan.blocks[walk.position]
        keep = plan.keep[walk.position]
        self._outputs = [node for node in block.nodes if node in keep and _is_floating(node)]
        self._original: BlockRunner | None = None
        members = set(block.nodes)
        program = plan.program
        bound = [program.weight_of[n.name] for n in block.inputs if n.name in program.weight_of]
        self.parameters = tuple(
            name
            for name in dict.fromkeys(bound)
            if name in program.parameters
            and program.weights[name].is_floating_point()
            and all(set(holder.users) <= members for holder in program.weight_node(name))
        )

    @property
    def batches(self) -> int:
        """Number of calibration batches."""
        return len(self._walk.inputs)

    def target(self, batch: int) -> tuple[Tensor, ...]:
        """The original block's floating outputs on the same inputs."""
        if self._original is None:
            original = CompressionState(self._plan.program.weights)
            self._original = BlockRunner(self._plan, self._walk.position, original)
        with torch.no_grad():
            values = self._walk.value(self._original, batch, self._outputs)
        return tuple(values[node] for node in self._outputs)

    def __call__(self, batch: int, tensors: Mapping[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """The block's floating outputs, ``tensors`` in place of its parameters.

        Raises:
            CalibrationError: a tensor is for no parameter of this block alone, or has another shape.
        """
        given = dict(tensors or {})
        for name, tensor in given.items():
            shape = self._plan.program.weights[name].shape if name in self.parameters else None
            if tensor.shape != shape:
                raise CalibrationError(
                    f"{self._where}: {name} of shape {tuple(tensor.shape)} given, expected"
                    f" {tuple(shape) if shape is not None else 'a parameter that only this block uses'}."
                )
        runner = BlockRunner(self._plan, self._walk.position, self._state, tensors=given)
        values = self._walk.value(runner, batch, self._outputs)
        return tuple(values[node] for node in self._outputs)


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
