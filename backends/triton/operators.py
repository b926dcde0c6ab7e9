"""Operators ``fxcompress_triton::*``: opaque to compilers, with shapes for tracing, safe in CUDA graphs.

They are not ``triton_op``: which tile sizes run depends on the number of rows at run time, and the same
operators run under the interpreter. A call makes no copy to or from the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcompress.backends.cpu.cached_form import HalfForm
from fxcompress.backends.triton import attend as attention
from fxcompress.backends.triton import tuning
from fxcompress.backends.triton.cache_form import AttendForm, WriteForm
from fxcompress.backends.triton.configs import ProductForm, Shape, row_bucket
from fxcompress.backends.triton.generator import interpreted
from fxcompress.backends.triton.launch import run_hadamard, run_product, run_quantize
from fxcompress.backends.triton.texts import form_of
from fxcompress.cache_record import CacheRecord, from_text
from fxcompress.errors import BackendError
from fxcompress.formats.floating import FLOAT_DTYPES

LIBRARY = torch.library.Library("fxcompress_triton", "DEF")
_SCHEMAS = (
    "linear(Tensor x, Tensor[] tensors, SymInt outputs, str form) -> Tensor",
    "quantize(Tensor x, Tensor[] others, float eps, str form) -> (Tensor, Tensor)",
    "hadamard(Tensor x, str form) -> Tensor",
    "attend_cached(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor(a!) memory,"
    " Tensor(b!) length, SymInt capacity, float scale, str form) -> Tensor",
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def tensor_names(form: ProductForm) -> list[str]:
    """Names of the tensors an operator takes beside the activations, in order."""
    stems = [a.name.removesuffix("_ptr") for a in form.arguments() if a.name.endswith("_ptr")]
    return [stem for stem in stems if stem not in ("x", "y")]


def linear(x: Tensor, tensors: Sequence[Tensor], outputs: int, form: str) -> Tensor:
    """``[..., outputs]`` of ``x: [..., K]``; ``tensors`` as :func:`tensor_names` lists them."""
    kind: ProductForm = form_of(form)
    rows = x.reshape(-1, x.shape[-1])
    given = {name: t.contiguous() for name, t in zip(tensor_names(kind), tensors, strict=True)}
    device = tuning.current_device(x.device)
    shape = Shape(row_bucket(rows.shape[0]), outputs, rows.shape[1])
    if tuning.tuning_is_on() and tuning.Choices(device).get(kind, shape) is None:
        runs = [
            partial(run_product, kind, x=rows, tensors=each, outputs=outputs)
            for each in tuning.copies(given, device, most=8)
        ]
        tuning.tune(kind, shape, device, runs)
    y = run_product(kind, tuning.choose(kind, shape, device), rows, given, outputs)
    return y.reshape(*x.shape[:-1], outputs)


def _fake_linear(x: Tensor, tensors: Sequence[Tensor], outputs: int, form: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs), dtype=getattr(torch, form_of(form).input))


def quantize(x: Tensor, others: Sequence[Tensor], eps: float, form: str) -> tuple[Tensor, Tensor]:
    """See :func:`~fxcompress.backends.triton.launch.run_quantize`."""
    return run_quantize(form_of(form), x, tuple(others), eps)


def _fake_quantize(x: Tensor, others: Sequence[Tensor], eps: float, form: str) -> tuple[Tensor, Tensor]:
    codes = form_of(form).codes
    dtype = torch.int8 if codes == "int8" else FLOAT_DTYPES[codes]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def hadamard(x: Tensor, form: str) -> Tensor:
    """See :func:`~fxcompress.backends.triton.launch.run_hadamard`."""
    return run_hadamard(form_of(form), x)


def _fake_hadamard(x: Tensor, form: str) -> Tensor:
    return x.new_empty(x.shape)


def attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    memory: Tensor,
    length: Tensor,
    capacity: int,
    scale: float,
    form: str,
) -> Tensor:
    """Attention over the cache and the new tokens, which are then appended; ``form`` is the cache's as text.

    Raises:
        BackendError: no kernel reads the form.
    """
    cache = from_text(form, [])
    dtype = str(query.dtype).removeprefix("torch.")
    kind, problem = AttendForm.of(cache, dtype, mask_kind(mask))
    if kind is None:
        raise BackendError(f"attend_cached: {problem}.")
    record = CacheRecord(cache, capacity, query.dtype)
    heads = key.shape[0] * key.shape[1]
    processors = tuning.current_device(query.device).processors
    splits = attention.splits_for(heads, capacity, kind.tile, processors)
    y = attention.attend(kind, record, query, key, value, mask, memory, length, scale, splits)
    widths = (cache.key_width, cache.value_width)
    halves = (HalfForm.of(cache.key), HalfForm.of(cache.value))
    writes = [WriteForm(half, w, dtype) for half, w in zip(halves, widths, strict=True) if half is not None]
    attention.append(writes, record, memory, length, (key, value))
    return y


def mask_kind(mask: Tensor | None) -> str | None:
    """``AttendForm.mask`` of a mask."""
    if mask is None:
        return None
    return "bool" if mask.dtype is torch.bool else "float"


def _fake_attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    memory: Tensor,
    length: Tensor,
    capacity: int,
    scale: float,
    form: str,
) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


_OPERATORS: dict[str, tuple[Any, Any]] = {
    "linear": (linear, _fake_linear),
    "quantize": (quantize, _fake_quantize),
    "hadamard": (hadamard, _fake_hadamard),
    "attend_cached": (attend_cached, _fake_attend_cached),
}
for _name, (_function, _fake) in _OPERATORS.items():
    LIBRARY.impl(_name, _function, "CUDA")
    if interpreted():
        LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"fxcompress_triton::{_name}", _fake, lib=LIBRARY)
