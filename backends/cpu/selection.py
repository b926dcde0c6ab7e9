"""Which kernel serves a use on a machine: a fixed rule over what the machine has, backed by measurements.

The constants come from ``tests/benchmarks/kernels.py``; ``docs/cpu-kernels.md`` has the rule as a table. The
choice never depends on a measurement at run time, so that equal machines compute equal results.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fxcompress.backends.cpu.codebook import CodebookDense, CodebookEmbedding, CodebookLinear
from fxcompress.backends.cpu.embeddings import EmbeddingKernel, GeneratedEmbedding, RowsEmbedding
from fxcompress.backends.cpu.generated import GeneratedBfloat16, GeneratedDense, GeneratedLinear
from fxcompress.backends.cpu.isa import Isa, machine_isa, processor_flags
from fxcompress.backends.cpu.kernel_types import Kernel, LinearSpec
from fxcompress.backends.cpu.kernels import (
    Int4Unpacked,
    Int4WeightOnly,
    Int8Int8,
    Int8Unpacked,
    Int8WeightOnly,
)

_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_MATRIX_UNITS = frozenset({"amx_bf16"})
_INT8 = frozenset({"avx512_vnni", "amx_int8"})


@dataclass(frozen=True)
class Machine:
    """What the choice depends on.

    Args:
        isa: Instruction set of generated kernels.
        bfloat16: Has bfloat16 products; without them oneDNN's are several times slower than float32.
        int8: Has byte products that torch uses; without them ``_int_mm`` is a plain loop.
        matrix_units: Has matrix units for bfloat16, which oneDNN uses and generated kernels do not.
    """

    isa: Isa
    bfloat16: bool
    int8: bool
    matrix_units: bool = False


def this_machine() -> Machine:
    """The machine this process runs on; ``FXCOMPRESS_CPU_ISA`` replaces its instruction set."""
    flags = _flags()
    return Machine(
        machine_isa(), bool(flags & _BFLOAT16), bool(flags & _INT8), matrix_units=bool(flags & _MATRIX_UNITS)
    )


@functools.cache
def _flags() -> frozenset[str]:
    return processor_flags()


@functools.cache
def candidates(machine: Machine, table: bool = False) -> tuple[Kernel, ...]:
    """Linear kernels worth running on ``machine``, best first; ``table``: for codes that index one."""
    if table:
        looked_up = CodebookLinear(machine.isa)
        return (CodebookDense(machine.isa), looked_up) if machine.bfloat16 else (looked_up,)
    generated: tuple[Kernel, ...] = (GeneratedLinear(machine.isa),)
    if machine.bfloat16:
        direct = bool(machine.isa.bfloat16_flags) and not machine.matrix_units
        wide = GeneratedBfloat16(machine.isa) if direct else GeneratedDense(machine.isa)
        generated = (wide, *generated)
    aten: list[Kernel] = [Int8Int8()] if machine.int8 else []
    aten.append(Int4WeightOnly(any_tokens=machine.bfloat16))
    aten += [Int4Unpacked()] if machine.bfloat16 else []
    aten.append(Int8WeightOnly())
    aten += [Int8Unpacked()] if machine.bfloat16 else []
    return (*generated, *aten)


def choose_kernel(spec: LinearSpec, machine: Machine | None = None) -> tuple[Kernel | None, str]:
    """The first kernel that serves ``spec``, and what to say of it; None with the refusals when none does.

    Args:
        spec: The linear use.
        machine: Default: this one.

    Raises:
        BackendError: ``FXCOMPRESS_CPU_ISA`` names a set this processor does not run.
    """
    refusals = []
    for kernel in candidates(machine or this_machine(), spec.table is not None):
        reason = kernel.refuses(spec)
        if reason is None:
            return kernel, kernel.describe(spec)
        refusals.append(f"{kernel.name}: {reason.splitlines()[0]}")
    return None, "; ".join(refusals)


def why(spec: LinearSpec, machine: Machine | None = None) -> tuple[str, str, str]:
    """Why a use has its kernel (what was asked before), the generated kernel's name, and its source."""
    where = machine or this_machine()
    refusals = []
    for kernel in candidates(where, spec.table is not None):
        reason = kernel.refuses(spec)
        if reason is not None:
            refusals.append(f"{kernel.name}: {reason.splitlines()[0]}")
            continue
        form = getattr(kernel, "form", None)
        title, source = ("", "") if form is None else (form(spec).title, form(spec).render(where.isa))
        passed = f"; passed over: {'; '.join(refusals)}" if refusals else ""
        return f"first of the kernels for this machine that serves the use{passed}", title, source
    return f"no kernel serves the use: {'; '.join(refusals)}", "", ""


def choose_embedding(spec: LinearSpec, machine: Machine | None = None) -> EmbeddingKernel | None:
    """The first embedding kernel that serves a table, or None."""
    isa = (machine or this_machine()).isa
    kernels: tuple[EmbeddingKernel, ...] = (GeneratedEmbedding(isa), RowsEmbedding())
    if spec.table is not None:
        kernels = (CodebookEmbedding(isa),)
    return next((kernel for kernel in kernels if kernel.refuses(spec) is None), None)
