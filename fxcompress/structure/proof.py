"""Proof that a module computes what the cut graph computes, and that it generates with its cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxcompress.capture.program import Program
from fxcompress.verify import relative_difference

__all__ = ["cache_shapes", "call_of", "generation_differs", "outputs_differ", "shapes_differ"]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative difference of an output by dtype: the same operations, in another order at most."""


def call_of(program: Program, flat: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of a call of the model from its flat inputs."""
    if program.in_spec is None:
        return tuple(flat), {}
    args, kwargs = pytree.tree_unflatten(list(flat), program.in_spec)
    return tuple(args), dict(kwargs)


@torch.no_grad()
def outputs_differ(module: nn.Module, program: Program, flat: Sequence[Any], expected: Sequence[Any]) -> str:
    """What is wrong with a module's outputs; empty when they are those of the program.

    Args:
        module: In evaluation mode.
        program: What it should compute.
        flat: Flat inputs of one call.
        expected: The program's flat outputs.
    """
    args, kwargs = call_of(program, flat)
    try:
        found = pytree.tree_leaves(module(*args, **kwargs))
    except Exception as error:  # whatever Python that expects other sizes raises
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    tensors = [value for value in found if isinstance(value, Tensor)]
    wanted = [value for value in expected if isinstance(value, Tensor)]
    if len(tensors) != len(wanted):
        return f"{len(tensors)} outputs instead of {len(wanted)}"
    for index, (value, want) in enumerate(zip(tensors, wanted, strict=True)):
        gap = relative_difference(want, value)
        if not gap <= _TOLERANCES.get(want.dtype, 0.0):
            return f"output {index} differs by {gap:.1e} relative"
    return ""


@torch.no_grad()
def shapes_differ(module: nn.Module, program: Program, flat: Sequence[Any]) -> str:
    """What is wrong with the shapes of a module's values; empty when tracing would find nothing.

    Some kernels compute without complaint on sizes that do not fit (attention with more heads of keys than of
    queries); compilation, which only looks at shapes, refuses them.
    """
    args, kwargs = call_of(program, flat)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, _unlogged("torch._subclasses.fake_tensor"):
        args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        try:
            module(*args, **kwargs)
        except Exception as error:
            return (
                f"{type(error).__name__} in tracing: {(str(error).strip() or 'no message').splitlines()[0]}"
            )
    return ""


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Without the log of a module that writes down every error it raises; here they are answers."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@torch.no_grad()
def generation_differs(module: Any, original: Any, ids: Tensor) -> str:
    """What is wrong with a module's generation with its cache; empty when it equals that without.

    Args:
        module: The cut module.
        original: The module before the cut; what it cannot do either is not held against the cut.
        ids: ``[1, T]`` main input.
    """
    if not _can_generate(module):
        return ""
    try:
        cached = _generate(module, ids, use_cache=True)
    except Exception as error:
        return "" if _fails(original, ids, use_cache=True) else f"{type(error).__name__} in generate: {error}"
    try:
        plain = _generate(module, ids, use_cache=False)
    except Exception as error:
        return (
            "" if _fails(original, ids, use_cache=False) else f"{type(error).__name__} in generate: {error}"
        )
    if not torch.equal(cached.sequences, plain.sequences):
        agree = torch.equal(
            _generate(original, ids, use_cache=True).sequences,
            _generate(original, ids, use_cache=False).sequences,
        )
        return "other tokens with the cache than without" if agree else ""
    return ""


@torch.no_grad()
def cache_shapes(module: Any, ids: Tensor) -> tuple[tuple[int, int], ...]:
    """``(heads, size)`` of the keys of every layer's cache; empty when it has no such cache."""
    if not _can_generate(module):
        return ()
    try:
        cache = _generate(module, ids, use_cache=True).past_key_values
    except Exception:  # what cannot generate keeps no cache; `generation_differs` judges whether it may
        return ()
    keys = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    if not keys or not all(isinstance(key, Tensor) and key.dim() == 4 for key in keys):
        return ()
    return tuple((int(key.shape[1]), int(key.shape[3])) for key in keys if key is not None)


def _can_generate(module: Any) -> bool:
    can = getattr(module, "can_generate", None)
    return callable(can) and bool(can())


def _fails(module: Any, ids: Tensor, *, use_cache: bool) -> bool:
    try:
        _generate(module, ids, use_cache=use_cache)
    except Exception:
        return True
    return False


def _generate(module: Any, ids: Tensor, *, use_cache: bool) -> Any:
    return module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        return_dict_in_generate=True,
    )
