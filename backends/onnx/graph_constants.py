"""The constant tensors of a graph that is being lowered: made once, named, shared by all their uses."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, fx

__all__ = ["Constants"]


class Constants:
    """Placeholders that stand for tensors known now.

    Args:
        graph: The graph they are in.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._values: dict[fx.Node, Tensor] = {}
        self._names: dict[fx.Node, str] = {}
        self._made: dict[Hashable, fx.Node] = {}
        self._four_bits: set[fx.Node] = set()

    def bind(self, node: fx.Node, name: str, value: Tensor) -> None:
        """Let the placeholder ``node`` stand for ``value``, called ``name`` in the exported file."""
        self._values[node], self._names[node] = value, name

    def value(self, node: Any) -> Any:
        """The tensor a placeholder stands for; None for None and for what is no constant."""
        return self._values.get(node) if isinstance(node, fx.Node) else None

    def name(self, node: fx.Node) -> str:
        """What a constant is called in the exported file, before names are made unique."""
        return self._names[node]

    def has(self, key: Hashable) -> bool:
        """Whether :meth:`add` was called with this key."""
        return key in self._made

    def add(
        self, key: Hashable, name: str, make: Callable[[], Tensor], *, four_bits: bool = False
    ) -> fx.Node:
        """The placeholder for a new tensor; equal keys share one.

        Args:
            key: Identifies what the tensor is.
            name: What it is called in the exported file.
            make: Called when the key is new.
            four_bits: Whether it becomes a tensor of one of ONNX's 4-bit types.
        """
        if key not in self._made:
            with self._graph.inserting_before(next(iter(self._graph.nodes))):
                node = self._graph.placeholder(f"constant_{len(self._made)}")
            value = make()
            node.meta["val"] = value.to("meta")
            self.bind(node, name, value)
            self._made[key] = node
            if four_bits:
                self._four_bits.add(node)
        return self._made[key]

    def drop_unread(self) -> None:
        """Remove placeholders that nothing reads any more."""
        for node in list(self._values):
            if not node.users:
                self._graph.erase_node(node)
                del self._values[node]

    def tensors(self) -> dict[str, Tensor]:
        """Placeholder name → tensor, in graph order."""
        return {node.name: self._values[node] for node in self._graph.nodes if node in self._values}

    def names(self) -> dict[str, str]:
        """Placeholder name → name in the exported file; unique."""
        taken: dict[str, int] = {}
        found = {}
        for node in self._graph.nodes:
            if node not in self._values:
                continue
            name = self._names[node]
            taken[name] = taken.get(name, 0) + 1
            found[node.name] = name if taken[name] == 1 else f"{name}.{taken[name]}"
        return found

    def four_bits(self) -> frozenset[str]:
        """Names of placeholders that become 4-bit tensors."""
        return frozenset(node.name for node in self._four_bits if node in self._values)
