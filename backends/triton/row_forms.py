"""Kernel forms of work on rows of activations: quantizers (behind norms and gates), Hadamard transforms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fxcompress.backends.triton.bytes_form import CODES
from fxcompress.backends.triton.generator import Argument
from fxcompress.backends.triton.linear_form import DTYPES
from fxcompress.errors import BackendError

__all__ = ["HadamardForm", "QuantizeForm"]

SOURCES = ("plain", "rms-norm", "layer-norm", "gate")
_TYPES = {**DTYPES, "float32": "fp32"}
_LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
_SMALLEST_NORMAL = 2.0**-126
MOST_COLUMNS = 1 << 16


@dataclass(frozen=True)
class QuantizeForm:
    """Codes and one scale per token, of activations or of what is computed from them.

    Args:
        source: ``"plain"``; ``"rms-norm"`` or ``"layer-norm"`` of the row; ``"gate"``: silu(x) · up.
        codes: ``"int8"``, ``"e4m3"`` or ``"e5m2"``.
        bits: Width of integer codes, 2…8.
        input: Dtype of the activations.

    Raises:
        BackendError: a field is out of range.
    """

    source: str
    codes: str
    bits: int
    input: str
    family: ClassVar[str] = "quantize"
    entry: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        good = self.source in SOURCES and self.codes in CODES and self.input in _TYPES
        if not good or not (2 <= self.bits <= 8):
            raise BackendError(f"{self} is not supported.")

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        bits = f"{self.bits}" if self.codes == "int8" else ""
        return f"quantize-{self.source}-{self.codes}{bits}-{self.input}"

    @property
    def largest(self) -> float:
        """Largest code."""
        return _LARGEST.get(self.codes, float((1 << (self.bits - 1)) - 1))

    @property
    def tiny(self) -> float:
        """Scales below it count as 1."""
        return _SMALLEST_NORMAL

    @property
    def dropped_bits(self) -> int:
        """Bits of a float32's mantissa that a floating-point code does not have."""
        return 20 if self.codes == "e4m3" else 21

    @property
    def smallest_normal(self) -> float:
        """Below it, floating-point codes are evenly spaced."""
        return 2.0**-6 if self.codes == "e4m3" else 2.0**-14

    @property
    def rebias(self) -> int:
        """What the exponent and mantissa of a float32, read as an integer, exceed a code's by."""
        return (120 if self.codes == "e4m3" else 112) << (23 - self.dropped_bits)

    @property
    def per_unit(self) -> float:
        """One over the smallest code."""
        return 2.0**9 if self.codes == "e4m3" else 2.0**16

    @property
    def shift(self) -> float:
        """Adding and taking it away rounds to that spacing: 1.5 · 2**23 times the smallest code."""
        return 1.5 * 2.0**23 / self.per_unit

    def arguments(self) -> list[Argument]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        value = f"*{_TYPES[self.input]}"
        found = [Argument("x_ptr", value, "[M, K]")]
        if self.source == "gate":
            found.append(Argument("up_ptr", value, "[M, K]"))
        if self.source.endswith("norm"):
            found.append(Argument("weight_ptr", value, "[K]"))
        if self.source == "layer-norm":
            found.append(Argument("bias_ptr", value, "[K]"))
        found += [
            Argument("q_ptr", "*i8" if self.codes == "int8" else "*u8", "[M, K]"),
            Argument("scale_ptr", "*fp32", "[M]"),
        ]
        found += [Argument("K", "i32", ""), Argument("x_stride", "i32", "elements between two rows")]
        found += [Argument("up_stride", "i32", "")] if self.source == "gate" else []
        found += [Argument("eps", "fp32", "")] if self.source.endswith("norm") else []
        return found

    def context(self) -> dict[str, Any]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        return {"type": f"tl.{self.input}"}


@dataclass(frozen=True)
class HadamardForm:
    """The transform of parts of ``size`` neighbouring channels.

    Args:
        size: A power of two, 2…4096.
        input: Dtype of activations and result.

    Raises:
        BackendError: a field is out of range.
    """

    size: int
    input: str
    family: ClassVar[str] = "hadamard"
    entry: ClassVar[str] = "hadamard"

    def __post_init__(self) -> None:
        if self.size not in [1 << power for power in range(1, 13)] or self.input not in _TYPES:
            raise BackendError(f"{self} is not supported: size is a power of two, 2…4096.")

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        return f"hadamard-{self.size}-{self.input}"

    @property
    def steps(self) -> list[int]:
        """Distances of the channels that are added in every step."""
        return [1 << power for power in range(self.size.bit_length() - 1)]

    def arguments(self) -> list[Argument]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        value = f"*{_TYPES[self.input]}"
        return [
            Argument("x_ptr", value, f"[parts, {self.size}]"),
            Argument("y_ptr", value, f"[parts, {self.size}]"),
            Argument("parts", "i32", ""),
        ]

    def context(self) -> dict[str, Any]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        return {}
