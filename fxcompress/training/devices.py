"""Where a run computes, and in which order it reads its rows: the same however many processes there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxcompress.errors import TrainingError
from fxcompress.training.graph import TrainingGraph
from fxcompress.training.options import TrainingOptions

__all__ = ["device_of", "keep_buffers_local", "make_accelerator", "row_at"]


def row_at(position: int, rows: int, seed: int) -> int:
    """The row at a position of the endless stream: every epoch is a permutation of its own."""
    epoch, place = divmod(position, rows)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return int(torch.randperm(rows, generator=generator)[place])


def device_of(graph: TrainingGraph) -> torch.device:
    """Where a graph's tensors lie."""
    tensor = next(iter([*graph.parameters(), *graph.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def make_accelerator(options: TrainingOptions, device: torch.device) -> Any:
    """Accelerate's object, on the processor if the model lies there."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise TrainingError(
            "training needs the package accelerate, which is not installed.",
            fix="pip install 'fxcompress[train]'",
        ) from error
    # Accelerate keeps one precision per process; another run in it may use another.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=options.precision,
        log_with="tensorboard" if options.log_dir is not None else None,
        project_dir=options.log_dir,
    )


def keep_buffers_local(module: nn.Module) -> None:
    """Frozen weights are buffers, equal in all processes: sending them in every step would be waste."""
    names = [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
