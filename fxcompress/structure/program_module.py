"""A module that runs a program's graph: for models whose Python does not work with other sizes.

It is called like the model and returns what it returns. Its parameters have the program's names, so that it
is compressed, compiled and saved like any module. The graph is one forward without a cache: it does not
generate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress.artifact.storage import dtype_name
from fxcompress.capture.program import Program
from fxcompress.errors import ArtifactError, FxCompressError
from fxcompress.structure.record import CallInput

__all__ = ["ProgramModule", "describe_call", "example_call", "hold_tensor"]


@dataclass(frozen=True, eq=False)
class _Shared:
    """What copies of a module have in common: the graph and the form of its call; all read only."""

    graph: fx.GraphModule
    in_spec: pytree.TreeSpec | None
    out_spec: pytree.TreeSpec | None
    keys: tuple[str, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class ProgramModule(nn.Module):
    """A program as a module.

    Args:
        program: Its weights become parameters and buffers; those of the user's module are shared.
        persistent: Names of buffers to save; the others are known when the graph is captured again.
    """

    def __init__(self, program: Program, persistent: Sequence[str]) -> None:
        super().__init__()
        self._names: list[tuple[str, str]] = []
        held: dict[str, str] = {}
        for number, (name, tensor) in enumerate(program.weights.items()):
            is_constant = name.startswith("constant:")
            held[name] = f"constants.c{number}" if is_constant else name
            parameter = name in program.parameters
            hold_tensor(self, held[name], tensor, parameter=parameter, persistent=name in persistent)
        order = {name: index for index, name in enumerate(program.inputs)}
        for node in program.placeholders():
            name = program.weight_of.get(node.name, "")
            self._names.append(("weight", held[name]) if name else ("input", str(order[node.name])))
        keys = () if program.in_spec is None else tuple(program.in_spec.child(1).context or ())
        self._shared = _Shared(program.graph_module, program.in_spec, program.out_spec, keys)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The graph on the inputs of the captured call; the same arguments must be given."""
        shared = self._shared
        if shared.in_spec is None:
            flat = [*args, *kwargs.values()]
        else:
            if set(kwargs) != set(shared.keys):
                raise FxCompressError(
                    f"this model runs as a graph that takes {list(shared.keys)}, found {sorted(kwargs)}.",
                    fix="call it as it was captured.",
                )
            flat = pytree.tree_leaves((args, {key: kwargs[key] for key in shared.keys}))
        call = [flat[int(where)] if kind == "input" else self._at(where) for kind, where in self._names]
        out = list(shared.graph(*call))
        return out if shared.out_spec is None else pytree.tree_unflatten(out, shared.out_spec)

    def _at(self, name: str) -> Any:
        found: Any = self
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the graph has no cache.

        Raises:
            FxCompressError: always.
        """
        raise FxCompressError(
            "this model runs as a graph, because its code does not work with the sizes that were cut;"
            " it cannot generate.",
            fix="cut less of it (see report.structure['module']), or equally in all layers.",
        )


def hold_tensor(
    root: nn.Module,
    name: str,
    tensor: Tensor,
    *,
    parameter: bool = False,
    persistent: bool = True,
    requires_grad: bool = False,
) -> None:
    """Register a tensor under a dotted name; modules on the way are made."""
    *path, key = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if parameter:
        owner.register_parameter(key, nn.Parameter(tensor.detach(), requires_grad=requires_grad))
    else:
        owner.register_buffer(key, tensor.detach(), persistent=persistent)


def describe_call(program: Program, flat: Sequence[Any]) -> tuple[CallInput, ...]:
    """The call that a program was captured with, as data."""
    if program.in_spec is None:
        names: list[str] = [""] * len(flat)
    else:
        paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(flat), program.in_spec))
        names = []
        for path, _ in paths:
            if len(path) != 2:
                raise FxCompressError(
                    f"the call nests its inputs ({pytree.keystr(path)}); a graph called so cannot be saved."
                )
            key = path[1]
            names.append(str(key.key) if isinstance(key, pytree.MappingKey) else "")
    found = []
    for name, value in zip(names, flat, strict=True):
        if isinstance(value, Tensor):
            found.append(CallInput(name, dtype_name(value.dtype, name), tuple(value.shape)))
        elif value is None or isinstance(value, bool | int | float | str):
            found.append(CallInput(name, "", (), value))
        else:
            raise FxCompressError(f"{name}: a {type(value).__name__} in the call of a graph cannot be saved.")
    return tuple(found)


def example_call(
    call: Sequence[CallInput], dtypes: Mapping[str, torch.dtype]
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments like those of a described call: zeros of the same types.

    Raises:
        ArtifactError: an unknown dtype.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for item in call:
        value: Any = item.value
        if item.dtype:
            if item.dtype not in dtypes:
                raise ArtifactError(f"structure: the call has an input of dtype {item.dtype!r}.")
            value = torch.zeros(item.shape, dtype=dtypes[item.dtype])
        if item.name:
            kwargs[item.name] = value
        else:
            args.append(value)
    return args, kwargs
