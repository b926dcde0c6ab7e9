"""Give the weights of a captured program the forms that an artifact holds for them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxcompress.artifact.content import Artifact
from fxcompress.artifact.storage import tensor_sha256
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState
from fxcompress.errors import BindingError

__all__ = ["check_value", "known_name", "rename_weights", "state_of_artifact"]


def known_name(artifact: Artifact, name: str) -> str:
    """The artifact's name of a parameter whose path may start above or below the compressed module.

    Raises:
        BindingError: the artifact has no such parameter.
    """
    known, aliases = artifact.parameters, artifact.aliases
    parts = name.split(".")
    for start in range(len(parts)):
        tail = ".".join(parts[start:])
        if tail in known or tail in aliases:
            return aliases.get(tail, tail)
    ends = [other for other in known if other.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    raise BindingError(
        f"{name}: the artifact of {artifact.identity.class_name} has no such parameter.",
        fix="compile the model the artifact was made from.",
    )


def check_value(artifact: Artifact, name: str, tensor: Tensor) -> None:
    """Refuse a weight that is not the one the artifact was made from.

    Raises:
        BindingError: its shape or its values differ.
    """
    info = artifact.parameters[name]
    if tuple(tensor.shape) != info.shape or tensor_sha256(tensor.detach()) != info.sha256:
        raise BindingError(
            f"{name}: its values are not those the artifact was made from.",
            fix="load the original weights, or compress this model again.",
        )


def state_of_artifact(artifact: Artifact, weights: Mapping[str, Tensor]) -> CompressionState:
    """The artifact's edits as a state over ``weights``; forms stay lazy."""
    state = CompressionState(weights)
    state.forms = artifact.forms  # type: ignore[assignment]
    state.fused = list(artifact.fused)
    state.tensors = {
        name: artifact.tensors[name] for name in artifact.parameters if artifact.parameters[name].edited
    }
    return state


def rename_weights(program: Program, names: Mapping[str, str]) -> None:
    """Rename canonical weight names in place."""
    weights = dict(program.weights)
    program.weights = {names.get(name, name): tensor for name, tensor in weights.items()}
    program.weight_of = {node: names.get(name, name) for node, name in program.weight_of.items()}
    program.parameters = frozenset(names.get(name, name) for name in program.parameters)
