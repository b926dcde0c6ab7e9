"""Instruction sets the generator writes kernels for, and which of them this machine runs."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fxcompress.errors import BackendError

ISA_VARIABLE = "FXCOMPRESS_CPU_ISA"
"""Environment variable that names the instruction set to generate for, instead of the best one found."""


@dataclass(frozen=True)
class Isa:
    """One target of the generator.

    Args:
        name: Used in file names and by ``FXCOMPRESS_CPU_ISA``.
        code: Number inside an operator's form number; never reused for another set.
        template: Which ``templates/isa_*.j2`` gives its primitives.
        lanes: 32-bit lanes of a vector; a row block has twice as many outputs.
        header: Where the compiler declares its intrinsics; empty for plain C++.
        flags: Compiler flags that enable exactly this set.
        needs: Processor flags, as Linux spells them, that must all be present.
        vnni: Products of bytes are summed into 32 bits by one instruction, without intermediate 16 bits.
        narrow_sums: Products of bytes are summed in 16 bits first, so that sums must be widened in time.
        byte_table: Codes below 16 are turned into floats by table look-up in registers.
        integer_rows: Activation rows per tile of the integer kernel, in falling order, ending with 1.
        panel_integer_rows: The same for unpacked panels of codes (with ``vnni``).
        panel_inputs: Inputs of an unpacked panel.
        float_rows: The same as ``integer_rows`` for panels of the float kernel.
        panel_from: Activation rows from which the float kernel dequantizes panels instead of registers.
        panel_rows: Most activation rows that share one panel.
        lookup_tiles: Activation rows × outputs per tile of the kernels that look values up, in falling order;
            the outputs divide 8.
        activation_bytes: Bytes of quantized activations kept in the second-level cache: half of the smallest
            that processors with this set have.
        bfloat16_flags: Compiler flags that add products of bfloat16 pairs; empty where there are none to use.
        bfloat16_rows: Activation rows per tile of bfloat16 panels, like ``integer_rows``.
        bfloat16_inputs: Inputs of a bfloat16 panel.
    """

    name: str
    code: int
    template: str
    lanes: int
    header: str
    flags: tuple[str, ...]
    needs: frozenset[str]
    vnni: bool = False
    narrow_sums: bool = False
    byte_table: bool = False
    integer_rows: tuple[int, ...] = (4, 2, 1)
    panel_integer_rows: tuple[int, ...] = (6, 4, 2, 1)
    panel_inputs: int = 4096
    float_rows: tuple[int, ...] = (6, 4, 2, 1)
    panel_from: int = 6
    panel_rows: int = 192
    lookup_tiles: tuple[tuple[int, int], ...] = ((4, 2), (2, 4), (1, 8))
    activation_bytes: int = 131072
    bfloat16_flags: tuple[str, ...] = ()
    bfloat16_rows: tuple[int, ...] = (8, 4, 2, 1)
    bfloat16_inputs: int = 512

    @property
    def block(self) -> int:
        """Outputs per row block."""
        return 2 * self.lanes


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})

PORTABLE = Isa("portable", 0, "portable", 8, "", (), frozenset())
AVX2 = Isa(
    "avx2",
    1,
    "avx2",
    8,
    "immintrin.h",
    ("-mavx2", "-mfma", "-mf16c"),
    _AVX2,
    narrow_sums=True,
    byte_table=True,
)
AVX_VNNI = Isa(
    "avxvnni",
    2,
    "avx2",
    8,
    "immintrin.h",
    (*AVX2.flags, "-mavxvnni"),
    _AVX2 | {"avx_vnni"},
    vnni=True,
    byte_table=True,
    activation_bytes=524288,
)
AVX512_VNNI = Isa(
    "avx512vnni",
    3,
    "avx512vnni",
    16,
    "immintrin.h",
    (*AVX2.flags, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    _AVX2 | _AVX512 | {"avx512_vnni"},
    vnni=True,
    integer_rows=(8, 4, 2, 1),
    panel_integer_rows=(8, 4, 2, 1),
    float_rows=(12, 6, 2, 1),
    lookup_tiles=((4, 4), (2, 8), (1, 8)),
    activation_bytes=524288,
    bfloat16_flags=("-mavx512bf16",),
)
NEON = Isa(
    "neon",
    4,
    "neon",
    4,
    "arm_neon.h",
    ("-march=armv8.2-a+dotprod",),
    frozenset({"asimd", "asimddp"}),
    lookup_tiles=((4, 4), (2, 8), (1, 8)),
)

ISAS: dict[str, Isa] = {isa.name: isa for isa in (AVX512_VNNI, AVX_VNNI, AVX2, NEON, PORTABLE)}
"""All of them, best first."""


def processor_flags() -> frozenset[str]:
    """Features of this processor as Linux names them; empty where the system does not say."""
    machine = platform.machine().lower()
    if platform.system() == "Darwin" and machine == "arm64":
        return frozenset({"asimd", "asimddp"})  # every Apple processor has both
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def processor_name() -> str:
    """The processor's model as the system names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() == "model name":
                return value.strip()
    return platform.processor() or "unknown processor"


def best_isa(flags: frozenset[str]) -> Isa:
    """The best instruction set a processor with ``flags`` runs.

    Example:
        >>> best_isa(frozenset({"avx2", "fma", "f16c"})).name
        'avx2'
    """
    return next(isa for isa in ISAS.values() if isa.needs <= flags)


def machine_isa(environment: Mapping[str, str] = os.environ) -> Isa:
    """The instruction set to generate for: named by ``FXCOMPRESS_CPU_ISA``, else the best one found.

    Raises:
        BackendError: the variable names an unknown set, or one this processor does not run.
    """
    name = environment.get(ISA_VARIABLE)
    if not name:
        return best_isa(_flags())
    if name not in ISAS:
        raise BackendError(
            f"{ISA_VARIABLE}={name!r} is unknown.", fix=f"use one of {', '.join(ISAS)}, or unset it."
        )
    missing = sorted(ISAS[name].needs - _flags())
    if missing:
        raise BackendError(
            f"{ISA_VARIABLE}={name!r}: this processor lacks {', '.join(missing)}.",
            fix=f"unset it; the best set here is {best_isa(_flags()).name!r}.",
        )
    return ISAS[name]


@functools.cache
def _flags() -> frozenset[str]:
    return processor_flags()
