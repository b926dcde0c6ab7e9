"""The operators ``fxcompress_cpu::*``: generated kernels as torch sees them.

    fxcompress_cpu::linear     product of [..., K] activations with a tiled weight, and what follows it
    fxcompress_cpu::linear_residual  the same, plus a tensor like the result
    fxcompress_cpu::experts    products of consecutive rows with a tiled weight each
    fxcompress_cpu::embedding  rows of a tiled table
    fxcompress_cpu::dense      a tiled weight dequantized, [K, rows]
    fxcompress_cpu::attend     attention, key heads shared by query heads
    fxcompress_cpu::sparse_*   products with, and expansion of, a sparse weight

An operator names its kernel by the number of its form (:meth:`KernelForm.number`), so that a compiled graph
holds no address. A small C++ library, compiled once like the kernels, implements them through torch's stable
ABI; where it cannot be built, Python calls the kernels through ctypes, which costs some microseconds more per
call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fxcompress.backends.cpu.arguments import Arguments, AttentionArguments
from fxcompress.backends.cpu.generator import (
    ABI_VERSION,
    EPILOGUE_SHIFT,
    GATED,
    GROUP_SHIFT,
    OUTPUT_SHIFT,
    AnyForm,
    epilogue_of,
    group_of,
    output_dtype,
    outputs_of,
    render_template,
)
from fxcompress.backends.cpu.isa import Isa
from fxcompress.backends.cpu.operators import LIBRARY
from fxcompress.backends.cpu.sparse_native import PYTHON
from fxcompress.backends.cpu.toolchain import compiled
from fxcompress.errors import BackendError

logger = logging.getLogger("fxcompress.backends")


def define(schema: str, fake: Callable[..., Tensor], python: Callable[..., Tensor]) -> None:
    """Add an operator whose C++ implementation ``shim.cpp.j2`` holds, at import.

    Args:
        schema: Its schema.
        fake: Gives results of the right shape and dtype.
        python: The implementation where the C++ operators cannot be built.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"fxcompress_cpu::{name}", fake, lib=LIBRARY)
    _PYTHON[name] = python


_KERNELS: dict[int, ctypes.CDLL] = {}  # by form number; a library stays loaded
_FAILED: dict[int, str] = {}
_ON_THE_WAY: dict[int, threading.Event] = {}  # being compiled by `prefetch`, or done
_PATIENCE = 300.0  # seconds; a forked process has no such thread
_OPERATORS = threading.Event()  # cleared while `prefetch` compiles the C++ operators
_OPERATORS.set()
_LOCK = threading.Lock()


def prefetch(forms: Sequence[AnyForm], isa: Isa) -> None:
    """Compile kernels to disk in a thread, in this order, while graphs are still being traced.

    Whoever needs one meanwhile waits for it (:func:`ensure_kernel`); failures are met there, too.
    """
    queue = []
    for form in forms:
        number = form.number(isa)
        if number not in _KERNELS and number not in _FAILED and number not in _ON_THE_WAY:
            _ON_THE_WAY[number] = threading.Event()
            queue.append((form, _ON_THE_WAY[number]))

    def work() -> None:
        try:
            for form, done in queue:
                with contextlib.suppress(BackendError, OSError):
                    compiled(f"{form.title}-{isa.name}", form.render(isa), form.flags(isa))
                done.set()
                if not _OPERATORS.is_set():  # their headers are long: a kernel first, for planning to start
                    with contextlib.suppress(BackendError, OSError):
                        compiled("operators", *_operators())
                    _OPERATORS.set()
        finally:  # nobody may wait for what does not come
            _OPERATORS.set()
            for _, done in queue:
                done.set()

    if queue:
        _OPERATORS.clear()
        threading.Thread(target=work, name="fxcompress-kernels", daemon=True).start()


def ensure_kernel(form: AnyForm, isa: Isa) -> str | None:
    """Compile and load the kernel of a form, once per process.

    Returns:
        None when the operators can use it, else why not (logged once per reason).
    """
    number = form.number(isa)
    if (coming := _ON_THE_WAY.get(number)) is not None:
        coming.wait(_PATIENCE)
    _OPERATORS.wait(_PATIENCE)
    with _LOCK:
        if number not in _KERNELS and number not in _FAILED:
            try:
                kernel = load_kernel(form, isa)
                _bind_operators()
                _KERNELS[number] = kernel
                if (register := _register_function()) is not None:
                    register(number, ctypes.cast(kernel.fx_run, ctypes.c_void_p))
            except BackendError as error:
                _FAILED[number] = str(error)
                _log_failure(str(error).splitlines()[0])
        return _FAILED.get(number)


