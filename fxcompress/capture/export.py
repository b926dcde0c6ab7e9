"""Frontend 1: ``torch.export`` of a whole model, batch and sequence left dynamic."""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from fxcompress.capture.normalize import normalize
from fxcompress.capture.program import Program
from fxcompress.errors import CaptureError

_NOT_USER_CODE = ("torch", "fxcompress", "networkx")


def capture_model(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Program:
    """Capture ``model(*args, **kwargs)`` as a :class:`Program` with dynamic input shapes.

    Every dimension of every tensor input is left to the compiler to decide (``Dim.AUTO``); dimensions that
    the model itself fixes are specialised. Example inputs whose first dimension is 1 are doubled first,
    because a size of 1 would be taken for a constant.

    Args:
        model: The module; used in evaluation mode, not modified.
        args: Example positional arguments.
        kwargs: Example keyword arguments.

    Returns:
        The program, weights bound by qualified name and shared with ``model``.

    Raises:
        CaptureError: the model cannot be captured; names the innermost line of the user's code.

    Example:
        >>> program = capture_model(model, kwargs={"input_ids": ids})
        >>> program.run(kwargs={"input_ids": other_ids})
    """
    kwargs = dict(kwargs or {})
    training = model.training
    model.eval()
    try:
        exported, spec = _export(model, args, kwargs)
    finally:
        model.train(training)
    return _program_from_exported(exported, model, spec, _argument_names(model, args, kwargs))


def _program_from_exported(
    exported: ExportedProgram, model: nn.Module, call_spec: pytree.TreeSpec, argument_names: list[str]
) -> Program:
    """Turn the export of a :class:`_FlatCall` into the common dialect; weights stay shared with ``model``."""
    weight_of: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    inputs: list[str] = []
    canonical, aliases = tied_names(model)
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    parameters = frozenset(name for name, _ in model.named_parameters())
    for spec in exported.graph_signature.input_specs:
        placeholder = getattr(spec.arg, "name", None)
        if placeholder is None:
            continue
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            target = spec.target.removeprefix("model.")
            name = canonical.get(target, target)
            weight_of[placeholder] = name
            weights[name] = tensors[target]
        elif spec.kind == InputKind.CONSTANT_TENSOR and spec.target is not None:
            weight_of[placeholder] = f"constant:{spec.target}"
            constant = exported.constants[spec.target]
            if not isinstance(constant, Tensor):
                raise CaptureError(
                    f"lifted constant {spec.target!r} is not a tensor but {type(constant).__name__}."
                )
            weights[weight_of[placeholder]] = constant
        else:
            inputs.append(placeholder)
    module = normalize(exported.graph_module, weight_of, weights)
    inputs = _name_inputs(module, inputs, argument_names)
    n_mutations = sum(1 for spec in exported.graph_signature.output_specs if "MUTATION" in spec.kind.name)
    if n_mutations:
        drop_leading_outputs(module, n_mutations)
    return Program(
        graph_module=module,
        weight_of=weight_of,
        weights=weights,
        parameters=parameters,
        aliases=aliases,
        inputs=tuple(inputs),
        in_spec=call_spec,
        out_spec=exported.call_spec.out_spec,
    )


def tied_names(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Map every parameter/buffer name to the first name of the same tensor, and the further names to it."""
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    aliases: dict[str, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        canonical[name] = first.setdefault(id(tensor), name)
        if canonical[name] != name:
            aliases[name] = canonical[name]
    return canonical, aliases


def drop_leading_outputs(module: fx.GraphModule, count: int) -> None:
    """Remove the first ``count`` outputs (buffer mutations that a pure forward does not return)."""
    node = module.graph.output_node()
    node.args = (tuple(node.args[0])[count:],)  # type: ignore[arg-type]
    module.recompile()


class _FlatCall(nn.Module):
    """Calls a model with one list of flat inputs, so that every input can be given dynamic dimensions."""

    def __init__(self, model: nn.Module, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.model = model
        self._spec = spec

    def forward(self, flat: list[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        return self.model(*args, **kwargs)


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ExportedProgram, pytree.TreeSpec]:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    attempts = [[_double_first(leaf) for leaf in leaves], leaves] if _batch_of_one(leaves) else [leaves]
    failure: Exception | None = None
    for flat in attempts:
        dynamic = [_dynamic_dims(leaf) for leaf in flat]
        try:
            with torch.no_grad(), warnings.catch_warnings():
                # Recurrent modules keep state between calls as plain attributes; torch puts them back.
                warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
                exported = torch.export.export(
                    _FlatCall(model, spec), (flat,), dynamic_shapes=(dynamic,), strict=False
                )
                return exported, spec
        except Exception as error:
            failure = error
    assert failure is not None
    raise CaptureError(
        f"{type(model).__name__} cannot be captured: {_first_line(failure)} At {user_line(failure)}.",
        fix="make that line traceable by torch.export, or compress the part of the model that can be"
        " captured.",
    ) from failure


def _argument_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A readable name for every flat input: the argument's own name, with the path inside nested values."""
    parameters = [p.name for p in inspect.signature(model.forward).parameters.values()]
    names = []
    for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]:
        keys: list[Any] = [getattr(key, "idx", getattr(key, "key", None)) for key in path]
        positional, step, *rest = keys
        first = parameters[step] if positional == 0 and step < len(parameters) else f"arg_{step}"
        steps = [first if positional == 0 else str(step), *map(str, rest)]
        names.append(re.sub(r"\W", "_", "_".join(steps)))
    return names


def _name_inputs(module: fx.GraphModule, inputs: list[str], names: list[str]) -> list[str]:
    """Rename the input placeholders to the call's argument names, made unique."""
    namespace = module.graph._graph_namespace  # knows the names that fx reserves, such as builtins
    by_name = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    renamed = []
    for old, new in zip(inputs, names, strict=True):
        if new != old:
            free = namespace.create_name(new, None)
            by_name[old].target = by_name[old].name = free
        renamed.append(by_name[old].name)
    module.recompile()
    return renamed


def _dynamic_dims(value: Any) -> Any:
    return dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, Tensor) else None


def _batch_of_one(leaves: list[Any]) -> bool:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return bool(tensors) and all(t.dim() > 0 and t.shape[0] == 1 for t in tensors)


def _double_first(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def user_line(error: BaseException) -> str:
    """``file:line: source`` of the innermost traceback frame that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        parts = Path(frame.filename).parts
        package = parts[parts.index("site-packages") + 1] if "site-packages" in parts else ""
        if package in _NOT_USER_CODE or any(part in ("fxcompress", "contextlib.py") for part in parts[-3:]):
            continue
        if frame.filename.startswith("<") or Path(frame.filename).name in ("contextlib.py", "_ops.py"):
            continue
        return f"{frame.filename}:{frame.lineno}: {(frame.line or '').strip()}"
    return "an unknown line"
