"""Write an artifact: into a temporary sibling first, renamed when complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fxcompress.artifact.content import Artifact, Identity, build_artifact
from fxcompress.artifact.schema import CONFIG, FORMAT, FORMAT_VERSION, MANIFEST, RECIPE, REPORT
from fxcompress.artifact.storage import dtype_name, file_sha256, to_json
from fxcompress.artifact.structure import structure_to_entry
from fxcompress.edits import CompressionState
from fxcompress.errors import ArtifactError
from fxcompress.structure.record import Structure

SHARD_BYTES = 2 * 2**30
"""Largest weights file, unless one tensor alone is larger."""


def write_artifact(
    path: str | Path,
    *,
    recipe: dict[str, Any],
    state: CompressionState,
    report: dict[str, Any],
    module: nn.Module,
    identity: Identity,
    aliases: Mapping[str, str],
    structure: Structure | None = None,
    tokenizer: Any | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Build an artifact (:func:`build_artifact`) and save it (:func:`save_artifact`).

    Example:
        >>> write_artifact("out", recipe=recipe, state=state, report=report, module=module,
        ...                identity=Identity.of_module(module), aliases={})  # doctest: +SKIP
    """
    artifact = build_artifact(
        recipe=recipe,
        state=state,
        report=report,
        module=module,
        identity=identity,
        aliases=aliases,
        structure=structure,
    )
    save_artifact(artifact, path, tokenizer=tokenizer, overwrite=overwrite)
    return artifact


def save_artifact(
    artifact: Artifact, path: str | Path, *, tokenizer: Any | None = None, overwrite: bool = False
) -> None:
    """Save ``artifact`` as the directory ``path``.

    Args:
        artifact: What to save; its lazy tensors are read one file at a time.
        path: The directory to create. Its parent is created too.
        tokenizer: Saved beside the weights by its own ``save_pretrained``. Without one, the tokenizer files
            of the directory the artifact was read from are kept.
        overwrite: Replace an artifact that is already there. Nothing but an artifact is ever replaced.

    Raises:
        ArtifactError: ``path`` exists, the disk is full or not writable, or a value cannot be saved. The
            directory then holds what it held before.
    """
    target = Path(os.path.abspath(path))
    check_target(target, overwrite=overwrite)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        _fill(temporary, artifact, tokenizer)
        temporary.chmod(0o777 & ~_umask())
        _move_into_place(temporary, target)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: the artifact cannot be written ({error}).", fix="check free space and permissions."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_target(path: str | Path, *, overwrite: bool = False) -> None:
    """Check that :func:`save_artifact` may write to ``path``; useful before hours of work.

    Raises:
        ArtifactError: it exists and may not be replaced.
    """
    target = Path(path)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ArtifactError(f"{target}: already exists.", fix="choose another path or ask to overwrite it.")
    if target.is_symlink() or not (target / MANIFEST).is_file():
        raise ArtifactError(f"{target}: not an artifact; it is not overwritten.", fix="choose another path.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename; an artifact already there survives until the new one has its place."""
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    target.rename(old / "artifact")
    try:
        temporary.rename(target)
    except OSError:
        (old / "artifact").rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _fill(directory: Path, artifact: Artifact, tokenizer: Any | None) -> None:
    _write_companions(directory, artifact, tokenizer)
    (directory / REPORT).write_bytes(to_json(artifact.report))
    (directory / RECIPE).write_text(
        yaml.safe_dump(artifact.recipe, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    forms, stored = _collect(artifact)
    tensors = _write_weights(directory, stored)
    files = {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    manifest = _manifest(artifact, forms) | {"tensors": tensors, "files": files}
    (directory / MANIFEST).write_bytes(to_json(manifest))


def _manifest(artifact: Artifact, forms: dict[str, Any]) -> dict[str, Any]:
    from fxcompress import __version__

    identity, structure = artifact.identity, artifact.structure
    return {
        "format": FORMAT,
        "format_version": 1 if structure is None else FORMAT_VERSION,
        "made_by": {"fxcompress": __version__},
        "identity": {
            "kind": identity.kind,
            "class_name": identity.class_name,
            "config": identity.config,
            "generation_config": identity.generation_config,
        },
        "fingerprint": artifact.fingerprint,
        "weights": {
            name: {
                "role": info.role,
                "dtype": dtype_name(info.dtype, name),
                "shape": list(info.shape),
                "sha256": info.sha256,
                "tensor": f"dense/{name}" if name in artifact.tensors else None,
                "edited": info.edited,
            }
            for name, info in artifact.parameters.items()
        },
        "forms": forms,
        "aliases": artifact.aliases,
        "computed": {name: dtype_name(dtype, name) for name, dtype in artifact.computed.items()},
        "fused": [list(names) for names in artifact.fused],
        "structure": None if structure is None else structure_to_entry(structure),
    }


def _collect(artifact: Artifact) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Specs of all forms, and every tensor to store by key (mapped from disk, not read, if it was loaded)."""
    stored: dict[str, Tensor] = {}
    forms = {name: form.to_spec(f"form/{name}", stored) for name, form in artifact.forms.items()}
    for name in artifact.tensors:
        stored[f"dense/{name}"] = artifact.tensors[name]
    return forms, stored


def _write_weights(directory: Path, stored: Mapping[str, Tensor]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for number, keys in enumerate(_shards(stored), 1):
        name = f"weights-{number:05d}.safetensors"
        save_file(_plain({key: stored[key] for key in keys}), directory / name)
        for key in keys:
            tensor = stored[key]
            entries[key] = {
                "file": name,
                "dtype": dtype_name(tensor.dtype, key),
                "shape": list(tensor.shape),
            }
    return entries


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors wants them."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size()
        plain[key] = tensor.clone() if shared else tensor
        seen.add(plain[key].untyped_storage().data_ptr())
    return plain


def _shards(stored: Mapping[str, Tensor]) -> Iterator[list[str]]:
    keys: list[str] = []
    size = 0
    for key in sorted(stored):
        nbytes = stored[key].numel() * stored[key].element_size()
        if keys and size + nbytes > SHARD_BYTES:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += nbytes
    if keys:
        yield keys


def _write_companions(directory: Path, artifact: Artifact, tokenizer: Any | None) -> None:
    """Tokenizer and configuration files, which serve other tools and :func:`fxcompress.hf.load_tokenizer`."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    elif artifact.directory is not None:
        _copy_companions(artifact.directory, directory)
    for name, content in (
        (CONFIG, artifact.identity.config),
        ("generation_config.json", artifact.identity.generation_config),
    ):
        if content is not None:
            (directory / name).write_bytes(to_json(content))


def _copy_companions(source: Path, directory: Path) -> None:
    from fxcompress.artifact.read import read_manifest

    for name in read_manifest(source).files:
        if name not in (REPORT, RECIPE) and not name.endswith(".safetensors"):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, directory / name)
