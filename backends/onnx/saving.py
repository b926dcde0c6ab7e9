"""Write an ONNX model so that the target is complete or absent, and equal models are equal files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from fxcompress.errors import ArtifactError

__all__ = ["EXTERNAL_THRESHOLD", "check_destination", "publish", "write_aside", "write_model"]

EXTERNAL_THRESHOLD = 2**31 - 2**20
"""Bytes of weights from which they go to a file of their own: one protobuf message holds less than 2 GiB."""

_SMALLEST_EXTERNAL = 256  # bytes; smaller tensors stay in the model, where shape inference reads them


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Refuse what cannot be written, before any work.

    Raises:
        ArtifactError: no such folder, not writable, not a file, or it exists already.
    """
    folder = path.parent
    if path.suffix != ".onnx":
        raise ArtifactError(f"{path}: the name must end in .onnx.", fix=f"write to {path}.onnx")
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such directory.", fix="create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArtifactError(f"{folder}: not writable.", fix="choose another directory.")
    if path.is_dir() or (path.exists() and not overwrite):
        raise ArtifactError(f"{path}: exists already.", fix="remove it, or pass overwrite=True.")


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to write into; removed afterwards whatever happens."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ArtifactError(f"{path.parent}: cannot be written ({error.strerror}).") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_model(model: ir.Model, path: Path, *, external: bool | None, threshold: int) -> None:
    """Write ``path`` and, when the weights are external, ``path`` + ``.data``.

    Args:
        model: What to write.
        path: The file.
        external: Whether weights go to a file of their own; None: when they exceed ``threshold``.
        threshold: In bytes.

    Raises:
        ArtifactError: the disk is full or not writable.
    """
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    apart = size > threshold if external is None else external
    try:
        if apart:
            ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=_SMALLEST_EXTERNAL)
        else:
            proto = ir.serde.serialize_model(model)
            path.write_bytes(proto.SerializeToString(deterministic=True))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror}).") from error
    onnx.checker.check_model(str(path), full_check=True)


def publish(folder: Path, destination: Path, *, overwrite: bool) -> list[Path]:
    """Move everything in ``folder`` beside ``destination``, the model itself last.

    Raises:
        ArtifactError: a file of that name exists and must not be replaced.
    """
    taken = [file.name for file in sorted(folder.iterdir()) if (destination.parent / file.name).exists()]
    if taken and not overwrite:
        raise ArtifactError(
            f"{destination.parent}: {', '.join(taken)} exist already.",
            fix="write to an empty directory, or pass overwrite=True.",
        )
    names = sorted(
        (file.name for file in folder.iterdir()), key=lambda name: (name == destination.name, name)
    )
    for name in names:
        os.replace(folder / name, destination.parent / name)
    stale = destination.parent / f"{destination.name}.data"
    if overwrite and stale.name not in names and stale.exists():
        stale.unlink()
    return [destination.parent / name for name in names]
