"""Compress a program that was exported already: from ``torch.export`` to ``torch.export``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from fxcompress.apply import AppliedGraph, apply_state
from fxcompress.artifact.binding import check_value, known_name, rename_weights, state_of_artifact
from fxcompress.cache_graph import GraphCache, caches_of_program, pack_caches
from fxcompress.capture.exported import program_from_exported
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState
from fxcompress.errors import BackendError, BindingError, CaptureError, RecipeError
from fxcompress.form_inputs import form_tensor
from fxcompress.manager import run_recipe
from fxcompress.model import CompressedModel
from fxcompress.pass_base import StructuralPass
from fxcompress.recipe import Recipe
from fxcompress.structure.program_module import hold_tensor

__all__ = ["compress_exported"]


def compress_exported(exported: ExportedProgram, forms: Any) -> ExportedProgram:
    """Compress an exported program: its weights, and keys and values that it keeps in buffers.

    The result is called like the original. Compressed weights are buffers with codes; buffers of keys and
    values become one buffer of packed records per attention. The operators ``fxcompress::*`` in its graph are
    known to a process that has imported fxcompress; it can be saved, loaded, compiled and exported again.

    Args:
        exported: From ``torch.export.export``, with its example inputs. A decoder with a static cache
            (transformers' ``TorchExportableModuleForDecoderOnlyLM``, or buffers of your own that are written
            at the positions of the new tokens) keeps its signature: positions are what they were, and a call
            that starts at an earlier position forgets what lies behind it. Its caches are empty.
        forms: A recipe that needs no data (anything :meth:`fxcompress.Recipe.load` reads), or a
            :class:`fxcompress.CompressedModel` made from the same weights, whose forms are used.

    Raises:
        RecipeError: the recipe needs data or cuts the model, both of which need the model itself.
        BindingError: the program's weights are not those of the compressed model.
        BackendError: a cache that has a form is in no buffers that can be replaced; names the attention.
        CaptureError: the program cannot be read, or has no example inputs.

    Example:
        >>> module = TorchExportableModuleForDecoderOnlyLM(model, 1, 2048)  # doctest: +SKIP
        >>> packed = fxcompress.compress_exported(module.export(input_ids=ids), "kv4-kivi")  # doctest: +SKIP
        >>> torch.export.save(packed, "decoder.pt2")  # doctest: +SKIP
    """
    if not isinstance(exported, ExportedProgram):
        raise CaptureError(
            f"expected an exported program, found a {type(exported).__name__}.",
            fix="torch.export.export(module, args) first, or fxcompress.compress(module, recipe).",
        )
    if exported.example_inputs is None:
        raise CaptureError(
            "the exported program holds no example inputs, with which the result is exported.",
            fix="set exported.example_inputs = (args, kwargs).",
        )
    with torch.no_grad():
        program = program_from_exported(exported)
        names = {name: name for name in program.weights}
        if isinstance(forms, CompressedModel):
            state, names = _bind(program, forms)
        else:
            state = _solve(program, Recipe.load(forms))
        caches = caches_of_program(program, state.forms)
        applied = apply_state(program, state)
        module = _module(applied, state, caches, names, exported)
        return _export(module, exported)


def _solve(program: Program, recipe: Recipe) -> CompressionState:
    for item in recipe:
        if isinstance(item, StructuralPass):
            raise RecipeError(
                f"pass {item.name!r} cuts the model; an exported program keeps its sizes.",
                fix="compress the model with it, save_pretrained(), and export what that loads.",
            )
    needy = [item.name for item in recipe if item.needs_calibration]
    fix = "small = fxcompress.compress(model, recipe, calibration); compress_exported(exported, small)."
    if needy:
        raise RecipeError(
            f"pass {needy[0]!r} needs calibration data, which an exported program does not come with.",
            fix=fix,
        )
    return run_recipe(program, recipe, verify="off").state


def _bind(program: Program, small: CompressedModel) -> tuple[CompressionState, dict[str, str]]:
    """The forms of a compressed model over the program's weights, which get its names."""
    artifact = small.artifact
    if artifact.structure is not None:
        raise BindingError(
            "the model was cut by its recipe; its forms fit no program of the original.",
            fix="leave structural passes out, or export small.model and use a recipe here.",
        )
    known = {name: known_name(artifact, name) for name in program.parameters}
    for name, own in known.items():
        check_value(artifact, own, program.weights[name])
    rename_weights(program, known)
    names = {known.get(name, name): name for name in known}
    return state_of_artifact(artifact, program.weights), names


