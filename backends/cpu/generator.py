"""From a form to the C++ source of its kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from fxcompress.backends.cpu.isa import Isa
from fxcompress.errors import BackendError

if TYPE_CHECKING:
    from jinja2 import Environment

ABI_VERSION = 4
"""Raised whenever ``templates/*arguments.j2`` or the meaning of the packed tensors changes."""

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
MANY_ROWS = 16
"""Activation rows from which a machine with bfloat16 products uses them."""
GROUP_SHIFT = 34  # bits of a kernel number
EPILOGUE_SHIFT = 58  # of a kernel number and a group size
GATED = 8  # see epilogues.py
OUTPUT_SHIFT = 12  # where the output's dtype lies in it
_WEIGHT_KINDS = ("linear", "embedding", "dense", "linear-bfloat16")
_KINDS = (*_WEIGHT_KINDS, "attention", "codebook-linear", "codebook-rows", "cached", "sparse")
_ACTIVATIONS = (None, "dynamic", "static")
_SUM_LIMIT = 32767  # of a signed 16-bit sum
_NO_FLUSH = 1 << 20


@dataclass(frozen=True)
class KernelForm:
    """Everything a kernel's source depends on besides the instruction set; shapes are arguments.

    Args:
        kind: ``"linear"``; ``"linear-bfloat16"``, which multiplies many rows as bfloat16; ``"embedding"``
            (rows by index) or ``"dense"`` (dequantized, transposed).
        bits: Width of a weight code, 2…8.
        has_zero: Whether zero-points are stored; else they are ``2**(bits-1)``.
        grouped: bfloat16 scale per group; else float32 scale per row.
        activation: None (float activations), ``"dynamic"`` (per token) or ``"static"`` (per tensor).
        activation_bits: Width of an activation code, 2…8; 0 without activation quantization.
        input: Dtype of the activations: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        output: Dtype of the result.

    Raises:
        BackendError: a field is out of range.
    """

    kind: str
    bits: int
    has_zero: bool
    grouped: bool
    activation: str | None
    activation_bits: int
    input: str
    output: str

    def __post_init__(self) -> None:
        problems = [
            (self.kind in _WEIGHT_KINDS, f"kind={self.kind!r}"),
            (2 <= self.bits <= 8, f"bits={self.bits}"),
            (self.activation in _ACTIVATIONS, f"activation={self.activation!r}"),
            (
                self.kind != "linear-bfloat16" or self.activation is None,
                f"activation={self.activation!r} with kind={self.kind!r}",
            ),
            (
                self.activation_bits in range(2, 9) if self.activation else self.activation_bits == 0,
                f"activation_bits={self.activation_bits} with activation={self.activation!r}",
            ),
            (self.input in DTYPES.values(), f"input={self.input!r}"),
            (self.output in DTYPES.values(), f"output={self.output!r}"),
        ]
        wrong = [text for good, text in problems if not good]
        if wrong:
            raise BackendError(f"KernelForm: {', '.join(wrong)} is not supported.")

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        weight = f"w{self.bits}{'z' if self.has_zero else ''}{'g' if self.grouped else ''}"
        activation = f"-a{self.activation_bits}{self.activation}" if self.activation else ""
        return f"{self.kind}-{weight}{activation}-{self.input}-{self.output}"

    @property
    def activation_text(self) -> str:
        """The activations in words."""
        if self.activation is None:
            return self.input
        scale = "per token at run time" if self.activation == "dynamic" else "per tensor, calibrated"
        return f"{self.input}, quantized to {self.activation_bits} bits {scale}"

    def number(self, isa: Isa) -> int:
        """The kernel of this form on ``isa`` as one integer below 2**34, equal in every process."""
        activation = (_ACTIVATIONS.index(self.activation), self.activation_bits)
        weight = (self.bits, self.has_zero, self.grouped, *activation)
        return form_number(self.kind, weight, self.input, self.output, isa)

    def render(self, isa: Isa) -> str:
        """See :func:`render`."""
        return render(self, isa)

    def flags(self, isa: Isa) -> tuple[str, ...]:
        """Compiler flags for the source of this form on ``isa``."""
        return (*isa.flags, *isa.bfloat16_flags) if self.kind == "linear-bfloat16" else isa.flags

    def call_number(self, isa: Isa, group: int, epilogue: int = 0) -> int:
        """What operators take as ``form``: the kernel's number; group size and epilogue in the bits above.

        One integer, because torch's dispatcher takes most of a microsecond for every integer argument.
        """
        return call_number(self.number(isa), group, epilogue)


@dataclass(frozen=True)
class AttentionForm:
    """What the source of an attention kernel depends on besides the instruction set.

    Args:
        input: Dtype of queries, keys, values and result: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    """

    input: str
    kind = "attention"
    activation = None

    @property
    def output(self) -> str:
        """Dtype of the result."""
        return self.input

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        return f"attention-{self.input}"

    def number(self, isa: Isa) -> int:
        """See :meth:`KernelForm.number`."""
        return form_number(self.kind, (0, 0, 0, 0, 0), self.input, self.output, isa)

    def render(self, isa: Isa) -> str:
        """The kernel's C++ source."""
        return render_template("attention.cpp.j2", form=self, isa=isa, nibble_table=False)

    def flags(self, isa: Isa) -> tuple[str, ...]:
        """Compiler flags for the source of this form on ``isa``."""
        return isa.flags


class AnyForm(Protocol):
    """What compiling and loading a kernel takes."""

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        ...

    def number(self, isa: Isa) -> int:
        """See :meth:`KernelForm.number`."""
        ...

    def render(self, isa: Isa) -> str:
        """The kernel's C++ source."""
        ...

    def flags(self, isa: Isa) -> tuple[str, ...]:
        """Compiler flags for the source of this form on ``isa``."""
        ...


def form_number(kind: str, weight: Sequence[int], input_dtype: str, output_dtype: str, isa: Isa) -> int:
    """One integer below 2**34 for a kernel, equal in every process; ``weight``: five small numbers."""
    dtypes = list(DTYPES.values())
    widths = (4, 4, 1, 1, 2, 4, 3, 3, 4, 8)  # bits of every field, highest first
    fields = (_KINDS.index(kind), *weight, dtypes.index(input_dtype), dtypes.index(output_dtype))
    number = 0
    for value, width in zip((*fields, isa.code, ABI_VERSION), widths, strict=True):
        number = number << width | int(value)
    return number


def call_number(kernel: int, group: int, epilogue: int = 0) -> int:
    """See :meth:`KernelForm.call_number`."""
    return epilogue << EPILOGUE_SHIFT | group << GROUP_SHIFT | kernel


def group_of(number: int) -> int:
    """The group size in an operator's ``form``."""
    return number >> GROUP_SHIFT & ((1 << EPILOGUE_SHIFT - GROUP_SHIFT) - 1)


def epilogue_of(number: int) -> int:
    """The epilogue in an operator's ``form`` (see ``epilogues.py``)."""
    return number >> EPILOGUE_SHIFT


def outputs_of(number: int, rows: int) -> int:
    """Columns of the result of a product with a weight of ``rows`` rows."""
    return rows // 2 if epilogue_of(number) & GATED else rows


def output_dtype(number: int) -> torch.dtype:
    """Dtype of the result, from an operator's ``form``."""
    return list(DTYPES)[number >> OUTPUT_SHIFT & 7]


def flush_steps(bits: int, isa: Isa) -> int:
    """Steps of four inputs whose products a partial sum holds without overflow.

    Where products are summed in 16 bits, one step adds two products of at most ``qmax · 128``. 8-bit codes
    are multiplied nibble by nibble, hence ``qmax`` is 15 for them.
    """
    if not isa.narrow_sums:
        return _NO_FLUSH
    largest = 15 if bits == 8 else (1 << bits) - 1
    return _SUM_LIMIT // (2 * largest * 128)


def render(form: KernelForm, isa: Isa) -> str:
    """The kernel's C++ source, readable and complete.

    Example:
        >>> from fxcompress.backends.cpu.isa import PORTABLE
        >>> form = KernelForm("linear", 4, True, True, "dynamic", 8, "float32", "float32")
        >>> render(form, PORTABLE).splitlines()[0]
        '// linear-w4zg-a8dynamic-float32-float32'

    Raises:
        BackendError: the instruction set lacks what the form is made of.
    """
    if form.kind == "linear-bfloat16" and not isa.bfloat16_flags:
        raise BackendError(f"{form.title}: there are no bfloat16 products with {isa.name}.")
    split = isa.narrow_sums and form.bits == 8
    is_linear = form.kind in ("linear", "linear-bfloat16")
    return (
        _environment()
        .get_template("kernel.cpp.j2")
        .render(
            form=form,
            isa=isa,
            abi_version=ABI_VERSION,
            fixed_zero=1 << (form.bits - 1),
            qmax=(1 << form.bits) - 1,
            act_qmax=(1 << (form.activation_bits - 1)) - 1 if form.activation else 0,
            flush_steps=flush_steps(form.bits, isa),
            nibble_table=isa.byte_table and is_linear and form.bits <= 4 and not form.activation,
            table=_bfloat16_bytes(form.bits),
            # Split codes take twice the registers and twice the multiplications.
            integer_rows=isa.integer_rows[1:] if split else isa.integer_rows,
            float_panels=split and form.activation is not None,
            # Codes of 8 bits need no unpacking, and without their zero-point would not fit a signed byte.
            integer_panels=isa.vnni and form.bits < 8,
            bfloat16_panels=form.kind == "linear-bfloat16",
            bfloat16_from=MANY_ROWS,
        )
    )


def _bfloat16_bytes(bits: int) -> list[tuple[int, int]]:
    """Low and high byte of ``code − 2**(bits−1)`` in bfloat16 (exact), for the sixteen smallest codes."""
    values = torch.arange(16).sub(1 << (bits - 1)).to(torch.bfloat16).view(torch.uint8).view(16, 2)
    return [(int(low), int(high)) for low, high in values]


def render_template(name: str, **values: object) -> str:
    """Any other template of this package."""
    return _environment().get_template(name).render(abi_version=ABI_VERSION, **values)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("fxcompress.backends.cpu", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
