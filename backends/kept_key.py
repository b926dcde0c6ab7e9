"""What a kept step depends on: the process, the machine, the module and everything its forward is made of."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxcompress.backends
from fxcompress.backends.cpu import selection
from fxcompress.backends.cpu.measured import SELECTION_VARIABLE
from fxcompress.store import WeightStore

__all__ = ["ModuleWatch", "file_digest", "key_of", "process_state"]

_SIMPLE = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def process_state() -> tuple[Any, ...]:
    """Settings of the process that compiled code depends on; cheap, to be compared at every call."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
    )


def _module_state(module: nn.Module) -> list[tuple[Any, ...]]:
    """What Python sees of a module and its parts, tensors by what they look like.

    Attributes of other kinds than numbers, texts and the like count by their type; a configuration by its
    contents.
    """
    found: list[tuple[Any, ...]] = []
    for part in module.modules():
        own = vars(part)
        kind = type(part)
        found.append(
            (
                kind,
                kind.forward,
                tuple(
                    (key, value if isinstance(value, _SIMPLE) else type(value))
                    for key, value in own.items()
                    if key[0] != "_" or key.endswith("hooks")
                ),
                sum(len(own[name]) for name in _HOOKS),
                tuple((key, _look(value)) for key, value in own["_parameters"].items()),
                tuple((key, _look(value)) for key, value in own["_buffers"].items()),
            )
        )
    config: Any = getattr(module, "config", None)
    text = repr(config.to_dict()) if hasattr(config, "to_dict") else None
    found.append((type(config), text, getattr(config, "_attn_implementation", None)))
    return found


class ModuleWatch:
    """Tells whether a module is what it was, in the time that a token takes a tenth of.

    Strict: an attribute, parameter or part that another object stands for counts as changed, unless both are
    equal numbers or texts.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._entries: list[tuple[dict[str, Any], str, Any]] = []
        self._sizes: list[tuple[Any, int]] = []
        self._kinds: list[tuple[nn.Module, type[nn.Module]]] = []
        self._forwards: dict[type[nn.Module], Any] = {}
        for part in module.modules():
            own = vars(part)
            self._kinds.append((part, type(part)))
            self._forwards[type(part)] = type(part).forward
            self._add({key: value for key, value in own.items() if key[0] != "_"}, own)
            for name in ("_parameters", "_buffers", "_modules"):
                self._add(own[name], own[name])
            self._sizes += [(own[name], len(own[name])) for name in (*_HOOKS, "_parameters", "_buffers")]
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__"):
            self._add(vars(config), vars(config))

    def _add(self, values: Mapping[str, Any], place: dict[str, Any]) -> None:
        self._entries += [(place, key, value) for key, value in values.items()]

    def changed(self) -> str | None:
        """What has changed, or None."""
        for place, key, value in self._entries:
            now = place.get(key)
            if now is not value and not (
                isinstance(now, _SIMPLE) and type(now) is type(value) and now == value
            ):
                return key
        for place, size in self._sizes:
            if len(place) != size:
                return "hooks, parameters or buffers"
        for part, kind in self._kinds:
            if type(part) is not kind or "forward" in vars(part):
                return f"what a {kind.__name__} does"
        for kind, forward in self._forwards.items():
            if kind.forward is not forward:
                return f"{kind.__name__}.forward"
        return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _look(tensor: Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type, tensor.requires_grad


def key_of(
    kind: str, module: nn.Module, store: WeightStore, named: Mapping[str, Tensor], free: frozenset[str]
) -> str | None:
    """The name that a step is kept under; None where hooks or replaced functions may do anything.

    Args:
        kind: ``"prompt"``, ``"token"`` (a prompt of one) or ``"step"``.
        module: The model.
        store: Its packed weights; their form counts, not their values.
        named: The call's own tensors by role.
        free: Roles whose second dimension is the number of tokens.
    """
    parts = list(module.modules())
    kinds: set[Any] = {type(part) for part in parts}
    for part in parts:
        hooks = [hook for name in _HOOKS for hook in vars(part)[name].values()]
        foreign = any(not type(hook).__module__.startswith("fxcompress.") for hook in hooks)
        if foreign or "forward" in vars(part):
            return None  # functions that no file tells of
    content = [
        kind,
        *(torch.__version__, sys.version, _package_digest(), selection.this_machine().text),
        process_state(),
        sorted((name, os.environ.get(name)) for name in (SELECTION_VARIABLE, "CXX")),
        _inductor_settings(),
        _module_state(module),
        sorted(map(_code_digest, kinds)),
        _attention(module),
        sorted(_forms(store).items()),
        store.state.fused,
        [(name, (value.shape[0],) if name in free else _look(value)) for name, value in named.items()],
    ]
    return hashlib.sha256(repr(_stable(content)).encode()).hexdigest()[:32]


def _stable(value: Any) -> Any:
    """The same in every process: no addresses."""
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    if isinstance(value, type) or callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value


def _forms(store: WeightStore) -> dict[str, Any]:
    """Every form with its tensors' looks in place of the tensors."""
    return {name: _form_look(form) for name, form in store.state.forms.items()}


def _form_look(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _look(value)
    if dataclasses.is_dataclass(value):
        found = [(f.name, _form_look(getattr(value, f.name))) for f in dataclasses.fields(value)]
        return type(value).__name__, found
    if isinstance(value, list | tuple):
        return [_form_look(item) for item in value]
    return value


@functools.cache
def _package_digest() -> str:
    """Of this package's own source: what is kept was made by it."""
    folders = {Path(fxcompress.__file__).parent, Path(fxcompress.backends.__file__ or "").parent}
    paths = {path for folder in folders for kind in ("*.py", "*.j2") for path in folder.rglob(kind)}
    return _files_digest(tuple(sorted(paths)))


def _files_digest(paths: tuple[Path, ...]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()


def file_digest(path: str) -> str | None:
    """Of a file's contents; None where there is none."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


@functools.cache
def _inductor_settings() -> str:
    from torch._inductor import config

    settings = config.save_config_portable()
    return hashlib.sha256(json.dumps(settings, default=repr, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code_digest(kind: type) -> str:
    """Of the functions that a class's modules see, as they are now: somebody may have replaced one."""
    found = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__}".encode())
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        for name, value in sorted(vars(base).items(), key=lambda item: item[0]):
            _add_code(found, name, value)
        module = sys.modules.get(base.__module__)
        if module is not None and "forward" in vars(base) and not base.__module__.startswith("torch."):
            for name, value in sorted(vars(module).items(), key=lambda item: item[0]):
                _add_code(found, name, value)
    return found.hexdigest()


def _add_code(found: Any, name: str, value: Any) -> None:
    function = inspect.unwrap(value) if callable(value) else value
    code = getattr(function, "__code__", None)
    if isinstance(code, types.CodeType):
        found.update(f"{name}{_code_text(code)}".encode())
    elif isinstance(value, _SIMPLE) and not name.startswith("__"):
        found.update(f"{name}={value!r}".encode())


def _code_text(code: types.CodeType) -> str:
    inner = [_constant_text(item) for item in code.co_consts]
    return f"{code.co_code.hex()}{code.co_names}{code.co_varnames}{inner}"


def _constant_text(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code_text(value)
    if isinstance(value, frozenset):  # in another order in every process
        return repr(sorted(map(repr, value)))
    return repr(value)


def _attention(module: nn.Module) -> str:
    """The function that transformers would attend with: users may register their own."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name is None:
        return ""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = dict(ALL_ATTENTION_FUNCTIONS).get(name)
    code = getattr(function, "__code__", None)
    return f"{name}: {'' if code is None else _code_text(code)}"
