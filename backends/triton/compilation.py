"""Kernels compiled ahead of time, for devices that need not be there: what they became, and what they use."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxcompress.backends.triton.generator import AnyForm, Argument, interpreted, load_kernel
from fxcompress.errors import BackendError

__all__ = ["CompiledKernel", "compile_kernel"]


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as a device gets it.

    Args:
        ptx: Its assembly.
        ttir: Its intermediate representation, with the types of all values.
        registers: Per thread.
        stack: Bytes per thread in local memory; not 0 when registers were spilled.
        shared: Bytes of shared memory per program.
    """

    ptx: str
    ttir: str
    registers: int
    stack: int
    shared: int

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether products run on matrix units."""
        return "mma.sync" in self.ptx or "wgmma.mma_async" in self.ptx

    @property
    def uses_wgmma(self) -> bool:
        """Whether products run on the asynchronous matrix units of compute capability 9.0."""
        return "wgmma.mma_async" in self.ptx


def compile_kernel(
    form: AnyForm,
    constants: Mapping[str, object],
    capability: int,
    *,
    warps: int = 4,
    stages: int = 3,
    aligned: bool = True,
    entry: str | None = None,
    arguments: Sequence[Argument] | None = None,
) -> CompiledKernel:
    """Compile a kernel for a compute capability.

    Args:
        form: Of the kernel.
        constants: Tile sizes and other compile-time arguments.
        capability: E.g. 80 or 90.
        warps: Per program.
        stages: Of the pipeline of loads.
        aligned: Promise that pointers and sizes are multiples of 16, as a launch does where they are.
        entry: Of several kernels in the source, which.
        arguments: Of that kernel, where they are not the form's.

    Raises:
        BackendError: triton is missing, or this process runs its interpreter.
    """
    if interpreted():
        raise BackendError(
            f"{form.title}: cannot be compiled while TRITON_INTERPRET is set.", fix="use another process."
        )
    kernel = load_kernel(form, entry)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = form.arguments() if arguments is None else arguments
    signature = {argument.name: argument.kind for argument in given}
    signature.update(dict.fromkeys(constants, "constexpr"))
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(given))} if aligned else {}
    source = ASTSource(kernel, signature, dict(constants), attributes)
    options = {"num_warps": warps, "num_stages": stages}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(found.asm["cubin"])
    return CompiledKernel(found.asm["ptx"], found.asm["ttir"], registers, stack, int(found.metadata.shared))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, as the assembler's own tool reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    handle, name = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", name], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.unlink(name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise BackendError(f"cuobjdump reports no registers: {text.strip()!r}.")
    return int(found[1]), int(found[2])
