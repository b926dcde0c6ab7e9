"""Bytes on disk: hashes, dtype names, safetensors headers and tensors that are read when asked for."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxcompress.errors import ArtifactError

STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Name of a dtype in a safetensors header → torch dtype. Anything else is not stored."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in STORED_DTYPES.items()}
_MAX_HEADER = 100 * 2**20  # the limit of the safetensors format itself


def dtype_name(dtype: torch.dtype, where: str) -> str:
    """The header name of ``dtype``.

    Raises:
        ArtifactError: safetensors files cannot hold it.
    """
    try:
        return DTYPE_NAMES[dtype]
    except KeyError:
        raise ArtifactError(
            f"{where}: tensors of {dtype} cannot be saved.", fix="convert the tensor to another dtype."
        ) from None


def tensor_sha256(tensor: Tensor) -> str:
    """Hex sha256 of the tensor's values in row-major order; independent of strides and device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(value: Any) -> bytes:
    """JSON with sorted keys, so that equal values give equal bytes.

    Raises:
        ArtifactError: the value holds something JSON has no notation for (NaN and inf included).
    """
    try:
        text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"a value cannot be written as JSON: {error}.") from error
    return (text + "\n").encode()


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor key → (dtype name, shape) of a safetensors file, checked against the size of the file.

    Raises:
        ArtifactError: the header is damaged, its offsets overlap or leave gaps, or the file is cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 <= length <= min(_MAX_HEADER, size - 8):
            raise ArtifactError(f"{path.name}: truncated or not a safetensors file.")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {key: _entry(value) for key, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path.name}: the header is damaged ({error}).") from error
    end = 0
    for key, (_, _, (start, stop)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if start != end:
            raise ArtifactError(f"{path.name}: tensor {key!r} overlaps another one or leaves a gap.")
        end = stop
    if 8 + length + end != size:
        raise ArtifactError(f"{path.name}: {size} bytes found, {8 + length + end} expected; it is damaged.")
    return {key: (dtype, shape) for key, (dtype, shape, _) in entries.items()}


def _entry(value: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    dtype, shape = str(value["dtype"]), tuple(value["shape"])
    start, stop = value["data_offsets"]
    for number in (*shape, start, stop):
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} is no size")
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown")
    if stop - start != math.prod(shape) * STORED_DTYPES[dtype].itemsize:
        raise ValueError(f"{stop - start} bytes for shape {list(shape)} {dtype}")
    return dtype, shape, (start, stop)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of several safetensors files by key; a file is mapped when its first tensor is asked for.

    Args:
        directory: Folder of the files.
        location: Tensor key → name of its file.
    """

    def __init__(self, directory: Path, location: Mapping[str, str]) -> None:
        self._directory = directory
        self._location = dict(location)
        self._open: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        name = self._location[key]
        try:
            if name not in self._open:
                self._open[name] = safe_open(self._directory / name, framework="pt", device="cpu")
            tensor: Tensor = self._open[name].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{name}: cannot read tensor {key!r} ({error}).") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._location)

    def __len__(self) -> int:
        return len(self._location)


class Renamed(Mapping[str, Tensor]):
    """A view of ``source`` under other keys.

    Args:
        source: The tensors.
        keys: New key → key in ``source``.
    """

    def __init__(self, source: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
        self._source = source
        self._keys = dict(keys)

    def __getitem__(self, key: str) -> Tensor:
        return self._source[self._keys[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
