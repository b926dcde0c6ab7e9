"""The operators of sparse weights: ``fxcompress_cpu::sparse_linear`` and ``sparse_expand``.

Registered together with the others by :mod:`fxcompress.backends.cpu.native`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from fxcompress.backends.cpu.generator import output_dtype

SCHEMAS = (
    "sparse_linear(Tensor x, Tensor values, Tensor bits, Tensor offsets, Tensor? bias, int form) -> Tensor",
    "sparse_expand(Tensor values, Tensor bits, Tensor offsets, int columns, int form) -> Tensor",
)


def _fake_linear(
    x: Tensor,  # [..., K]
    values: Tensor,
    bits: Tensor,  # [N, ceil(K / 16)] int16
    offsets: Tensor,  # [N] int64
    bias: Tensor | None,
    form: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], offsets.shape[0]), dtype=output_dtype(form))


def _fake_expand(values: Tensor, bits: Tensor, offsets: Tensor, columns: int, form: int) -> Tensor:
    return values.new_empty((offsets.shape[0], columns), dtype=output_dtype(form))


class SparseArguments(ctypes.Structure):
    """``fx_sparse`` of ``templates/sparse_arguments.j2``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "values", "bits", "offsets", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "m", "n", "k", "threads")),
    ]


def python_sparse_linear(
    x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, bias: Tensor | None, form: int
) -> Tensor:
    """``fxcompress_cpu::sparse_linear`` through ctypes."""
    columns, rows = x.shape[-1], offsets.shape[0]
    flat = x.reshape(-1, columns)
    if columns > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    out = x.new_empty((*x.shape[:-1], rows), dtype=output_dtype(form))
    if flat.shape[0]:
        sizes = (flat.stride(0), flat.shape[0], rows, columns)
        _call(form, (flat, values, bits, offsets, bias, out), sizes)
    return out


def python_sparse_expand(values: Tensor, bits: Tensor, offsets: Tensor, columns: int, form: int) -> Tensor:
    """``fxcompress_cpu::sparse_expand`` through ctypes."""
    out = values.new_empty((offsets.shape[0], columns), dtype=output_dtype(form))
    _call(form, (None, values, bits, offsets, None, out), (0, 0, offsets.shape[0], columns))
    return out


def _call(form: int, operands: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    from fxcompress.backends.cpu.native import library_of

    pointers = [None if tensor is None else tensor.data_ptr() for tensor in operands]
    arguments = SparseArguments(*pointers, *sizes, torch.get_num_threads())
    library_of(form).fx_run(ctypes.byref(arguments))


FAKES: dict[str, Callable[..., Tensor]] = {"sparse_linear": _fake_linear, "sparse_expand": _fake_expand}
PYTHON: dict[str, Callable[..., Tensor]] = {
    "sparse_linear": python_sparse_linear,
    "sparse_expand": python_sparse_expand,
}
