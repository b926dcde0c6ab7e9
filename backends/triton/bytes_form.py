"""Kernel forms of products of bytes: int8 × int8 and 8-bit floats, per token × per channel or in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fxcompress.backends.triton.generator import Argument
from fxcompress.backends.triton.linear_form import DTYPES
from fxcompress.errors import BackendError

__all__ = ["CODES", "BytesForm"]

CODES = {"int8": "*i8", "e4m3": "*fp8e4nv", "e5m2": "*fp8e5"}


@dataclass(frozen=True)
class BytesForm:
    """``y = x·Wᵀ`` where both are bytes with scales.

    Args:
        codes: ``"int8"``, ``"e4m3"`` or ``"e5m2"``.
        zero: Whether the weight has zero-points (``int8`` only).
        block_rows: Outputs that share a scale. 1 = one each.
        group: Inputs that share a scale of the weight, a multiple of 32; 0 = all.
        x_group: Inputs that share a scale of a token, a multiple of 32; 0 = all.
        input: Dtype of the result: ``"float16"`` or ``"bfloat16"``.
        bias: Whether a bias is added.
        emulated: 8-bit floats are widened to float16, for devices that do not multiply them.

    Raises:
        BackendError: a field is out of range.
    """

    codes: str
    zero: bool
    block_rows: int
    group: int
    x_group: int
    input: str
    bias: bool = False
    emulated: bool = False
    family: ClassVar[str] = "bytes"
    entry: ClassVar[str] = "linear_bytes"

    def __post_init__(self) -> None:
        checks = {
            f"codes={self.codes!r}": self.codes in CODES,
            f"zero={self.zero} with codes={self.codes!r}": not self.zero or self.codes == "int8",
            f"block_rows={self.block_rows}": self.block_rows >= 1,
            f"zero={self.zero} with block_rows={self.block_rows}": not self.zero or self.block_rows == 1,
            f"group={self.group}": self.group >= 0 and self.group % 32 == 0,
            f"x_group={self.x_group}": self.x_group >= 0 and self.x_group % 32 == 0,
            f"input={self.input!r}": self.input in DTYPES,
            f"emulated={self.emulated} with codes={self.codes!r}": not self.emulated or self.codes != "int8",
        }
        wrong = [text for text, good in checks.items() if not good]
        if wrong:
            raise BackendError(f"BytesForm: {', '.join(wrong)} is not supported.")

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        groups = (f"g{self.group}" if self.group else "") + (f"-xg{self.x_group}" if self.x_group else "")
        rows = f"-b{self.block_rows}" if self.block_rows > 1 else ""
        extras = ("-emulated" if self.emulated else "") + ("-bias" if self.bias else "")
        return f"bytes-{self.codes}{'z' if self.zero else ''}{groups}{rows}-{self.input}{extras}"

    @property
    def integers(self) -> bool:
        """Whether products are exact integers."""
        return self.codes == "int8"

    @property
    def unit(self) -> int:
        """Inputs after which a scale may change; 0 = never."""
        sizes = [size for size in (self.group, self.x_group) if size]
        return min(sizes) if sizes else 0

    @property
    def block_k(self) -> tuple[int, ...]:
        """Inputs a program may read at once."""
        return tuple(
            size
            for size in (32, 64, 128)
            if not (self.group and self.group % size) and not (self.x_group and self.x_group % size)
        )

    @property
    def factor(self) -> float:
        """What widened products must still be multiplied with."""
        return 65536.0 if self.emulated and self.codes == "e4m3" else 1.0

    def arguments(self) -> list[Argument]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        value, code = DTYPES[self.input], "*u8" if self.emulated else CODES[self.codes]
        found = [
            Argument("x_ptr", code, "[M, K]"),
            Argument("w_ptr", code, "[N, K]"),
            Argument("scale_ptr", "*fp32", "[groups, scale_rows]"),
            *([Argument("zero_ptr", "*i16", "[groups, N]")] if self.zero else []),
            Argument("x_scale_ptr", "*fp32", "[M, x_groups]"),
            *([Argument("bias_ptr", f"*{value}", "[N]")] if self.bias else []),
            Argument("y_ptr", f"*{value}", "[M, N]"),
        ]
        sizes = ("M", "N", "K", "scale_rows", "x_groups")
        return [*found, *(Argument(name, "i32", "") for name in sizes)]

    def context(self) -> dict[str, Any]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        return {}
