"""Parameters spread over processes by Accelerate (FSDP2): whole while the student is asked and in the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import TrainingError
from fxcompress.training.saving import trained_tensors

__all__ = ["check_sharding", "gathered", "number_of", "restore_whole"]


def check_sharding(accelerator: Any) -> None:
    """Refuse the first version of FSDP, whose flattened parameters cannot be told apart.

    Raises:
        TrainingError: Accelerate is configured for it.
    """
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise TrainingError(
            "training: Accelerate is configured for the first version of FSDP.",
            fix="set fsdp_version: 2 in its configuration (FSDP_VERSION=2).",
        )


def _sharded(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All parameters whole, for calls of a part of ``model`` instead of ``model`` itself."""
    if not _sharded(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()  # also what a call in between has gathered, which only a backward pass would undo


def number_of(value: Tensor) -> float:
    """A norm of gradients, of which every process may hold a part."""
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return float(whole)


def restore_whole(model: nn.Module) -> None:
    """Put ordinary parameters in the place of shards; every process must call it, after the last step."""
    if not _sharded(model):
        return
    tensors = trained_tensors(model)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = tensors[name].to(parameter.device)
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, parameter.requires_grad)
