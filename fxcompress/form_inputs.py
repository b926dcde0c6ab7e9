"""Tensors and calls of forms inside a graph: what becomes an input, what a node, and what is shared."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxcompress.edits import CompressionState
from fxcompress.errors import BackendError
from fxcompress.forms import Component, Eager, SiteForm


@dataclass(frozen=True)
class TensorRef:
    """A part of a form, mostly a tensor that a graph takes as input.

    Args:
        name: The parameter.
        path: Dotted path inside its SiteForm.
    """

    name: str
    path: str

    @property
    def owner(self) -> TensorRef:
        """The component that holds this tensor."""
        return TensorRef(self.name, self.path.rpartition(".")[0])

    def __str__(self) -> str:
        """The parameter, and which factor of it when it is one."""
        factor = self.path.split(".")[2:]
        return f"{self.name} ({'.'.join(factor)})" if factor else self.name


@dataclass
class FormInputs:
    """What forms have added to one graph so far.

    Args:
        graph: The graph.
        state: Holds the forms.
        names: Placeholder name → the form tensor it takes; filled here.
        nodes: The placeholders by tensor.
        calls: Nodes by what they compute, for calls that several sites share.
        shared: The tensor that stands for all equal ones that act on the same value.
    """

    graph: fx.Graph
    state: CompressionState
    names: dict[str, TensorRef]
    nodes: dict[TensorRef, fx.Node] = field(default_factory=dict)
    calls: dict[tuple[object, ...], Any] = field(default_factory=dict)
    shared: dict[tuple[object, ...], TensorRef] = field(default_factory=dict)

    def node(self, ref: TensorRef) -> fx.Node:
        """The graph input that takes a form tensor."""
        if ref not in self.nodes:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                node = self.graph.placeholder(f"form_{len(self.nodes)}")
            node.meta["val"] = form_tensor(self.state, ref).to("meta")
            self.nodes[ref] = node
            self.names[node.name] = ref
        return self.nodes[ref]


@dataclass(frozen=True)
class GraphEmit:
    """Turns the calls of one component into nodes.

    Args:
        inputs: Of the graph that is rewritten.
        name: Parameter whose form holds the component.
        path: Where in the form.
        component: The component.
        before: New nodes come before this one.
        of: The activation it acts on. Sites with the same input share what acts alike on it: equal tensors of
            their forms are one input of the graph, equal calls one node. None (a weight) shares nothing.
    """

    inputs: FormInputs
    name: str
    path: str
    component: Component
    before: fx.Node
    of: Any = None

    def call(self, target: Any, *args: Any) -> Any:
        """A node (a tuple of them for several results) in place of the call."""
        key = (target, *map(_hashable, args))
        if self.of is None or key not in self.inputs.calls:
            graph = self.inputs.graph
            with graph.inserting_before(self.before):
                made: Any = graph.call_function(target, args)
                results = len(target._schema.returns)
                if results > 1:
                    made = tuple(graph.call_function(operator.getitem, (made, i)) for i in range(results))
            if self.of is None:
                return made
            self.inputs.calls[key] = made
        return self.inputs.calls[key]

    def tensor(self, field: str) -> fx.Node:
        """The graph input that takes the tensor."""
        ref = TensorRef(self.name, f"{self.path}.{field}")
        if self.of is not None:
            value = Eager(self.component).tensor(field)
            key = (self.of, value.dtype, tuple(value.shape), tensor_bytes(value))
            ref = self.inputs.shared.setdefault(key, ref)
        return self.inputs.node(ref)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's values in row-major order, as bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _hashable(argument: Any) -> object:
    return tuple(map(_hashable, argument)) if isinstance(argument, list | tuple) else argument


def form_tensor(state: CompressionState, ref: TensorRef) -> torch.Tensor:
    """The tensor a :class:`TensorRef` names."""
    return tensor_in(state.forms[ref.name], ref)


def tensor_in(form: SiteForm, ref: TensorRef) -> torch.Tensor:
    """The tensor a :class:`TensorRef` names in a form."""
    value: object = form
    for step in ref.path.split("."):
        value = value[int(step)] if isinstance(value, tuple) else getattr(value, step)
    if not isinstance(value, torch.Tensor):
        raise BackendError(f"{ref.name}: {ref.path} is no tensor of its form.")
    return value
