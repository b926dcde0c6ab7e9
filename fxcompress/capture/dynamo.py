"""Frontend 2: a graph that Dynamo hands to a backend while the model's own Python keeps running."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxcompress.capture.normalize import normalize
from fxcompress.capture.program import Program
from fxcompress.compat import fake_mode_of, placeholder_source, trace_pre_dispatch
from fxcompress.errors import CaptureError

_STEP = re.compile(r"\['([^']+)'\]|\[\"([^\"]+)\"\]|\[(\d+)\]|\.([A-Za-z_]\w*)")
_CONTAINERS = ("_modules", "_parameters", "_buffers", "_orig_mod", "__dict__")


def program_from_dynamo(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """Turn Dynamo's torch-level graph into the common dialect.

    Names come from Dynamo's source paths, relative to the root object the path starts at (``L['self']``, a
    local or global variable); module wrappers (``_orig_mod``) are dropped.

    Args:
        module: The graph given to the backend.
        example_inputs: Its inputs: real parameters and buffers, fake or real tensors, symbolic integers.

    Raises:
        CaptureError: a placeholder carries no example value.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    fakes = [_fake_value(node) for node in placeholders]
    mode = fake_mode_of(fakes)
    graph = trace_pre_dispatch(module, fakes, mode)
    weight_of: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    parameters: set[str] = set()
    aliases: dict[str, str] = {}
    inputs: list[str] = []
    seen: dict[int, str] = {}
    traced = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for old, new, example, fake in zip(placeholders, traced, example_inputs, fakes, strict=True):
        new.meta.setdefault("val", fake)
        source = placeholder_source(old)
        new.meta["source"] = source
        if not is_module_state(source, example):
            inputs.append(new.name)
            continue
        assert source is not None
        name = qualified_name(source)
        canonical = seen.setdefault(id(example), name)
        if canonical != name:
            aliases[name] = canonical
        weight_of[new.name] = canonical
        weights[canonical] = example
        if "_parameters" in source or _is_parameter(example):
            parameters.add(canonical)
    graph = normalize(graph, weight_of)
    return Program(graph, weight_of, weights, frozenset(parameters), aliases, tuple(inputs))


def qualified_name(source: str) -> str:
    """``L['self']._modules['model']._modules['0']._parameters['weight']`` → ``model.0.weight``."""
    root = re.match(r"[A-Z]\w*\[('[^']*'|\"[^\"]*\")\]", source)
    steps = _STEP.findall(source[root.end() :] if root else source)
    parts = [next(piece for piece in step if piece) for step in steps]
    return ".".join(part for part in parts if part not in _CONTAINERS)


def is_module_state(source: str | None, example: Any) -> bool:
    """Whether a placeholder is a parameter or buffer of a module (rather than a user input)."""
    if source is None or not isinstance(example, Tensor):
        return False
    return "_parameters[" in source or "_buffers[" in source or _is_parameter(example)


def _is_parameter(example: Any) -> bool:
    return isinstance(example, nn.Parameter)


def _fake_value(node: fx.Node) -> Any:
    if "example_value" not in node.meta:
        raise CaptureError(f"placeholder {node.name!r} of the Dynamo graph has no example value.")
    return node.meta["example_value"]
