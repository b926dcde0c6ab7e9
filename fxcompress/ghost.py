"""Ghosts: parameters whose values live elsewhere, in packed form.

A ghost is one NaN element expanded to the shape of the weight (stride 0 in every dimension). Tracing sees the
right shape and dtype, no memory is held, and any computation that bypasses the rewrite yields NaN.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import WeightError


@dataclass(frozen=True, eq=False)
class GhostTag:
    """Which parameter of the compressed model ``owner`` this is, or stands for: ``name``."""

    owner: object
    name: str


def make_ghost(like: Tensor, owner: object, name: str, device: torch.device | None = None) -> nn.Parameter:
    """A ghost parameter with the shape and dtype of ``like``, on ``device`` or where ``like`` is.

    Raises:
        WeightError: ``like`` is not floating point, so there is no NaN to mark it with.
    """
    if not like.is_floating_point():
        raise WeightError(f"{name}: a ghost needs a floating-point weight, found {like.dtype}.")
    value = torch.full((1,), float("nan"), dtype=like.dtype, device=device or like.device)
    ghost = nn.Parameter(value.expand(like.shape), requires_grad=False)
    ghost._fxcompress_tag = GhostTag(owner, name)  # type: ignore[attr-defined]
    return ghost


def ghost_tag(tensor: object) -> GhostTag | None:
    """The tag of a ghost, or None for anything else."""
    return getattr(tensor, "_fxcompress_tag", None)


def dense_tag(tensor: object) -> GhostTag | None:
    """The tag of a parameter that a compressed model kept dense, or None for anything else."""
    return getattr(tensor, "_fxcompress_dense", None)


def contains_ghosts(module: nn.Module) -> bool:
    """Whether any parameter of ``module`` is a ghost."""
    return any(ghost_tag(parameter) is not None for parameter in module.parameters())


def ghost_copy(
    module: nn.Module,
    replacements: Mapping[str, Tensor],
    ghosts: set[str],
    owner: object,
    device: torch.device | None = None,
) -> nn.Module:
    """Copy a module without copying its weights.

    Args:
        module: The original; not modified.
        replacements: New values by canonical name (edited parameters).
        ghosts: Canonical names that become ghosts.
        owner: Object recorded in the ghosts' tags.
        device: Where parameters and buffers go. Default None: where the original has them.

    Returns:
        A deep copy in evaluation mode. Parameters neither replaced nor ghosted are shared with the original
        (as frozen parameters on the same storage); buffers are copied.
    """
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        if name in ghosts:
            memo[id(parameter)] = make_ghost(parameter, owner, name, device)
        else:
            value = replacements.get(name, parameter).detach().to(device or parameter.device)
            dense = nn.Parameter(value, requires_grad=False)
            dense._fxcompress_dense = GhostTag(owner, name)  # type: ignore[attr-defined]
            memo[id(parameter)] = dense
    if device is not None:
        memo.update({id(buffer): buffer.to(device, copy=True) for buffer in module.buffers()})
    clone = copy.deepcopy(module, memo)
    clone.eval()
    return clone
