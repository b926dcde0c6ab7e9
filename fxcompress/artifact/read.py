"""Read an artifact without trusting it: schema, paths, sizes and hashes are checked before any use."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from fxcompress.artifact.checks import build_form, check_form
from fxcompress.artifact.content import Artifact, Identity, TensorInfo
from fxcompress.artifact.schema import FORMAT, FORMAT_VERSION, MANIFEST, RECIPE, REPORT, Manifest
from fxcompress.artifact.storage import STORED_DTYPES, LazyTensors, Renamed, file_sha256, read_header
from fxcompress.artifact.structure import structure_from_entry
from fxcompress.errors import ArtifactError
from fxcompress.forms import SiteForm

_MAX_TEXT = 512 * 2**20  # bytes of one JSON or YAML file; a manifest entry takes about 500


class LazyForms(Mapping[str, SiteForm]):
    """Forms by parameter name, built when asked for."""

    def __init__(self, specs: Mapping[str, dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        self._specs = specs
        self._tensors = tensors
        self._built: dict[str, SiteForm] = {}

    def __getitem__(self, name: str) -> SiteForm:
        if name not in self._built:
            self._built[name] = build_form(name, self._specs[name], self._tensors)
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def read_artifact(path: str | Path) -> Artifact:
    """Read the artifact in the directory ``path``; tensors stay on disk, mapped, until they are asked for.

    Raises:
        ArtifactError: it is missing, of a newer version, damaged, edited, inconsistent, or names files
            outside its directory. The message names the file or the parameter.

    Example:
        >>> read_artifact("out").forms["model.layers.0.mlp.up_proj.weight"].terms[0].bits  # doctest: +SKIP
        4
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    _check_files(directory, manifest)
    _check_tensors(directory, manifest)
    parameters = {
        name: TensorInfo(tuple(w.shape), _dtype(name, w.dtype), w.role, w.sha256, w.edited)
        for name, w in manifest.weights.items()
    }
    _check_weights(manifest, parameters)
    lazy = LazyTensors(directory, {key: entry.file for key, entry in manifest.tensors.items()})
    dense = {name: w.tensor for name, w in manifest.weights.items() if w.tensor is not None}
    identity = manifest.identity
    artifact = Artifact(
        recipe=_mapping(directory / RECIPE, yaml.safe_load),
        forms=LazyForms(manifest.forms, lazy),
        tensors=Renamed(lazy, dense),
        fused=tuple(tuple(names) for names in manifest.fused),
        aliases=manifest.aliases,
        report=_mapping(directory / REPORT, json.loads),
        identity=Identity(identity.kind, identity.class_name, identity.config, identity.generation_config),
        parameters=parameters,
        computed={name: _dtype(name, text) for name, text in manifest.computed.items()},
        structure=(
            None
            if manifest.structure is None
            else structure_from_entry(manifest.structure, {n: info.shape for n, info in parameters.items()})
        ),
        directory=directory.resolve(),
    )
    if artifact.fingerprint != manifest.fingerprint:
        raise ArtifactError(f"{MANIFEST}: weights and fingerprint disagree; it was edited.")
    return artifact


def read_manifest(directory: Path) -> Manifest:
    """Parse and validate ``manifest.json`` alone.

    Raises:
        ArtifactError: missing, malformed, or made by a newer version.
    """
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: no such directory.")
    path = confined(directory, MANIFEST)
    content = _mapping(path, json.loads)
    if content.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not an fxcompress artifact.")
    version = content.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format version {version}, this fxcompress reads up to {FORMAT_VERSION}.",
            fix="upgrade fxcompress.",
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {where}: {first['msg']}.") from error


def confined(directory: Path, name: str) -> Path:
    """The regular file ``name`` of ``directory``.

    Raises:
        ArtifactError: it is missing, no regular file, or a symbolic link leads out of the directory.
    """
    path = directory / name
    root = directory.resolve()
    if not path.resolve().is_relative_to(root):
        raise ArtifactError(
            f"{path}: leads out of the artifact's directory.", fix="do not trust this artifact."
        )
    if not path.is_file():
        raise ArtifactError(f"{path}: missing or no regular file.", fix="copy the whole directory again.")
    return path


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    if path.stat().st_size > _MAX_TEXT:
        raise ArtifactError(f"{path}: {path.stat().st_size} bytes are too many for this file.")
    try:
        content = parse(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: a mapping was expected, {type(content).__name__} found.")
    return content


def _check_files(directory: Path, manifest: Manifest) -> None:
    for name in (REPORT, RECIPE, *(entry.file for entry in manifest.tensors.values())):
        if name not in manifest.files:
            raise ArtifactError(f"{directory / MANIFEST}: {name} is not among its files.")
    for name, entry in manifest.files.items():
        path = confined(directory, name)
        size = os.stat(path).st_size
        if size != entry.bytes:
            raise ArtifactError(
                f"{path}: {size} bytes found, {entry.bytes} expected; it is truncated or was edited.",
                fix="copy the whole directory again.",
            )
        if file_sha256(path) != entry.sha256:
            raise ArtifactError(
                f"{path}: its content differs from what was saved.", fix="copy the whole directory again."
            )


def _check_tensors(directory: Path, manifest: Manifest) -> None:
    """The manifest and the headers of the weights files must tell the same."""
    headers = {
        name: read_header(directory / name)
        for name in sorted({entry.file for entry in manifest.tensors.values()})
    }
    for key, entry in manifest.tensors.items():
        found = headers[entry.file].get(key)
        if found != (entry.dtype, tuple(entry.shape)):
            raise ArtifactError(
                f"{entry.file}: tensor {key!r} is {found}, {entry.dtype} {entry.shape} expected."
            )


def _dtype(name: str, text: str) -> torch.dtype:
    try:
        return STORED_DTYPES[text]
    except KeyError:
        raise ArtifactError(f"{name}: dtype {text!r} is unknown.") from None


def _check_weights(manifest: Manifest, parameters: Mapping[str, TensorInfo]) -> None:
    """Every weight has a value; every form, alias and fused group concerns a weight and fits it."""
    meta = {
        key: torch.empty(entry.shape, dtype=STORED_DTYPES[entry.dtype], device="meta")
        for key, entry in manifest.tensors.items()
    }
    forms = {name: build_form(name, spec, meta) for name, spec in manifest.forms.items()}
    for name in (*forms, *manifest.aliases.values(), *(n for names in manifest.fused for n in names)):
        if name not in parameters:
            raise ArtifactError(f"{MANIFEST}: {name!r} is used but not among the weights.")
    for name, form in forms.items():
        check_form(name, form, parameters[name])
    for name, weight in manifest.weights.items():
        replaced = name in forms and bool(forms[name].terms)
        if replaced == (weight.tensor is not None):
            raise ArtifactError(f"{MANIFEST}: {name} must have either weight terms or a tensor.")
        if weight.tensor is None:
            continue
        entry = manifest.tensors.get(weight.tensor)
        if entry is None or (entry.dtype, entry.shape) != (weight.dtype, weight.shape):
            raise ArtifactError(f"{MANIFEST}: the tensor of {name} is missing or of another shape or dtype.")
