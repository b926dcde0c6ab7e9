"""Checkpoints of a training run: safetensors and JSON, written aside and renamed, resumed exactly."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fxcompress.errors import TrainingError

__all__ = ["Checkpoints", "Snapshot", "read_snapshot", "take_snapshot"]

_STATE, _PARAMETERS, _OPTIMIZER, _BEST = (
    "state.json",
    "model.safetensors",
    "optimizer.safetensors",
    "best.safetensors",
)
_WHOLE = StateDictOptions(full_state_dict=True)  # on every process: each keeps the best it has seen


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a run needs to go on.

    Args:
        model: Trained parameters by name.
        optimizer: The optimiser's tensors, ``"parameter|entry"``.
        best: Parameters of the best look at held-out data; empty before the first.
        state: Numbers: step, history, early stopping.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    state: Mapping[str, Any]


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, whole and on the CPU, however the model is wrapped; every process must call it."""
    found: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    return {name: value.detach().to("cpu", copy=True) for name, value in found.items()}


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a (wrapped) model its parameters."""
    set_model_state_dict(model, dict(tensors), options=StateDictOptions(full_state_dict=True))


def take_snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Snapshot:
    """The run as it is; every process must call it."""
    found: Any = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    tensors = {
        f"{name}|{entry}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for name, entries in found["state"].items()
        for entry, value in entries.items()
    }
    return Snapshot(trained_tensors(model), tensors, dict(best), dict(state))


def read_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> None:
    """Put model and optimiser back to where a snapshot was taken."""
    set_tensors(model, snapshot.model)
    groups: Any = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in snapshot.optimizer.items():
        name, _, entry = key.rpartition("|")
        state.setdefault(name, {})[entry] = value
    whole = {"state": state, "param_groups": groups["param_groups"]}
    set_optimizer_state_dict(model, optimizer, whole, options=StateDictOptions(full_state_dict=True))


class Checkpoints:
    """A folder of snapshots ``step-00000100``, of which the newest few are kept.

    Args:
        folder: Created when missing.
        key: Hash of what the run is; a folder of another run is refused.
        keep: How many are kept.

    Raises:
        TrainingError: the folder cannot be made, or belongs to another run.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str, keep: int) -> None:
        self.folder, self.key, self.keep = Path(folder), key, keep
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"checkpoint {self.folder}: cannot be created: {error.strerror}.") from error

    def steps(self) -> list[Path]:
        """Whole snapshots, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / _STATE).is_file())

    def save(self, snapshot: Snapshot) -> Path:
        """Write a snapshot; there is a whole one or none at any moment."""
        target = self.folder / f"step-{snapshot.state['step']:08d}"
        aside = Path(tempfile.mkdtemp(prefix=".step-", dir=self.folder))
        try:
            for name, tensors in (
                (_PARAMETERS, snapshot.model),
                (_OPTIMIZER, snapshot.optimizer),
                (_BEST, snapshot.best),
            ):
                save_file({key: value.contiguous() for key, value in tensors.items()}, aside / name)
            content = {"key": self.key, **snapshot.state}
            (aside / _STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
            for path in aside.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"checkpoint {target}: cannot be written: {error}.") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def last(self) -> Snapshot | None:
        """The newest snapshot, or None.

        Raises:
            TrainingError: it belongs to another run, or is damaged.
        """
        found = self.steps()
        if not found:
            return None
        path = found[-1]
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            if state.pop("key", None) != self.key:
                raise TrainingError(
                    f"checkpoint {path}: was made with other data, options or models.",
                    fix="give the run another folder, or delete this one.",
                )
            model, optimizer, best = (_tensors(path / name) for name in (_PARAMETERS, _OPTIMIZER, _BEST))
        except (OSError, ValueError, SafetensorError) as error:
            raise TrainingError(
                f"checkpoint {path}: is damaged: {error}.", fix="delete it; the one before is used then."
            ) from error
        return Snapshot(model, optimizer, best, state)


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


__all__ += ["set_tensors", "trained_tensors"]
