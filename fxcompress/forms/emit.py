"""One description of what a part of a form computes, for eager execution and for graphs alike.

A component says its computation once, as calls of operators on its own tensors. Run by :class:`Eager` the
calls are made at once (the reference); run by the rewriter of :mod:`fxcompress.apply` each call becomes a
node and each tensor an input of the graph. So both mean the same, and a third party's component needs
nothing but this method to run, export and compile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fxcompress.forms.component import Component


class Emit(Protocol):
    """Where the calls of a component go."""

    def call(self, target: Any, *args: Any) -> Any:
        """Call the operator overload ``target``; several results come as a tuple."""
        ...

    def tensor(self, field: str) -> Any:
        """The component's own tensor ``field`` (dotted for a component within)."""
        ...


@dataclass(frozen=True)
class Eager:
    """Makes every call at once.

    Args:
        component: Whose tensors are meant.
    """

    component: Component

    def call(self, target: Any, *args: Any) -> Any:
        """Call now."""
        return target(*args)

    def tensor(self, field: str) -> Any:
        """Read the tensor."""
        value: Any = self.component
        for step in field.split("."):
            value = value[int(step)] if isinstance(value, tuple) else getattr(value, step)
        return value


@dataclass(frozen=True)
class Within:
    """Emits for a component that is a field of another: its tensors are found under that field.

    Args:
        outer: Where the calls of the outer component go.
        field: Name of the field that holds the inner component.
    """

    outer: Emit
    field: str

    def call(self, target: Any, *args: Any) -> Any:
        """The same call."""
        return self.outer.call(target, *args)

    def tensor(self, field: str) -> Any:
        """The inner component's tensor."""
        return self.outer.tensor(f"{self.field}.{field}")
