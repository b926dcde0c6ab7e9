"""The manifest: what an artifact contains, as a strict pydantic schema."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

FORMAT = "fxcompress-artifact"
FORMAT_VERSION = 1
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


class Manifest(_Strict):
    """The whole of ``manifest.json``."""

    format: Literal["fxcompress-artifact"]
    format_version: Literal[1]
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
