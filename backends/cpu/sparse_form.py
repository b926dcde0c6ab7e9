"""Kernels of sparse weights: the form, and its C++ source."""

from __future__ import annotations

from dataclasses import dataclass

from fxcompress.backends.cpu.generator import form_number, render_template
from fxcompress.backends.cpu.isa import Isa


@dataclass(frozen=True)
class SparseForm:
    """What the source of a kernel of sparse weights depends on besides the instruction set.

    Args:
        value: Dtype of the entries: ``"float32"``, ``"bfloat16"`` or ``"float16"``; also that of the
            activations and the result.
        even: Every 16 inputs of every row have exactly 8 entries, as in 2:4 and 4:8.
    """

    value: str
    even: bool = False
    kind = "sparse"
    activation = None

    @property
    def input(self) -> str:
        """Dtype of the activations."""
        return self.value

    @property
    def output(self) -> str:
        """Dtype of the result."""
        return self.value

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        return f"sparse-{'even-' if self.even else ''}{self.value}"

    def number(self, isa: Isa) -> int:
        """See :meth:`KernelForm.number`."""
        return form_number(self.kind, (0, self.even, 0, 0, 0), self.input, self.output, isa)

    def flags(self, isa: Isa) -> tuple[str, ...]:
        """Compiler flags for the source of this form on ``isa``."""
        return isa.flags

    def render(self, isa: Isa) -> str:
        """The kernel's C++ source."""
        return render_template("sparse.cpp.j2", form=self, isa=isa, nibble_table=False)
