"""Frontend 4: a program that the user exported, whose buffers may be written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from fxcompress.capture.normalize import normalize
from fxcompress.capture.program import Program
from fxcompress.errors import CaptureError

__all__ = ["program_from_exported"]

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER)


def program_from_exported(exported: ExportedProgram) -> Program:
    """A :class:`Program` with a graph of its own; weights are shared with ``exported``.

    New values that a functional graph returns for buffers are written into them by ``copy_`` at its end, as
    graphs that write in place do themselves.

    Raises:
        CaptureError: the program takes objects that are no tensors, or writes into its inputs.

    Example:
        >>> program = program_from_exported(torch.export.export(model, (ids,)))  # doctest: +SKIP
    """
    signature = exported.graph_signature
    weight_of: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    inputs: list[str] = []
    parameters: set[str] = set()
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for spec in signature.input_specs:
        placeholder = getattr(spec.arg, "name", None)
        if spec.kind is InputKind.USER_INPUT and placeholder is not None:
            inputs.append(placeholder)
            continue
        held = None if spec.target is None else _tensor(exported, spec.target)
        if placeholder is None or held is None or spec.target is None:
            raise CaptureError(
                f"the exported program has an input of kind {spec.kind.name}, which is not supported."
            )
        name = spec.target if spec.kind in _WEIGHTS else f"constant:{spec.target}"
        known = first.setdefault(_place(held), name)
        if known != name:
            aliases[name] = known
        weight_of[placeholder], weights[known] = known, held
        if spec.kind is InputKind.PARAMETER:
            parameters.add(known)
    module = _copied(exported.graph_module)
    _write_back(module.graph, exported, weight_of)
    call = exported.call_spec
    return Program(
        graph_module=normalize(module, weight_of, weights),
        weight_of=weight_of,
        weights=weights,
        parameters=frozenset(parameters),
        aliases=aliases,
        inputs=tuple(inputs),
        in_spec=call.in_spec,
        out_spec=call.out_spec,
    )


def _tensor(exported: ExportedProgram, target: str) -> Tensor | None:
    value: Any = exported.state_dict.get(target, exported.constants.get(target))
    return value if isinstance(value, Tensor) else None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for names of one tensor, which an exported program may hold as several views of its memory."""
    if not tensor.numel() or tensor.device.type == "meta":
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _copied(original: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(original.graph, nodes))
    for old, new in nodes.items():
        new.meta = dict(old.meta)
    return fx.GraphModule(original, graph)


def _write_back(graph: fx.Graph, exported: ExportedProgram, weight_of: dict[str, str]) -> None:
    """Replace outputs that are new values of buffers by writes into these."""
    output = graph.output_node()
    values = output.args[0]
    flat = list(values) if isinstance(values, list | tuple) else [values]
    buffers = {name: placeholder for placeholder, name in weight_of.items()}
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    kept: list[Any] = []
    for spec, value in zip(exported.graph_signature.output_specs, flat, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            kept.append(value)
        elif spec.kind is OutputKind.BUFFER_MUTATION and spec.target in buffers:
            with graph.inserting_before(output):
                written = graph.call_function(
                    torch.ops.aten.copy_.default, (placeholders[buffers[spec.target]], value)
                )
            written.meta = dict(value.meta) if isinstance(value, fx.Node) else {}
        else:
            raise CaptureError(
                f"the exported program has an output of kind {spec.kind.name}, which is not supported."
            )
    output.args = (tuple(kept),)
