"""Attributes that hold sizes: which plain values of a cut module's parts may have to change.

Python code keeps sizes beside its tensors (``num_heads``, ``split_size``, ``in_features``). A value that
equals a size of a group before the cut may be that size, or something else of the same value. Parts near the
group are assumed to mean it, parts above are not; :func:`search` tries these assumptions, and others one by
one, until the module computes what the cut graph computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxcompress.structure.module import set_attributes
from fxcompress.structure.record import AttributeChange
from fxcompress.structure.sizes import GroupSizes, pattern

__all__ = ["Candidate", "find_candidates", "search"]

_TRIALS = 128
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Candidate:
    """Values that change together: one attribute in corresponding parts of all blocks.

    Args:
        changes: One per part.
        assumed: Whether it is changed unless that fails.
        sure: Whether the value follows from the part's own tensors, so that there is nothing to try.
    """

    changes: tuple[AttributeChange, ...]
    assumed: bool
    sure: bool = False


def find_candidates(module: nn.Module, before: Shapes, groups: Iterable[GroupSizes]) -> list[Candidate]:
    """Everything in ``module`` (its tensors are cut, its attributes are not) that may have to change.

    Args:
        module: The cut module.
        before: Shape of every parameter and buffer before the cut, by its name in the cut module.
        groups: Sizes of the groups that were cut.
    """
    near, far = _parts(groups)
    bound = _bound_attributes(module, before)
    found: dict[tuple[str, str, bool, bool], list[AttributeChange]] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            sure = (type(part), name) in bound
            if sure:
                key, dim = bound[type(part), name]
                now = _tensor(part, key)
                new = value if now is None else _sized(value, now.shape[dim])
            elif path in near or path in far:
                new = _changed(value, near.get(path) or far[path])
            else:
                continue
            if new != value:
                change = AttributeChange(path, name, value, new)
                found.setdefault((pattern(path), name, path in near, sure), []).append(change)
    return [
        Candidate(tuple(changes), assumed=close or sure, sure=sure)
        for (_, _, close, sure), changes in found.items()
    ]


def search(
    module: nn.Module, candidates: Sequence[Candidate], works: Callable[[], str]
) -> tuple[tuple[AttributeChange, ...], str]:
    """The changes with which the module works, left applied; and why none do, empty on success.

    Args:
        module: The cut module; its attributes are changed.
        candidates: What may change.
        works: Runs the module; empty when it computes what it should, else what is wrong.
    """
    open_ones = [candidate for candidate in candidates if not candidate.sure]
    first = ""
    for trial, flipped in enumerate(_subsets(len(open_ones))):
        if trial == _TRIALS:
            break
        chosen = [change for c in candidates if c.sure for change in c.changes]
        for number, candidate in enumerate(open_ones):
            if candidate.assumed != (number in flipped):
                chosen += candidate.changes
        set_attributes(module, chosen)
        wrong = works()
        if not wrong:
            return _needed(module, chosen, open_ones, works), ""
        first = first or wrong
        _undo(module, chosen)
    return (), first


def _needed(
    module: nn.Module,
    chosen: list[AttributeChange],
    open_ones: Sequence[Candidate],
    works: Callable[[], str],
) -> tuple[AttributeChange, ...]:
    """The changes without those that nothing needs: they may have been something else of the same value."""
    for candidate in open_ones:
        if candidate.changes[0] in chosen:
            _undo(module, candidate.changes)
            if works():
                set_attributes(module, candidate.changes)
            else:
                chosen = [change for change in chosen if change not in candidate.changes]
    return tuple(chosen)


def _undo(module: nn.Module, changes: Sequence[AttributeChange]) -> None:
    set_attributes(module, [AttributeChange(c.owner, c.name, c.new, c.old) for c in reversed(changes)])


def _subsets(count: int) -> Iterator[frozenset[int]]:
    """Which assumptions to give up: none, each alone, each pair and so on."""
    for size in range(count + 1):
        yield from map(frozenset, itertools.combinations(range(count), size))


def _parts(
    groups: Iterable[GroupSizes],
) -> tuple[dict[str, dict[int, set[int]]], dict[str, dict[int, set[int]]]]:
    """Path of a part → size before → sizes after: parts of what holds a group, and parts above."""
    near: dict[str, dict[int, set[int]]] = {}
    far: dict[str, dict[int, set[int]]] = {}
    for group in groups:
        owners = [name.rpartition(".")[0].split(".") for name in group.members]
        shared = _common(owners)
        for owner in owners:
            for depth in range(len(owner) + 1):
                table = near if depth >= shared else far
                sizes = table.setdefault(".".join(owner[:depth]), {})
                for old, new in group.pairs().items():
                    sizes.setdefault(old, set()).add(new)
    return near, far


def _common(paths: Sequence[Sequence[str]]) -> int:
    """Length of the common beginning of all paths."""
    together = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return len(list(together))


def _changed(value: Any, sizes: Mapping[int, set[int]]) -> Any:
    """The value with sizes replaced where there is one new size for it; else the value itself."""
    if type(value) is int and value > 1:
        options = sizes.get(value, set())
        return next(iter(options)) if len(options) == 1 else value
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        return type(value)(_changed(item, sizes) for item in value)
    return value


def _sized(value: Any, size: int) -> Any:
    return type(value)([size]) if isinstance(value, tuple | list) else size


def _bound_attributes(
    module: nn.Module, before: Shapes
) -> dict[tuple[type[nn.Module], str], tuple[str, int]]:
    """Attributes that in every instance of a class equal the same dimension of one of its tensors."""
    instances: dict[type[nn.Module], list[tuple[str, nn.Module]]] = {}
    for path, part in module.named_modules():
        if any(True for _ in _own(part)):
            instances.setdefault(type(part), []).append((path, part))
    bound = {}
    for cls, parts in instances.items():
        for name, value in vars(parts[0][1]).items():
            if not (type(value) is int or (type(value) is tuple and len(value) == 1)):
                continue
            dims = [_equal_dims(path, part, name, before) for path, part in parts]
            same = sorted(set.intersection(*dims))
            agree = all(len({_size(part, dim) for dim in same}) == 1 for _, part in parts)
            if same and agree:
                bound[cls, name] = same[0]
    return bound


def _equal_dims(path: str, part: nn.Module, name: str, before: Shapes) -> set[tuple[str, int]]:
    value = vars(part).get(name)
    size = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    found: set[tuple[str, int]] = set()
    for key in _own(part):
        shape = before.get(f"{path}.{key}".lstrip("."), ())
        found.update((key, dim) for dim, length in enumerate(shape) if length == size)
    return found


def _size(part: nn.Module, dim: tuple[str, int]) -> int:
    tensor = _tensor(part, dim[0])
    return -1 if tensor is None else tensor.shape[dim[1]]


def _own(part: nn.Module) -> Iterator[str]:
    for table in (part._parameters, part._buffers):
        yield from (key for key, tensor in table.items() if tensor is not None)


def _tensor(part: nn.Module, key: str) -> Tensor | None:
    found = part._parameters.get(key)
    return part._buffers.get(key) if found is None else found
