"""List entries: the part of a model's names that a block owns, and the names that remain without it.

A repeated block is an entry of some list of modules (``model.layers.3``), which its parameters' names show.
When entries go, those behind move up, and so do the names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["Entry", "entries_of", "renumbered"]


@dataclass(frozen=True, order=True)
class Entry:
    """Entry ``index`` of the list of modules ``container``."""

    container: str
    index: int

    @property
    def prefix(self) -> str:
        """What the names of its parameters begin with."""
        return f"{self.container}.{self.index}." if self.container else f"{self.index}."


def entries_of(owned: Collection[str], others: Collection[str]) -> list[Entry] | str:
    """The list entries that consist of ``owned`` names, or why there are none.

    Args:
        owned: Names that only one block uses.
        others: All further names of the model that something uses.
    """
    found: set[Entry] = set()
    for name in owned:
        entry = next((e for e in _prefixes(name) if not any(o.startswith(e.prefix) for o in others)), None)
        if entry is None:
            return f"{name} is in no list entry of its own"
        found.add(entry)
    return sorted(found)


def _prefixes(name: str) -> list[Entry]:
    parts = name.split(".")
    return [
        Entry(".".join(parts[:place]), int(part)) for place, part in enumerate(parts[:-1]) if part.isdigit()
    ]


def renumbered(name: str, removed: Sequence[Entry]) -> str | None:
    """The name of a parameter (or module) when ``removed`` entries are gone; None when it goes with them."""
    for container in sorted({entry.container for entry in removed}):
        head = f"{container}." if container else ""
        if not name.startswith(head):
            continue
        first, *rest = name[len(head) :].split(".")
        if not first.isdigit():
            continue
        gone = [entry.index for entry in removed if entry.container == container]
        if int(first) in gone:
            return None
        name = ".".join([f"{head}{int(first) - sum(1 for index in gone if index < int(first))}", *rest])
    return name
