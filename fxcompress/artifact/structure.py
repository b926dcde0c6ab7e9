"""The structure of a cut model in the manifest, and what it must satisfy before a module follows it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fxcompress.artifact.schema import AttributeEntry, StructureEntry
from fxcompress.artifact.storage import STORED_DTYPES, dtype_name
from fxcompress.errors import ArtifactError
from fxcompress.structure.entries import Entry
from fxcompress.structure.record import AttributeChange, CallInput, Change, StoredTensor, Structure, follow

__all__ = ["structure_from_entry", "structure_to_entry"]


def structure_to_entry(structure: Structure) -> dict[str, Any]:
    """JSON content."""
    return {
        "changes": [
            {
                "kept": {name: list(units) for name, units in change.kept.items()},
                "removed": [dataclasses.asdict(entry) for entry in change.removed],
            }
            for change in structure.changes
        ],
        "original": {
            name: {"role": o.role, "dtype": dtype_name(o.dtype, name), "shape": list(o.shape)}
            for name, o in structure.original.items()
        },
        "config": [_attribute(change) for change in structure.config],
        "from_config": structure.from_config,
        "attributes": [_attribute(change) for change in structure.attributes],
        "buffers": {
            name: {str(dim): list(positions) for dim, positions in dims.items()}
            for name, dims in structure.buffers.items()
        },
        "cache": [list(shape) for shape in structure.cache],
        "graph": structure.graph,
        "call": [
            {"name": i.name, "dtype": i.dtype, "shape": list(i.shape), "value": i.value}
            for i in structure.call
        ],
    }


def structure_from_entry(entry: StructureEntry, shapes: Mapping[str, tuple[int, ...]]) -> Structure:
    """The structure of a manifest.

    Args:
        entry: Its entry, of the right types.
        shapes: Shapes of the cut model's parameters and persistent buffers.

    Raises:
        ArtifactError: it contradicts itself or the weights.
    """
    changes = []
    for number, change in enumerate(entry.changes):
        for name, units in change.kept.items():
            ascending = all(a < b for a, b in itertools.pairwise(units))
            _require(bool(units) and ascending, f"units kept of {name} in cut {number + 1} are not ascending")
        removed = [Entry(item.container, item.index) for item in change.removed]
        _require(removed == sorted(set(removed)), f"entries removed in cut {number + 1} are not ascending")
        changes.append(Change({n: tuple(u) for n, u in change.kept.items()}, tuple(removed)))
    original = {}
    for name, stored in entry.original.items():
        _require(stored.dtype in STORED_DTYPES, f"{name} has the unknown dtype {stored.dtype!r}")
        original[name] = StoredTensor(tuple(stored.shape), STORED_DTYPES[stored.dtype], stored.role)
    _check_shapes(original, shapes, changes)
    buffers: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, dims in entry.buffers.items():
        _require(all(dim.isdecimal() for dim in dims), f"buffer {name} has no such dimensions")
        buffers[name] = {int(dim): tuple(positions) for dim, positions in dims.items()}
    _require(all(len(shape) == 2 for shape in entry.cache), "cache shapes are not pairs")
    return Structure(
        changes=tuple(changes),
        original=original,
        config=tuple(map(_change, entry.config)),
        from_config=entry.from_config,
        attributes=tuple(map(_change, entry.attributes)),
        buffers=buffers,
        cache=tuple((heads, size) for heads, size in entry.cache),
        graph=entry.graph,
        call=tuple(CallInput(i.name, i.dtype, tuple(i.shape), i.value) for i in entry.call),
    )


def _check_shapes(
    original: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], changes: Sequence[Change]
) -> None:
    """What remains of the original must be the stored weights, none of them larger than it was."""
    remaining = {
        new: stored for name, stored in original.items() if (new := follow(name, changes)) is not None
    }
    for name in remaining.keys() ^ shapes.keys():
        _require(False, f"{name} is only among the {'original' if name in remaining else 'stored'} weights")
    for name, stored in remaining.items():
        now, before = shapes[name], stored.shape
        fits = len(now) == len(before) and all(0 < a <= b for a, b in zip(now, before, strict=True))
        _require(fits or now == before, f"{name} is {now}, cut from {before}")


def _attribute(change: AttributeChange) -> dict[str, Any]:
    return {
        "owner": change.owner,
        "name": change.name,
        "old": list(change.old) if isinstance(change.old, tuple) else change.old,
        "new": list(change.new) if isinstance(change.new, tuple) else change.new,
    }


def _change(entry: AttributeEntry) -> AttributeChange:
    """A change that makes something smaller; sizes are used to allocate memory."""
    where = f"{entry.owner}.{entry.name}".lstrip(".")
    old, new = entry.old, entry.new
    if isinstance(old, int) and isinstance(new, int):
        _require(0 < new <= old, f"{where} changes from {old} to {new}")
    elif isinstance(old, list) and isinstance(new, list):
        smaller = len(new) < len(old) and all(item in old for item in new)
        sizes = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
        cut = len(new) == len(old) and all(type(a) is type(b) is int and 0 < b <= a for a, b in sizes)
        _require(smaller or cut, f"{where} changes from {old} to {new}")
    else:
        _require(False, f"{where} changes its type")
    _require(not entry.name.startswith("__"), f"{where} is no attribute that holds a size")
    return AttributeChange(entry.owner, entry.name, old, new)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ArtifactError(f"structure: {problem}; the artifact is damaged or was edited.")
