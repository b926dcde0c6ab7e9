"""Saved results: a directory of JSON, YAML and safetensors files that holds data only, never code.

    manifest.json          what is stored where, with shapes, dtypes and hashes; the only file trusted by name
    weights-00001.safetensors …   packed forms, edited tensors and untouched originals; ties stored once
    report.json            the coverage report of the run
    recipe.yaml            the recipe that made it
    config.json, tokenizer.json, …   optional files of the Hugging Face ecosystem

Two runs with the same seed on one machine write the same bytes.
"""

from __future__ import annotations

from fxcompress.artifact.content import Artifact, Identity, TensorInfo, build_artifact
from fxcompress.artifact.read import read_artifact
from fxcompress.artifact.schema import FORMAT_VERSION
from fxcompress.artifact.write import check_target, save_artifact, write_artifact

__all__ = [
    "FORMAT_VERSION",
    "Artifact",
    "Identity",
    "TensorInfo",
    "build_artifact",
    "check_target",
    "read_artifact",
    "save_artifact",
    "write_artifact",
]
