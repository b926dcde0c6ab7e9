"""The Program: one captured graph in pre-dispatch ATen whose weights are inputs bound by qualified name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


@dataclass
class Program:
    """A captured graph.

    The graph is flat: placeholders are weights (parameters, buffers, constants) or user inputs, in any order;
    the output is a flat tuple. ``meta["val"]`` of every node holds a fake tensor or symbolic scalar.

    Args:
        graph_module: The pre-dispatch ATen graph.
        weight_of: Placeholder name → canonical qualified name, for parameters, buffers and lifted constants.
        weights: Canonical name → tensor (real). Tied weights appear once.
        parameters: Canonical names that are parameters (the rest are buffers and constants).
        aliases: Every further qualified name of a tied weight → its canonical name.
        inputs: Placeholder names of the user inputs, in flat call order.
        in_spec: Pytree spec of ``(args, kwargs)``, or None when the caller passes flat inputs.
        out_spec: Pytree spec of the output, or None for a flat tuple.
    """

    graph_module: fx.GraphModule
    weight_of: dict[str, str]
    weights: Mapping[str, Tensor]
    parameters: frozenset[str]
    aliases: dict[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    in_spec: pytree.TreeSpec | None = None
    out_spec: pytree.TreeSpec | None = None

    @property
    def graph(self) -> fx.Graph:
        """The fx graph."""
        return self.graph_module.graph

    def placeholders(self) -> list[fx.Node]:
        """All placeholder nodes in call order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def weight_node(self, name: str) -> list[fx.Node]:
        """Placeholders bound to the canonical name ``name`` (several when capture did not merge a tie)."""
        return [node for node in self.placeholders() if self.weight_of.get(node.name) == name]

    def flatten_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Flatten a call of the original model into the order of :attr:`inputs`."""
        return flatten_call(self, args, kwargs)

    def run(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Run the graph eagerly with the given call arguments; returns the model's own output structure."""
        flat = self.run_flat(self.flatten_inputs(args, kwargs or {}), weights)
        return pytree.tree_unflatten(flat, self.out_spec) if self.out_spec is not None else flat

    def run_flat(self, flat_inputs: Sequence[Any], weights: Mapping[str, Tensor] | None = None) -> list[Any]:
        """Run on flat user inputs; ``weights`` overrides bound tensors by canonical name."""
        values = dict(zip(self.inputs, flat_inputs, strict=True))
        call = []
        for node in self.placeholders():
            name = self.weight_of.get(node.name)
            if name is None:
                call.append(values[node.name])
            else:
                call.append(weights[name] if weights is not None and name in weights else self.weights[name])
        with torch.no_grad():
            out = self.graph_module(*call)
        return list(out) if isinstance(out, tuple | list) else [out]


def flatten_call(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Flatten ``(args, kwargs)`` to the program's user inputs, reordering keywords to the captured order.

    Raises:
        CalibrationError: keywords differ from the captured call.
    """
    from fxcompress.errors import CalibrationError

    if program.in_spec is None:
        return [*args, *kwargs.values()]
    captured_kwargs = program.in_spec.child(1)
    expected = list(captured_kwargs.context or [])
    if set(expected) != set(kwargs):
        missing, extra = sorted(set(expected) - set(kwargs)), sorted(set(kwargs) - set(expected))
        raise CalibrationError(
            f"inputs do not match the captured call: missing {missing}, unexpected {extra}.",
            fix="pass the same keyword arguments as in example_inputs.",
        )
    flat, spec = pytree.tree_flatten((tuple(args), {key: kwargs[key] for key in expected}))
    if spec.num_leaves != program.in_spec.num_leaves:
        raise CalibrationError(
            f"inputs flatten to {spec.num_leaves} values, the captured call has {program.in_spec.num_leaves}."
        )
    return flat
