"""Which kernel serves a use on a machine: the fastest of those that a rule over the machine's features names.

The rule's order comes from ``tests/benchmarks/kernels.py``; ``docs/cpu-kernels.md`` has it as a table. Where
several kernels serve a use, ``measured.py`` times them once per machine and keeps the answer; with
``FXCOMPRESS_CPU_SELECTION=rule`` the first one is taken.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

from fxcompress.backends.cpu import measured
from fxcompress.backends.cpu.codebook import CodebookDense, CodebookEmbedding, CodebookLinear
from fxcompress.backends.cpu.embeddings import EmbeddingKernel, GeneratedEmbedding, RowsEmbedding
from fxcompress.backends.cpu.generated import GeneratedBfloat16, GeneratedDense, GeneratedLinear
from fxcompress.backends.cpu.isa import Isa, machine_isa, processor_flags, processor_name
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

    @property
    def text(self) -> str:
        """Everything of it that a measured choice depends on."""
        has = [name for name in ("bfloat16", "int8", "matrix_units") if getattr(self, name)]
        return ", ".join([platform.machine(), _processor(), self.isa.name, *has])


def this_machine() -> Machine:
    """The machine this process runs on; ``FXCOMPRESS_CPU_ISA`` replaces its instruction set."""
    flags = _flags()
    return Machine(
        machine_isa(), bool(flags & _BFLOAT16), bool(flags & _INT8), matrix_units=bool(flags & _MATRIX_UNITS)
    )


@functools.cache
def _processor() -> str:
    return processor_name()


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
        direct = (GeneratedBfloat16(machine.isa),) if machine.isa.bfloat16_flags else ()
        through = (GeneratedDense(machine.isa),) if machine.matrix_units or not direct else ()
        generated = (*through, *direct, *generated)
    aten: list[Kernel] = [Int8Int8()] if machine.int8 else []
    aten.append(Int4WeightOnly(any_tokens=machine.bfloat16))
    aten += [Int4Unpacked()] if machine.bfloat16 else []
    aten.append(Int8WeightOnly())
    aten += [Int8Unpacked()] if machine.bfloat16 else []
    return (*generated, *aten)


def choose_kernel(spec: LinearSpec, machine: Machine | None = None) -> tuple[Kernel | None, str]:
    """The kernel that serves ``spec``, and what to say of it; None with the refusals when none does.

    Args:
        spec: The linear use.
        machine: Default: this one. For one that is given the rule alone decides.

    Raises:
        BackendError: ``FXCOMPRESS_CPU_ISA`` names a set this processor does not run.
    """
    choice = _choose(spec, machine)
    if choice.kernel is None:
        return None, "; ".join(choice.refusals)
    return choice.kernel, choice.kernel.describe(spec)


def why(spec: LinearSpec, machine: Machine | None = None) -> tuple[str, str, str]:
    """Why a use has its kernel (what was asked before), the generated kernel's name, and its source."""
    where = machine or this_machine()
    choice = _choose(spec, machine)
    refusals = "; ".join(choice.refusals)
    if choice.kernel is None:
        return f"no kernel serves the use: {refusals}", "", ""
    form = getattr(choice.kernel, "form", None)
    title, source = ("", "") if form is None else (form(spec).title, form(spec).render(where.isa))
    passed = f"; passed over: {refusals}" if refusals else ""
    measured_ = f"measured here: {choice.answer.text}" if choice.answer is not None else ""
    first = "first of the kernels for this machine that serves the use"
    return f"{measured_ or first}{passed}", title, source


@dataclass(frozen=True)
class _Choice:
    """The chosen kernel, why others do not serve the use, and the measurement that decided."""

    kernel: Kernel | None
    refusals: tuple[str, ...]
    answer: measured.Answer | None = None


def _choose(spec: LinearSpec, machine: Machine | None) -> _Choice:
    where = machine or this_machine()
    measuring = machine is None and measured.is_on() and measured.worth_measuring(spec)
    serving: list[Kernel] = []
    refusals: list[str] = []
    for kernel in candidates(where, spec.table is not None):
        reason = kernel.refuses(spec)
        if reason is None:
            serving.append(kernel)
            if not measuring:
                break
        elif not serving:  # what the rule passed over
            refusals.append(f"{kernel.name}: {reason.splitlines()[0]}")
    if len(serving) < 2:
        return _Choice(serving[0] if serving else None, tuple(refusals))
    answer = measured.answer(spec, where.text, serving)
    kernel = next(kernel for kernel in serving if kernel.describe(spec) == answer.kernel)
    return _Choice(kernel, tuple(refusals), answer)


def choose_embedding(spec: LinearSpec, machine: Machine | None = None) -> EmbeddingKernel | None:
    """The first embedding kernel that serves a table, or None."""
    isa = (machine or this_machine()).isa
    kernels: tuple[EmbeddingKernel, ...] = (GeneratedEmbedding(isa), RowsEmbedding())
    if spec.table is not None:
        kernels = (CodebookEmbedding(isa),)
    return next((kernel for kernel in kernels if kernel.refuses(spec) is None), None)
