"""Save a compressed model as a plain checkpoint of transformers, which loads it without fxcompress."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fxcompress.artifact.content import Artifact
from fxcompress.errors import ArtifactError
from fxcompress.hf import empty_model
from fxcompress.report import describe_form

__all__ = ["check_plain", "save_plain"]


def check_plain(artifact: Artifact) -> None:
    """Check that a plain checkpoint can hold the model.

    Raises:
        ArtifactError: it is no model of transformers, a weight is not dense, or layers have sizes that the
            configuration cannot tell; says which and what to do instead.
    """
    alternative = "use save(), and fxcompress.load() to read it."
    if artifact.identity.kind != "transformers":
        raise ArtifactError(
            f"{artifact.identity.class_name}: no model class of transformers, so no plain checkpoint.",
            fix=alternative,
        )
    for name in artifact.forms:
        text = describe_form(artifact.forms[name]) or "a bias of its own"
        raise ArtifactError(
            f"{name}: is {text}; a plain checkpoint holds dense weights only.",
            fix=f"leave such passes out of the recipe, or {alternative}",
        )
    structure = artifact.structure
    if structure is not None and not structure.from_config:
        why = structure.graph or "its layers were cut to sizes of their own, or to sizes it derives otherwise"
        raise ArtifactError(
            f"no configuration of {artifact.identity.class_name} describes the cut model: {why}.",
            fix=f"cut every layer alike, heads to a number that divides the width, or {alternative}",
        )


def save_plain(artifact: Artifact, path: str | Path, tokenizer: Any | None = None) -> None:
    """Write ``config.json``, safetensors and the tokenizer; nothing is left behind when it fails.

    Args:
        artifact: Of a model with dense weights whose structure its configuration tells.
        path: The directory to create.
        tokenizer: Saved beside.

    Raises:
        ArtifactError: see :func:`check_plain`; ``path`` exists or cannot be written; or what was written is
            read back otherwise.
    """
    check_plain(artifact)
    target = Path(os.path.abspath(path))
    if os.path.lexists(target):
        raise ArtifactError(f"{path}: already exists.", fix="choose another path.")
    model: Any = empty_model(artifact)
    _bind(model, artifact)
    artifact.restore_buffers(model)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        with _quiet():
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            _check_read(type(model), temporary, artifact)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: the checkpoint cannot be written ({error}).", fix="check free space and permissions."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _bind(model: nn.Module, artifact: Artifact) -> None:
    made: dict[str, nn.Parameter] = {}
    for prefix, owner in model.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{key}".lstrip(".")
                name = artifact.aliases.get(name, name)
                if name not in made:
                    made[name] = nn.Parameter(artifact.tensors[name], requires_grad=False)
                owner._parameters[key] = made[name]


def _check_read(cls: Any, folder: Path, artifact: Artifact) -> None:
    """Read the checkpoint back as any user of transformers would."""
    loaded, info = cls.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True, trust_remote_code=False
    )
    wrong = [f"{kind}: {sorted(map(str, found))[0]}" for kind, found in info.items() if found]
    for name, parameter in loaded.named_parameters():
        stored = artifact.tensors[artifact.aliases.get(name, name)]
        if not torch.equal(parameter.detach(), stored):
            wrong.append(f"{name} has other values")
    if wrong:
        raise ArtifactError(
            f"transformers reads the checkpoint otherwise than it was written: {wrong[0]}.",
            fix="use save(), and report this.",
        )