def loaded_kernels() -> dict[int, Path]:
    """The shared object of every kernel that the operators can use so far, by form number."""
    return {number: Path(kernel._name) for number, kernel in _KERNELS.items()}


def use_kernel(number: int, path: Path) -> None:
    """Let the operators use a kernel that was compiled before.

    Raises:
        BackendError: it cannot be loaded, or is of another interface version.
    """
    with _LOCK:
        if number not in _KERNELS:
            kernel = _opened(path)
            _bind_operators()
            _KERNELS[number] = kernel
            if (register := _register_function()) is not None:
                register(number, ctypes.cast(kernel.fx_run, ctypes.c_void_p))


@functools.cache
def _log_failure(reason: str) -> None:
    logger.warning("no generated kernels, torch's own are used: %s", reason)


def load_kernel(form: AnyForm, isa: Isa) -> ctypes.CDLL:
    """The shared object of a form's kernel, compiled if need be.

    Raises:
        BackendError: it cannot be compiled or loaded, or is of another interface version.
    """
    return _opened(compiled(f"{form.title}-{isa.name}", form.render(isa), form.flags(isa)))


def _opened(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(
            f"{path.name}: cannot be loaded: {error}.", fix=f"delete {path} and try again."
        ) from error
    if library.fx_abi() != ABI_VERSION:
        raise BackendError(f"{path.name}: interface version {library.fx_abi()}, expected {ABI_VERSION}.")
    library.fx_run.argtypes = [ctypes.c_void_p]
    library.fx_run.restype = None
    return library


@functools.cache
def _bind_operators() -> None:
    """Give the operators their CPU implementation: the C++ library, else Python."""
    if _register_function() is None:
        for name, function in _PYTHON.items():
            LIBRARY.impl(name, function, "CPU")


@functools.cache
def _register_function() -> Callable[[int, ctypes.c_void_p], None] | None:
    """``fx_register`` of the C++ library, or None when it cannot be built."""
    try:
        library = ctypes.CDLL(str(compiled("operators", *_operators())))
    except (BackendError, OSError) as error:
        reason = str(error).splitlines()[0]
        logger.warning("the C++ operators cannot be built; kernels are called from Python: %s", reason)
        return None
    register = library.fx_register
    register.argtypes = [ctypes.c_int64, ctypes.c_void_p]
    register.restype = None

    def call(number: int, kernel: ctypes.c_void_p) -> None:
        register(number, kernel)

    return call


def _operators() -> tuple[str, list[str]]:
    """Source and flags of the C++ operators."""
    root = Path(torch.__file__).parent
    shifts = {"group_shift": GROUP_SHIFT, "epilogue_shift": EPILOGUE_SHIFT, "output_shift": OUTPUT_SHIFT}
    source = render_template("shim.cpp.j2", gated=GATED, **shifts)
    return source, [
        f"-I{root / 'include'}",
        f"-L{root / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        f"-DFX_TORCH={torch.__version__}",
    ]


def python_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    total: Tensor,
    bias: Tensor | None,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    form: int,
) -> Tensor:
    """``fxcompress_cpu::linear`` through ctypes."""
    return _python_product(x, None, (weight, scale, zero, total, bias, act_scale, act_zero), form)


def python_linear_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    total: Tensor,
    bias: Tensor | None,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    form: int,
) -> Tensor:
    """``fxcompress_cpu::linear_residual`` through ctypes."""
    return _python_product(x, residual, (weight, scale, zero, total, bias, act_scale, act_zero), form)


def _python_product(
    x: Tensor, residual: Tensor | None, operands: tuple[Tensor | None, ...], form: int
) -> Tensor:
    total = operands[3]
    assert total is not None
    flat = _rows(x)
    out = x.new_empty((*x.shape[:-1], outputs_of(form, total.shape[0])), dtype=output_dtype(form))
    added = None
    if residual is not None:
        if residual.shape != out.shape:
            raise RuntimeError("fxcompress: a residual of another shape than the product")
        added = _rows(residual)
    sizes = (flat.stride(0), flat.shape[0], total.shape[0], flat.shape[1])
    _call(form, (flat, *operands, out), *sizes, residual=added)
    return out


