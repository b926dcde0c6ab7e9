"""Make a module follow a structure: smaller tensors, fewer list entries, other sizes in its attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import ArtifactError
from fxcompress.structure.record import AttributeChange, Change, Structure, follow

__all__ = ["apply_structure", "owner_of", "remove_entries", "set_attributes"]

Values = Callable[[str, Tensor], Tensor]


def apply_structure(module: nn.Module, structure: Structure, values: Values) -> nn.Module:
    """A copy of the original module that follows a structure.

    Args:
        module: The original; not modified, and its parameters are not copied.
        structure: What changed.
        values: ``(name in the cut model, the original tensor) → tensor`` for parameters and persistent
            buffers.

    Raises:
        ArtifactError: the structure names modules, attributes or entries that the module does not have.
    """
    clone = cut_tensors(module, structure.changes, values)
    for name, kept in structure.buffers.items():
        owner, key = owner_of(clone, name)
        buffer = owner._buffers.get(key)
        if buffer is None:
            raise ArtifactError(f"structure: the module has no buffer {name}.")
        for dim, positions in kept.items():
            if dim >= buffer.dim() or max(positions, default=0) >= buffer.shape[dim]:
                raise ArtifactError(f"structure: {name} has no such positions in dimension {dim}.")
            buffer = buffer.index_select(dim, torch.tensor(positions, device=buffer.device))
        owner._buffers[key] = buffer
    set_attributes(clone, structure.attributes)
    set_config(clone, structure.config)
    return clone


def cut_tensors(module: nn.Module, changes: Sequence[Change], values: Values) -> nn.Module:
    """A copy in evaluation mode with other parameters and persistent buffers, and without removed entries."""
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        new = follow(name, changes)
        value = parameter.detach() if new is None else values(new, parameter)
        memo[id(parameter)] = nn.Parameter(value.detach(), requires_grad=False)
    clone = copy.deepcopy(module, memo).eval()
    remove_entries(clone, changes)
    for prefix, owner in clone.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                owner._buffers[key] = values(f"{prefix}.{key}".lstrip("."), buffer).clone()
    return clone


def remove_entries(module: nn.Module, changes: Iterable[Change]) -> None:
    """Delete removed list entries, and renumber attributes that held an entry's place in its list.

    Raises:
        ArtifactError: there is no such list, or no such entry.
    """
    for change in changes:
        for container in sorted({entry.container for entry in change.removed}):
            entries = module_at(module, container)
            gone = {entry.index for entry in change.removed if entry.container == container}
            if not isinstance(entries, nn.ModuleList | nn.Sequential) or max(gone) >= len(entries):
                raise ArtifactError(
                    f"structure: {container or 'the model'} is no list with entry {max(gone)}."
                )
            numbered = _places(entries)
            for index in sorted(gone, reverse=True):
                del entries[index]
            for place, entry in enumerate(entries):
                for path, attribute in numbered:
                    setattr(entry.get_submodule(path), attribute, place)


def _places(entries: nn.ModuleList | nn.Sequential) -> list[tuple[str, str]]:
    """Attributes (path of a submodule, name) that hold the place of every entry in the list."""
    if len(entries) < 2:
        return []
    common: set[tuple[str, str]] | None = None
    for place, entry in enumerate(entries):
        own = {
            (path, key)
            for path, submodule in entry.named_modules()
            for key, value in vars(submodule).items()
            if type(value) is int and value == place
        }
        common = own if common is None else common & own
    return sorted(common or ())


def set_attributes(module: nn.Module, changes: Iterable[AttributeChange]) -> None:
    """Set plain attributes of submodules.

    Raises:
        ArtifactError: no such submodule or attribute, or it is no size that could change.
    """
    for change in changes:
        owner = module_at(module, change.owner)
        found = vars(owner).get(change.name)
        if type(found) not in (int, tuple, list) or _plain(found) != _plain(change.old):
            where = f"{change.owner}.{change.name}".lstrip(".")
            raise ArtifactError(f"structure: {where} is {found!r}, expected {change.old!r}.")
        setattr(owner, change.name, tuple(change.new) if type(found) is tuple else change.new)


def set_config(module: nn.Module, changes: Sequence[AttributeChange]) -> None:
    """Set entries of the configurations of the module and its submodules, each configuration once.

    Raises:
        ArtifactError: there is no such entry.
    """
    if not changes:
        return
    root = getattr(module, "config", None)
    if root is None:
        raise ArtifactError("structure: the module has no configuration.")
    change_config(root, changes)
    seen = {id(root), *map(id, nested_configs(root).values())}
    for submodule in module.modules():
        own = getattr(submodule, "config", None)
        if own is not None and id(own) not in seen and type(own) is type(root):
            seen.add(id(own))  # a copy that a part of the model keeps
            change_config(own, [change for change in changes if _holds(own, change)])


def change_config(config: Any, changes: Iterable[AttributeChange]) -> None:
    """Set entries of a configuration and of those nested in it.

    Raises:
        ArtifactError: there is no such entry, or it has another value than expected.
    """
    nested = nested_configs(config)
    for change in changes:
        owner = nested.get(change.owner)
        if owner is None or not _holds(config, change):
            where = f"{change.owner}.{change.name}".lstrip(".")
            raise ArtifactError(f"structure: the configuration has no {where} of {change.old!r}.")
        setattr(owner, change.name, copy.copy(change.new))


def _holds(config: Any, change: AttributeChange) -> bool:
    owner = nested_configs(config).get(change.owner)
    missing = object()
    found = getattr(owner, change.name, missing)
    return not change.name.startswith("_") and found is not missing and _plain(found) == change.old


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def nested_configs(config: Any, path: str = "") -> dict[str, Any]:
    """A configuration and those that are attributes of it, by path (``""`` for itself)."""
    found = {path: config}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found.update(nested_configs(value, f"{path}.{name}".lstrip(".")))
    return found


def module_at(module: nn.Module, path: str) -> nn.Module:
    """The submodule at ``path``.

    Raises:
        ArtifactError: there is none.
    """
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ArtifactError(f"structure: the module has no part {path!r}.") from error


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds the tensor ``name``, and its name there."""
    path, _, key = name.rpartition(".")
    return module_at(module, path), key
