"""The manifest: what an artifact contains, as a strict pydantic schema."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

FORMAT = "fxcompress-artifact"
FORMAT_VERSION = 2
"""Newest version. 1 has no ``structure``; models whose structure is unchanged are still written as 1."""
MANIFEST, REPORT, RECIPE, CONFIG = "manifest.json", "report.json", "recipe.yaml", "config.json"
_PART = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*")


def check_file_name(name: str) -> str:
    """A relative path of plain parts: no root, drive, ``..``, hidden file, backslash or control character."""
    if not all(_PART.fullmatch(part) for part in name.split("/")):
        raise ValueError(f"{name!r} is no plain path below the artifact")
    return name


FileName = Annotated[str, AfterValidator(check_file_name)]
Size = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Strict):
    """A file of the artifact, except the manifest itself."""

    bytes: Size
    sha256: Digest


class TensorEntry(_Strict):
    """A stored tensor; ``dtype`` as in safetensors headers."""

    file: FileName
    dtype: str
    shape: list[Size]


class WeightEntry(_Strict):
    """A parameter or buffer of the model.

    ``tensor`` is the key of its dense value, or None when only its form's terms stand for it; ``edited``
    tells whether the dense value differs from the model's; ``sha256`` is that of the model's own value.
    """

    role: Literal["parameter", "buffer"]
    dtype: str
    shape: list[Size]
    sha256: Digest
    tensor: str | None = None
    edited: bool = False


class IdentityEntry(_Strict):
    """Whose weights these are."""

    kind: Literal["transformers", "module"]
    class_name: str
    config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None


class EntryEntry(_Strict):
    """A list entry that was removed."""

    container: str
    index: Size


class ChangeEntry(_Strict):
    """One cut: units kept per channel group, list entries removed."""

    kept: dict[str, list[Size]]
    removed: list[EntryEntry]


class OriginalEntry(_Strict):
    """A parameter or persistent buffer before any cut."""

    role: Literal["parameter", "buffer"]
    dtype: str
    shape: list[Size]


class AttributeEntry(_Strict):
    """A size that Python keeps beside the tensors, before and after."""

    owner: str
    name: str
    old: int | list[Any]
    new: int | list[Any]


class CallEntry(_Strict):
    """An input of the captured call."""

    name: str
    dtype: str
    shape: list[Size]
    value: bool | int | float | str | None = None


class StructureEntry(_Strict):
    """How the structure differs from the original's; see :class:`fxcompress.structure.record.Structure`."""

    changes: list[ChangeEntry]
    original: dict[str, OriginalEntry]
    config: list[AttributeEntry]
    from_config: bool
    attributes: list[AttributeEntry]
    buffers: dict[str, dict[str, list[Size]]]
    cache: list[list[Size]]
    graph: str
    call: list[CallEntry]


class Manifest(_Strict):
    """The whole of ``manifest.json``."""

    format: Literal["fxcompress-artifact"]
    format_version: Literal[1, 2]
    made_by: dict[str, str]
    identity: IdentityEntry
    fingerprint: Digest
    weights: dict[str, WeightEntry]
    forms: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    computed: dict[str, str]
    fused: list[list[str]]
    tensors: dict[str, TensorEntry]
    files: dict[FileName, FileEntry]
    structure: StructureEntry | None = None