def _rows(x: Tensor) -> Tensor:
    """``[..., K]`` as a matrix whose rows are contiguous."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.contiguous() if flat.shape[1] > 1 and flat.stride(1) != 1 else flat


def python_experts(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    total: Tensor,
    ends: Tensor,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    form: int,
) -> Tensor:
    """``fxcompress_cpu::experts``, an expert at a time."""
    out = x.new_zeros((x.shape[0], total.shape[1]), dtype=output_dtype(form))
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            offset = None if zero is None else zero[expert]
            parts = weight[expert], scale[expert], offset, total[expert], None, act_scale, act_zero
            out[start:end] = python_linear(x[start:end], *parts, form)
        start = max(start, int(end))
    return out


def python_embedding(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    total: Tensor,
    columns: int,
    form: int,
) -> Tensor:
    """``fxcompress_cpu::embedding`` through ctypes."""
    flat, rows = indices.to(torch.int64).contiguous(), total.shape[0]
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= rows):
        raise IndexError(f"fxcompress: an embedding index is outside 0…{rows - 1}")
    out = weight.new_empty((*indices.shape, columns), dtype=output_dtype(form))
    _call(form, (flat, weight, scale, zero, None, None, None, None, out), 1, flat.numel(), rows, columns)
    return out


def python_dense(weight: Tensor, scale: Tensor, zero: Tensor | None, columns: int, form: int) -> Tensor:
    """``fxcompress_cpu::dense`` through ctypes."""
    rows = scale.shape[0] * scale.shape[2]
    out = weight.new_empty((columns, rows), dtype=output_dtype(form))
    _call(form, (None, weight, scale, zero, None, None, None, None, out), 0, 0, rows, columns)
    return out


def python_attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, form: int
) -> Tensor:
    """``fxcompress_cpu::attend`` through ctypes."""
    arguments, out, kept = attention_arguments(query, key, value, mask, causal, scale, form)
    library_of(form).fx_run(ctypes.byref(arguments))
    del kept
    return out


def attention_arguments(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, form: int
) -> tuple[AttentionArguments, Tensor, tuple[Tensor | None, ...]]:
    """What a kernel takes, the result it fills, and the tensors that must live until then."""
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, queries, width = query.shape
    kv_heads, keys, value_width = value.shape[1:]
    out = query.new_empty((batch, queries, heads, value_width), dtype=output_dtype(form))
    tensors = (query, key, value, mask, out)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    strides = [stride for tensor in (query, key, value) for stride in tensor.stride()[:3]]
    for size, stride in [(1, 0)] * 4 if mask is None else zip(mask.shape, mask.stride(), strict=True):
        strides.append(0 if size == 1 else stride)
    floating = mask is not None and mask.dtype is not torch.bool
    sizes = (batch, heads, kv_heads, queries, keys, width, value_width)
    options = (floating, causal, torch.get_num_threads(), scale)
    arguments = AttentionArguments(*pointers, *sizes, (ctypes.c_int64 * 13)(*strides), *options)
    return arguments, out.transpose(1, 2), tensors


_PYTHON: dict[str, Callable[..., Tensor]] = {
    "linear": python_linear,
    "linear_residual": python_linear_residual,
    "experts": python_experts,
    "embedding": python_embedding,
    "dense": python_dense,
    "attend": python_attend,
    **PYTHON,
}


def _call(
    form: int,
    operands: tuple[Tensor | None, ...],
    stride: int,
    tokens: int,
    rows: int,
    columns: int,
    residual: Tensor | None = None,
) -> None:
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in operands]
    options = group_of(form), torch.get_num_threads(), epilogue_of(form)
    arguments = Arguments(*pointers, stride, tokens, rows, columns, *options)
    if residual is not None:
        arguments.residual, arguments.residual_stride = residual.data_ptr(), residual.stride(0)
    library_of(form).fx_run(ctypes.byref(arguments))


def library_of(form: int) -> ctypes.CDLL:
    """The loaded kernel of an operator's ``form``.

    Raises:
        BackendError: this process has not loaded it.
    """
    library = _KERNELS.get(form & ((1 << GROUP_SHIFT) - 1))
    if library is None:
        raise BackendError(
            f"the kernel of form {form} is not loaded in this process.",
            fix="compile the model with fxcompress here first.",
        )
    return library
