"""Inputs to check an export with: other values and other sizes than the example's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.capture.program import Program

__all__ = ["random_like", "resized", "standard_trials", "tensor_inputs"]


def tensor_inputs(program: Program, flat: Sequence[Any]) -> dict[str, Tensor]:
    """The tensors among the flat inputs, by placeholder name."""
    return {
        name: value for name, value in zip(program.inputs, flat, strict=True) if isinstance(value, Tensor)
    }


def random_like(flat: Sequence[Any], seed: int) -> list[Any]:
    """Random inputs in the range of the given ones; masks (of zeros and ones) stay as they are."""
    generator = torch.Generator().manual_seed(seed)

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.numel():
            return value
        if value.is_floating_point():
            spread = value.float().std() if value.numel() > 1 else torch.tensor(1.0)
            noise = torch.randn(value.shape, generator=generator) * spread + value.float().mean()
            return noise.to(value.dtype)
        low, high = int(value.min()), int(value.max())
        if value.dtype == torch.bool or (low >= 0 and high <= 1):
            return value
        if torch.equal(value, torch.arange(value.shape[-1]).expand(value.shape)):
            return value  # positions
        return torch.randint(low, high + 1, value.shape, generator=generator, dtype=value.dtype)

    return [other(value) for value in flat]


def resized(program: Program, flat: Sequence[Any]) -> list[Any] | None:
    """The inputs with every dynamic size three larger, values repeated; None when nothing is dynamic."""
    placeholders = {node.name: node.meta.get("val") for node in program.placeholders()}
    sizes: dict[str, int] = {}
    result, changed = [], False
    for name, value in zip(program.inputs, flat, strict=True):
        fake = placeholders.get(name)
        if not isinstance(value, Tensor) or not isinstance(fake, Tensor):
            result.append(value)
            continue
        symbolic: tuple[Any, ...] = tuple(fake.shape)
        for dim, size in enumerate(symbolic):
            if isinstance(size, torch.SymInt) and str(size).isidentifier():
                wanted = sizes.setdefault(str(size), value.shape[dim] + 3)
                value = _extended(value, dim, wanted)
                changed = True
        result.append(value)
    return result if changed else None


def _extended(value: Tensor, dim: int, size: int) -> Tensor:
    if not value.shape[dim]:
        return value.new_zeros([*value.shape[:dim], size, *value.shape[dim + 1 :]])
    return value.index_select(dim, torch.arange(size) % value.shape[dim])


def standard_trials(program: Program, example: Sequence[Any]) -> list[tuple[str, Sequence[Any]]]:
    """The example, other values of the same sizes, and other sizes where there are dynamic ones."""
    trials: list[tuple[str, Sequence[Any]]] = [
        ("example inputs", example),
        ("random inputs", random_like(example, seed=1)),
    ]
    other = resized(program, example)
    return trials if other is None else [*trials, ("other sizes", other)]
