"""What happened to a model's structure, as data: enough to repeat it on the original module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxcompress.structure.entries import Entry, renumbered

__all__ = ["AttributeChange", "CallInput", "Change", "StoredTensor", "Structure", "follow"]


@dataclass(frozen=True)
class Change:
    """One commit.

    Args:
        kept: Channel group → units kept, by the names and numbers that hold after ``removed`` is gone.
        removed: List entries taken out, by the names that held before.
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    removed: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or persistent buffer of the original model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str


@dataclass(frozen=True)
class AttributeChange:
    """A plain value that Python keeps beside the tensors.

    Args:
        owner: Module it belongs to, by its name in the cut model; ``""`` for the model itself. For a
            configuration, the path of the nested configuration.
        name: Attribute.
        old: Value in the original.
        new: Value in the cut model.
    """

    owner: str
    name: str
    old: Any
    new: Any


@dataclass(frozen=True)
class CallInput:
    """One input of the captured call.

    Args:
        name: Keyword; empty for a positional argument.
        dtype: Name of a tensor's dtype; empty for other values.
        shape: Of a tensor.
        value: Anything that is no tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    value: bool | int | float | str | None = None


@dataclass(frozen=True)
class Structure:
    """All changes of a run, and how the module follows them.

    Args:
        changes: In order.
        original: Every parameter and persistent buffer of the original model by canonical name.
        config: Changes of the configuration.
        from_config: Whether the model's class builds the cut model from the changed configuration alone.
        attributes: Changes of module attributes, where the configuration does not suffice.
        buffers: Non-persistent buffer (name in the cut model) → dimension → positions kept of what the module
            computes.
        cache: ``(heads, size)`` of the keys and values of every layer, where layers differ.
        graph: Why the module cannot follow and the cut graph runs instead; empty when it can.
        call: The call that was captured, for running the graph: a path and a type per input.
    """

    changes: tuple[Change, ...] = ()
    original: Mapping[str, StoredTensor] = field(default_factory=dict)
    config: tuple[AttributeChange, ...] = ()
    from_config: bool = False
    attributes: tuple[AttributeChange, ...] = ()
    buffers: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    cache: tuple[tuple[int, int], ...] = ()
    graph: str = ""
    call: tuple[CallInput, ...] = ()

    def rename(self, name: str) -> str | None:
        """The name in the cut model of something in the original; None when it is gone."""
        return follow(name, self.changes)


def follow(name: str, changes: Sequence[Change]) -> str | None:
    """The name that a parameter or module has after ``changes``; None when it went with a removed entry."""
    current: str | None = name
    for change in changes:
        if current is not None:
            current = renumbered(current, change.removed)
    return current
