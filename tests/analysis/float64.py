"""Run a captured program in float64 throughout, so that equality can be asked to 1e-9, not to 1e-6."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.capture.program import Program

_NARROW = (torch.float16, torch.bfloat16, torch.float32)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _NARROW:
        return value.double()
    return torch.float64 if value in _NARROW else value


def double_program(program: Program) -> Program:
    """A copy whose weights are float64 and whose graph never narrows to a smaller float."""
    graph = copy.deepcopy(program.graph_module.graph)
    module = fx.GraphModule(program.graph_module, graph)
    renamed: dict[str, str] = {}  # a copied graph renames placeholders called like a builtin
    for old, node in zip(program.graph.nodes, module.graph.nodes, strict=True):
        renamed[old.name] = node.name
        node.meta = dict(old.meta)
        node.args = _widen_arguments(node.args)
        node.kwargs = _widen_arguments(node.kwargs)
    for name, buffer in list(module.named_buffers()):
        setattr(module, name, _widen(buffer))
    module.recompile()
    weights = {name: _widen(tensor.detach()) for name, tensor in program.weights.items()}
    return replace(
        program,
        graph_module=module,
        weights=weights,
        weight_of={renamed[holder]: name for holder, name in program.weight_of.items()},
        inputs=tuple(renamed[name] for name in program.inputs),
    )


def _widen_arguments(arguments: Any) -> Any:
    return fx.node.map_aggregate(arguments, lambda value: torch.float64 if value in _NARROW else value)


def double_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Call keywords with floating tensors widened."""
    widened: dict[str, Any] = pytree.tree_map_only(Tensor, _widen, dict(inputs))
    return widened


@torch.no_grad()
def outputs(
    program: Program, inputs: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """Floating tensors a double program returns."""
    result = pytree.tree_leaves(program.run((), double_inputs(inputs), weights))
    with_values = [leaf for leaf in result if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert with_values
    assert all(leaf.dtype == torch.float64 for leaf in with_values), "the graph narrows somewhere"
    return with_values


def relative_difference(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """Largest ``max|a - b| / max|b|`` over pairs of tensors; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        finite = torch.isfinite(b)
        assert torch.equal(finite, torch.isfinite(a))
        if finite.any():
            difference = (a[finite] - b[finite]).abs().max() / b[finite].abs().max().clamp_min(1e-300)
            worst = max(worst, float(difference))
    return worst
