"""Find the configuration that builds the cut model: candidates come from equal values, builds decide.

A model class of transformers is built from changed configurations, without memory, until its tensors have the
cut model's names and shapes. What was found that way is a plain checkpoint of that library.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxcompress.artifact.content import stored_tensors
from fxcompress.hf import build_model
from fxcompress.structure.module import nested_configs
from fxcompress.structure.record import AttributeChange
from fxcompress.structure.sizes import GroupSizes

__all__ = ["changed_content", "config_content", "find_configuration"]

_BUILDS = 64
Shapes = Mapping[str, tuple[int, ...]]


def config_content(config: Any) -> dict[str, Any]:
    """A configuration as the content of ``config.json``."""
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return content


def find_configuration(
    module: Any,
    wanted: Shapes,
    groups: Mapping[str, GroupSizes],
    lengths: Mapping[str, tuple[int, list[int]]],
) -> tuple[AttributeChange, ...] | None:
    """Changes of ``module.config`` with which its class has the ``wanted`` tensors, or None.

    Args:
        module: The original model, of a class that transformers has.
        wanted: Shape of every parameter and persistent buffer of the cut model, under all names.
        groups: Sizes of the groups that were cut.
        lengths: Container → its original length and the entries that stay.
    """
    options = _options(module.config, groups, lengths)
    content = config_content(module.config)
    for chosen in itertools.islice(_assignments(options), _BUILDS):
        if chosen and _builds(module, content, chosen, wanted):
            return _needed(module, content, chosen, wanted)
    return None


def _needed(
    module: Any, content: dict[str, Any], chosen: tuple[AttributeChange, ...], wanted: Shapes
) -> tuple[AttributeChange, ...]:
    """The changes without those the tensors do not need: they may be something else of the same value."""
    for change in chosen:
        fewer = tuple(other for other in chosen if other is not change)
        if _builds(module, content, fewer, wanted):
            chosen = fewer
    return chosen


def _builds(
    module: Any, content: dict[str, Any], changes: tuple[AttributeChange, ...], wanted: Shapes
) -> bool:
    return _shapes(type(module), changed_content(content, changes)) == dict(wanted)


def changed_content(content: dict[str, Any], changes: tuple[AttributeChange, ...]) -> dict[str, Any]:
    """The content of ``config.json`` with changes."""
    content = copy.deepcopy(content)
    for change in changes:
        owner = content
        for part in filter(None, change.owner.split(".")):
            owner = owner[part]
        owner[change.name] = copy.copy(change.new)
    return content


def _options(
    config: Any, groups: Mapping[str, GroupSizes], lengths: Mapping[str, tuple[int, list[int]]]
) -> list[tuple[AttributeChange, ...]]:
    """For every entry that may change, the changes to try."""
    sizes: dict[int, set[int]] = {}
    for group in groups.values():
        for old, new in group.pairs().items():
            sizes.setdefault(old, set()).add(new)
    for length, kept in lengths.values():
        sizes.setdefault(length, set()).add(len(kept))
    options = []
    for path, owner in nested_configs(config).items():
        plain = json.loads(owner.to_json_string(use_diff=False))
        for name, value in plain.items():
            found = [AttributeChange(path, name, value, new) for new in _new_values(value, sizes, lengths)]
            if found and not name.startswith("_") and hasattr(owner, name):
                options.append(tuple(found))
    return options


def _new_values(
    value: Any, sizes: Mapping[int, set[int]], lengths: Mapping[str, tuple[int, list[int]]]
) -> Iterator[Any]:
    if type(value) is int:
        yield from sorted(sizes.get(value, set()) - {value}, reverse=True)
    elif isinstance(value, list):
        shorter = [[value[n] for n in kept] for length, kept in lengths.values() if length == len(value) > 1]
        yield from shorter
        if not shorter and value and all(type(item) is int for item in value):
            places = [[*sorted(sizes.get(item, set())), item] for item in value]
            for made in itertools.islice(itertools.product(*places), 8):
                if list(made) != value:
                    yield list(made)


def _assignments(options: list[tuple[AttributeChange, ...]]) -> Iterator[tuple[AttributeChange, ...]]:
    """Every entry changed first, then all but one, and so on; each with all its new values."""
    for left in range(len(options) + 1):
        for out in itertools.combinations(range(len(options)), left):
            changing = [choices for number, choices in enumerate(options) if number not in out]
            yield from itertools.product(*changing)


def _shapes(cls: type[nn.Module], content: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the tensors of a class built from a configuration; None when it refuses it."""
    for device in ("meta", None):  # values computed while building need real memory, which few classes do
        try:
            built = build_model(cls, content, device=None if device is None else torch.device(device))
        except Exception:  # a class may check its configuration in any way
            continue
        return {name: tuple(tensor.shape) for name, tensor, _ in stored_tensors(built)}
    return None
