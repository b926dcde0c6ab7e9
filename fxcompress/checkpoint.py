"""Checkpoints: the edits of every finished (pass, block), stored under a hash of everything they depend on.

A step is two files, ``<key>.safetensors`` and ``<key>.json``. Each is written beside its place, flushed to
disk and renamed; the JSON comes last and carries the hash of the tensors, so that a step is either whole or
absent whatever moment the process was killed at.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import fxcompress
from fxcompress.calibration.inputs import CalibrationData, tensor_digest
from fxcompress.capture.program import Program
from fxcompress.edits import (
    Edit,
    FuseSites,
    KeepUnits,
    Refuse,
    RemoveBlock,
    Repack,
    ReviseWeight,
    SetActivation,
    SetCache,
    SetEdge,
    SetMask,
    SetSensitivity,
    SetTensor,
    SetTransform,
    SetWeight,
)
from fxcompress.errors import ArtifactError, RecipeError
from fxcompress.forms import Component, from_spec
from fxcompress.pass_base import Pass
from fxcompress.recipe import options_of

__all__ = ["CheckpointStore", "canonical", "run_key", "step_key"]

_FORMAT = 1
_EDITS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        *(SetTensor, SetWeight, ReviseWeight, SetMask, SetSensitivity, Repack),
        *(SetActivation, SetTransform, SetEdge, SetCache, FuseSites),
        *(KeepUnits, RemoveBlock, Refuse),
    )
}
_log = logging.getLogger(__name__)


def run_key(program: Program, data: CalibrationData | None, seed: int) -> str:
    """Hash of what every step depends on: graph, weights, data, seed and the versions that compute."""
    digest = hashlib.sha256()
    digest.update(f"{_FORMAT}|{fxcompress.__version__}|{torch.__version__}|{seed}|".encode())
    digest.update(str(program.graph).encode())
    for name in sorted(program.weights):
        digest.update(name.encode())
        digest.update(tensor_digest(program.weights[name]))
    digest.update((data.fingerprint() if data is not None else "no data").encode())
    return digest.hexdigest()


def step_key(previous: str, item: Pass, index: int) -> str:
    """Hash of one (pass, block): the step before it, the pass's options and the source of its class.

    ``index`` is -1 for what a structural pass decides about the whole model.
    """
    try:
        source = inspect.getsource(type(item))
    except (OSError, TypeError):  # defined interactively
        source = ""
    body = json.dumps([previous, item.name, options_of(item), source, index], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


class CheckpointStore:
    """A folder of finished steps.

    Args:
        folder: Created when missing.

    Raises:
        ArtifactError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"checkpoint {self.folder}: cannot be created: {error.strerror}.") from error

    def load(self, key: str) -> list[Edit] | None:
        """The edits of a step, or None when it was not finished; a damaged step is ignored with a warning."""
        described = self.folder / f"{key}.json"
        if not described.is_file():
            return None
        try:
            content = json.loads(described.read_text(encoding="utf-8"))
            path = self.folder / f"{key}.safetensors"
            if _file_hash(path) != content["sha256"]:
                raise ArtifactError(f"{path.name}: its content is not what was written.")
            with safe_open(path, framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return [_decode_edit(item, tensors) for item in content["edits"]]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, ArtifactError) as error:
            _log.warning("checkpoint %s is damaged (%s); this step is computed again", described, error)
            return None

    def work_folder(self, key: str) -> Path:
        """Where a step that takes long may keep checkpoints of its own."""
        return self.folder / f"work-{key[:16]}"

    def save(self, key: str, edits: Sequence[Edit]) -> None:
        """Store a finished step; atomic."""
        tensors: dict[str, Tensor] = {}
        described = [_encode_edit(edit, f"{index}", tensors) for index, edit in enumerate(edits)]
        path = self.folder / f"{key}.safetensors"
        aside = self.folder / f".{key}.{os.getpid()}.tensors"
        save_file(
            {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, aside
        )
        digest = _file_hash(aside)
        _publish(aside, path)
        aside = self.folder / f".{key}.{os.getpid()}.json"
        aside.write_text(json.dumps({"sha256": digest, "edits": described}, indent=1), encoding="utf-8")
        _publish(aside, path.with_suffix(".json"))


def canonical(edit: Any, pass_name: str) -> Edit:
    """The edit with detached, contiguous tensors: exactly what a checkpoint gives back.

    Raises:
        RecipeError: not an edit.
    """
    if type(edit) not in _EDITS.values():
        raise RecipeError(
            f"pass {pass_name!r} yielded a {type(edit).__name__}.", fix=f"yield one of {', '.join(_EDITS)}."
        )
    copied: Edit = _contiguous(edit)
    return copied


def _contiguous(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, tuple):
        return tuple(_contiguous(item) for item in value)
    if isinstance(value, Component) or type(value) in _EDITS.values():
        changes = {field.name: _contiguous(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changes)
    return value


def _encode_edit(edit: Edit, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    fields = {
        f.name: _encode(getattr(edit, f.name), f"{prefix}.{f.name}", tensors)
        for f in dataclasses.fields(edit)
    }
    return {"edit": type(edit).__name__, **fields}


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Component):
        return {"component": value.to_spec(key, tensors)}
    if isinstance(value, tuple):
        return [_encode(item, f"{key}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _decode_edit(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    cls = _EDITS[content["edit"]]
    edit: Edit = cls(**{name: _decode(value, tensors) for name, value in content.items() if name != "edit"})
    return edit


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, tensors) for item in value)
    if isinstance(value, dict):
        return tensors[value["tensor"]] if "tensor" in value else from_spec(value["component"], tensors)
    return value


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(aside: Path, path: Path) -> None:
    """Flush a finished file and give it its name in one step."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)
    if os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