def _module(
    applied: AppliedGraph,
    state: CompressionState,
    caches: list[GraphCache],
    names: Mapping[str, str],
    exported: ExportedProgram,
) -> fx.GraphModule:
    """The rewritten graph as a module that owns its tensors and is called like the exported program.

    Args:
        applied: The graph, whose weights are inputs.
        state: Values of edited weights and of forms.
        caches: To be packed.
        names: The program's name of a weight → what the user calls it.
        exported: The original.
    """
    root, graph, program = applied.module, applied.module.graph, applied.program
    passing: set[str] = set()

    def hold(name: str, tensor: Tensor, *, parameter: bool = False, persistent: bool = False) -> fx.Node:
        name = name.replace(":", ".")
        # Some products round otherwise where a weight requires gradients, so that is kept.
        grad = parameter and tensor.requires_grad
        hold_tensor(root, name, tensor, parameter=parameter, persistent=persistent, requires_grad=grad)
        if not parameter and not persistent:
            passing.add(name)
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.get_attr(name)
        node.meta["val"] = tensor.to("meta")
        return node

    pack_caches(applied, caches, hold)
    saved = _persistent(exported)
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        name, ref = program.weight_of.get(node.name), applied.form_inputs.get(node.name)
        if ref is not None:
            path = names.get(ref.name, ref.name)
            new = hold(f"{path}_form_{ref.path.replace('.', '_')}", form_tensor(state, ref), persistent=True)
        elif name is not None:
            parameter = name in program.parameters
            value = state.weight(name) if parameter else program.weights[name]
            own = names.get(name, name)
            new = hold(own, value, parameter=parameter, persistent=own in saved)
        else:
            continue
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.set_codegen(exported.module().graph._codegen)
    graph.lint()
    module = fx.GraphModule(root, graph)
    for name in passing & {str(node.target) for node in graph.nodes if node.op == "get_attr"}:
        owner, _, key = name.rpartition(".")
        module.get_submodule(owner)._non_persistent_buffers_set.add(key)
    return module


def _persistent(exported: ExportedProgram) -> set[str]:
    return {
        spec.target
        for spec in exported.graph_signature.input_specs
        if spec.kind is InputKind.BUFFER and spec.persistent and spec.target is not None
    }


def _export(module: nn.Module, exported: ExportedProgram) -> ExportedProgram:
    """Export the rewritten graph with the shapes that were dynamic before.

    Raises:
        BackendError: a shape that was dynamic is not any more.
    """
    args, kwargs = exported.example_inputs
    result = torch.export.export(
        module, args, kwargs, dynamic_shapes=_dynamic_shapes(module, exported), strict=False
    )
    before, after = _inputs(exported), _inputs(result)
    if before != after:
        changed = [
            f"{name} {one} -> {after.get(name)}" for name, one in before.items() if after.get(name) != one
        ]
        raise BackendError(
            f"the rewritten program takes other inputs than the original: {', '.join(changed)}."
        )
    return result


def _user_inputs(exported: ExportedProgram) -> list[fx.Node]:
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    specs = exported.graph_signature.input_specs
    return [nodes[spec.arg.name] for spec in specs if spec.kind is InputKind.USER_INPUT]


def _inputs(exported: ExportedProgram) -> dict[str, tuple[Any, ...]]:
    """By name, the sizes of every input; ``"*"`` stands for a dynamic one."""
    found = {}
    for node in _user_inputs(exported):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        found[node.name] = tuple("*" if isinstance(size, torch.SymInt) else size for size in sizes)
    return found


def _dynamic_shapes(module: nn.Module, exported: ExportedProgram) -> dict[str, Any]:
    """What was dynamic, by the names of the arguments."""
    leaves: list[Any] = []
    for node in _user_inputs(exported):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            sizes: list[Any] = list(value.shape)
            dynamic = [dim for dim, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
            leaves.append({dim: _hint(sizes[dim], exported) for dim in dynamic})
        else:
            leaves.append(Dim.AUTO if isinstance(value, torch.SymInt) else None)
    spec = exported.call_spec.in_spec
    assert spec is not None
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _hint(size: torch.SymInt, exported: ExportedProgram) -> Any:
    """A dynamic size with the limits it had."""
    limits = exported.range_constraints.get(size.node.expr)
    lower = 0 if limits is None else int(limits.lower)
    bounded = limits is not None and limits.upper.is_number and limits.upper < torch.iinfo(torch.int64).max
    return Dim.AUTO(min=lower, max=int(limits.upper)) if bounded and limits else Dim.AUTO(min=lower)
