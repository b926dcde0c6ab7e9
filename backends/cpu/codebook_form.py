"""Kernels whose weight codes index a table: the form, and its C++ source."""

from __future__ import annotations

from dataclasses import dataclass

from fxcompress.backends.cpu.generator import (
    DTYPES,
    call_number,
    form_number,
    render_template,
)
from fxcompress.backends.cpu.isa import Isa
from fxcompress.errors import BackendError

ROWS = 8
"""Outputs whose codes lie together; see ``templates/codebook_unpack.j2``."""
_KINDS = ("codebook-linear", "codebook-rows")


@dataclass(frozen=True)
class CodebookForm:
    """Everything such a kernel's source depends on besides the instruction set; shapes are arguments.

    Args:
        kind: ``"codebook-linear"``, or ``"codebook-rows"`` (dequantized rows by index).
        bits: Width of a weight code, 2…8.
        per_row: One bfloat16 table per row; else one float32 table.
        grouped: bfloat16 scale per group; else float32 scale per row.
        input: Dtype of the activations: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        output: Dtype of the result.

    Raises:
        BackendError: a field is out of range.
    """

    kind: str
    bits: int
    per_row: bool
    grouped: bool
    input: str
    output: str
    activation = None

    def __post_init__(self) -> None:
        problems = [
            (self.kind in _KINDS, f"kind={self.kind!r}"),
            (2 <= self.bits <= 8, f"bits={self.bits}"),
            (self.input in DTYPES.values(), f"input={self.input!r}"),
            (self.output in DTYPES.values(), f"output={self.output!r}"),
        ]
        wrong = [text for good, text in problems if not good]
        if wrong:
            raise BackendError(f"CodebookForm: {', '.join(wrong)} is not supported.")

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        weight = f"t{self.bits}{'r' if self.per_row else ''}{'g' if self.grouped else ''}"
        return f"{self.kind}-{weight}-{self.input}-{self.output}"

    def number(self, isa: Isa) -> int:
        """See :meth:`KernelForm.number`."""
        return form_number(
            self.kind, (self.bits, self.per_row, self.grouped, 0, 0), self.input, self.output, isa
        )

    def call_number(self, isa: Isa, group: int, epilogue: int = 0) -> int:
        """See :meth:`KernelForm.call_number`."""
        return call_number(self.number(isa), group, epilogue)

    def flags(self, isa: Isa) -> tuple[str, ...]:
        """Compiler flags for the source of this form on ``isa``."""
        return isa.flags

    def render(self, isa: Isa) -> str:
        """The kernel's C++ source, readable and complete.

        Example:
            >>> from fxcompress.backends.cpu.isa import PORTABLE
            >>> form = CodebookForm("codebook-linear", 4, False, True, "float32", "float32")
            >>> form.render(PORTABLE).splitlines()[0]
            '// codebook-linear-t4g-float32-float32'
        """
        return render_template(
            "codebook.cpp.j2", form=self, isa=isa, nibble_table=False, lookup_bits=self.bits, rows=ROWS
        )
