"""Load the module of a cut model: the original's class or module, made to follow the stored structure."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fxcompress.analysis.channel_groups import find_channel_groups
from fxcompress.artifact.content import Artifact, stored_tensors
from fxcompress.artifact.storage import STORED_DTYPES
from fxcompress.calibration.plan import Plan
from fxcompress.capture import Program, capture_model
from fxcompress.errors import ArtifactError, FxCompressError
from fxcompress.hf import empty_model
from fxcompress.structure.cut_program import cut_program
from fxcompress.structure.module import apply_structure
from fxcompress.structure.program_module import ProgramModule, example_call
from fxcompress.structure.record import Change, Structure, follow
from fxcompress.structure.removal import find_removal, remove_blocks

__all__ = ["module_for"]


def module_for(artifact: Artifact, model: nn.Module | None) -> nn.Module:
    """The module that an artifact's weights belong to, without their values.

    Args:
        artifact: What was read.
        model: A module built like the original; None builds it from the stored configuration.

    Raises:
        ArtifactError: the structure does not fit the model, or the model cannot be built.
        BindingError: the model is built otherwise than the original was.
    """
    structure = artifact.structure
    if model is not None:
        artifact.check_original(model)
    if structure is None or (structure.from_config and model is None):
        module = empty_model(artifact) if model is None else model
    elif structure.from_config:
        module = empty_model(artifact)
    else:
        original = empty_model(artifact) if model is None else model
        artifact.check_original(original)
        module = _follow(original, structure, artifact)
    artifact.check_module(module)
    artifact_buffers_fit = model is not None and structure is None
    if not artifact_buffers_fit:
        artifact.restore_buffers(module)
    return module


def _follow(original: nn.Module, structure: Structure, artifact: Artifact) -> nn.Module:
    if structure.graph:
        persistent = {name for name, _, role in stored_tensors(original) if role == "buffer"}
        kept = [new for name in persistent if (new := follow(name, structure.changes)) is not None]
        return ProgramModule(_replayed(original, structure), kept)

    def value(name: str, tensor: Tensor) -> Tensor:
        known = artifact.aliases.get(name, name)
        if known not in artifact.parameters:
            raise ArtifactError(f"structure: {name} is not among the weights.")
        info = artifact.parameters[known]
        if info.role == "buffer" and known in artifact.tensors:
            return artifact.tensors[known]
        empty = torch.full((), math.nan if info.dtype.is_floating_point else 0, dtype=info.dtype)
        return empty.to(tensor.device).expand(info.shape)

    return apply_structure(original, structure, value)


def _replayed(original: nn.Module, structure: Structure) -> Program:
    """The original's program with all changes made again."""
    args, kwargs = example_call(structure.call, STORED_DTYPES)
    try:
        with torch.no_grad():
            program = capture_model(original, tuple(args), kwargs)
            for change in structure.changes:
                program = _changed(program, change)
    except FxCompressError as error:
        raise ArtifactError(f"structure: the cuts cannot be repeated on this model: {error}") from error
    return program


def _changed(program: Program, change: Change) -> Program:
    if change.removed:
        blocks = Plan(program).blocks
        found = [find_removal(program, blocks, block.index) for block in blocks]
        wanted = [f for f in found if not isinstance(f, str) and set(f.entries) <= set(change.removed)]
        if {entry for removal in wanted for entry in removal.entries} != set(change.removed):
            raise ArtifactError("structure: removed entries are no blocks of this model.")
        program = remove_blocks(program, wanted)
    if change.kept:
        groups = find_channel_groups(program)
        sizes = {group.name: group.units for group in groups}
        for name, units in change.kept.items():
            if max(units) >= sizes.get(name, 0):
                raise ArtifactError(
                    f"structure: the model has no channel group {name} with {max(units)} units."
                )
        kept = {name: torch.tensor(units) for name, units in change.kept.items()}
        program = cut_program(program, groups, kept)
    return program
