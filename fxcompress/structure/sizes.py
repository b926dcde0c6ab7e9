"""Which numbers a cut changes: what Python or a configuration may know a group by, before and after.

A group of heads, say, changes the number of heads (and of query heads), the rows of each projection, the
width of a fused one and that of each of its parts. Values equal to one of these are candidates for an update;
none is trusted before the module was run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.structure.entries import Entry
from fxcompress.structure.record import Change, follow

__all__ = ["GroupSizes", "all_sizes", "lengths_of", "pattern", "sizes_of", "uneven"]


@dataclass(frozen=True)
class GroupSizes:
    """The sizes of one group.

    Args:
        units: Its units before.
        kept: Its units after.
        factors: Numbers of which a size may be the product with the number of units: 1, the widths of its
            members, the widths of their parts, and query heads per key head.
        members: Parameters it lies in.
    """

    units: int
    kept: int
    factors: tuple[int, ...]
    members: tuple[str, ...]

    def pairs(self) -> dict[int, int]:
        """Size before → size after."""
        return {self.units * factor: self.kept * factor for factor in self.factors}


def sizes_of(group: ChannelGroup, kept: int) -> GroupSizes:
    """The sizes of ``group`` when ``kept`` of its units stay."""
    widths = [member.positions.shape[1] for member in group.members]
    unit = math.gcd(*widths)
    factors = {1, unit, *widths, *(width // unit for width in widths)}
    for member in group.members:
        steps = torch.diff(member.positions[0])
        parts = 1 + int((steps != 1).sum())
        if member.positions.shape[1] % parts == 0:
            factors.add(member.positions.shape[1] // parts)
    return GroupSizes(group.units, kept, tuple(sorted(factors)), tuple(m.name for m in group.members))


def all_sizes(rounds: Iterable[tuple[Change, Mapping[str, GroupSizes]]]) -> dict[str, GroupSizes]:
    """The sizes over several rounds: before the first, after the last, by the names at the end."""
    total: dict[str, GroupSizes] = {}
    for change, sizes in rounds:
        total = {new: _renamed(old, change) for name, old in total.items() if (new := _group(name, change))}
        for name, now in sizes.items():
            first = total.get(name)
            total[name] = now if first is None else dataclasses.replace(now, units=first.units)
    return total


def _group(name: str, change: Change) -> str | None:
    first, dim = name.rsplit(":", 1)
    new = follow(first, [change])
    return None if new is None else f"{new}:{dim}"


def _renamed(sizes: GroupSizes, change: Change) -> GroupSizes:
    names = [follow(name, [change]) for name in sizes.members]
    return dataclasses.replace(sizes, members=tuple(name for name in names if name is not None))


def lengths_of(names: Iterable[str], changes: Iterable[Change]) -> dict[str, tuple[int, list[int]]]:
    """Container → its original length and the original numbers of the entries that stay.

    Args:
        names: Of the original model's parameters; they tell how long each list is.
        changes: In order.
    """
    original = list(names)
    remaining: dict[str, list[int]] = {}
    for change in changes:
        for container in sorted({entry.container for entry in change.removed}):
            if container not in remaining:
                remaining[container] = list(range(_length(original, container)))
            gone = {entry.index for entry in change.removed if entry.container == container}
            remaining[container] = [n for i, n in enumerate(remaining[container]) if i not in gone]
    return {container: (_length(original, container), kept) for container, kept in remaining.items()}


def _length(names: list[str], container: str) -> int:
    head = Entry(container, 0).prefix.removesuffix("0.")
    found = [name[len(head) :].split(".")[0] for name in names if name.startswith(head)]
    return 1 + max((int(part) for part in found if part.isdigit()), default=-1)


def uneven(groups: Mapping[str, GroupSizes]) -> bool:
    """Whether corresponding groups of repeated blocks were of one size and now are of several."""
    after: dict[tuple[str, int], set[int]] = {}
    for name, sizes in groups.items():
        after.setdefault((pattern(name), sizes.units), set()).add(sizes.kept)
    return any(len(kept) > 1 for kept in after.values())


def pattern(name: str) -> str:
    """A name with its numbers replaced, equal for corresponding parts of repeated blocks."""
    return re.sub(r"\d+", "*", name)
