"""What the source of a product kernel depends on, besides tile sizes: the form of weight and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fxcompress.backends.triton.generator import Argument, interpreted
from fxcompress.errors import BackendError

DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
"""Dtypes of activations that kernels take → Triton's names."""
VALUES = ("int", "table", "row-table", "e4m3", "e5m2", "e2m1")
SCALES = ("none", "row", "group")
SCALE_DTYPES = {"float32": "*fp32", "bfloat16": "*bf16", "e8m0": "*u8", "e4m3": "*u8"}
"""Dtypes of scales; the last two are the block scales of MX and NVFP4 formats."""
ACTIVATIONS = (None, "int8")
STORED_BITS = {2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Width of a code → width it is stored with."""
_CODE_BITS = {"e4m3": (8,), "e5m2": (8,), "e2m1": (4,)}


@dataclass(frozen=True)
class LinearForm:
    """A product with a weight of packed codes: ``y = x·Wᵀ``.

    Args:
        values: What a code stands for: ``"int"`` (code − zero), ``"table"`` (an entry of one table),
            ``"row-table"`` (of a table per row), or a float: ``"e4m3"``, ``"e5m2"``, ``"e2m1"``.
        bits: Width of a code, 2…8.
        zero: Whether zero-points are stored; else they are ``2**(bits-1)``.
        scale: ``"row"``, ``"group"`` or ``"none"``.
        group: Inputs that share a scale; 0 unless grouped.
        scale_dtype: ``"float32"``, ``"bfloat16"``, ``"e8m0"`` (MX) or ``"e4m3"`` (NVFP4).
        input: Dtype of activations and result: ``"float16"`` or ``"bfloat16"``.
        activation: ``"int8"``: activations come as codes with a scale per token; None: as they are.
        bias: Whether a bias is added.
        outliers: Whether columns in full precision are added, gathered from the activations.
        rank: Columns of low-rank factors that are added, rounded up to a power of two from 16; 0 = none.

    Raises:
        BackendError: a field is out of range, or the fields exclude each other.
    """

    values: str
    bits: int
    zero: bool
    scale: str
    group: int
    scale_dtype: str
    input: str
    activation: str | None = None
    bias: bool = False
    outliers: bool = False
    rank: int = 0
    family: ClassVar[str] = "linear"
    entry: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        grouped, integers = self.scale == "group", self.activation is not None
        checks = {
            f"values={self.values!r}": self.values in VALUES,
            f"bits={self.bits}": self.bits in _CODE_BITS.get(self.values, STORED_BITS),
            f"zero={self.zero} with values={self.values!r}": self.values == "int" or not self.zero,
            f"scale={self.scale!r}": self.scale in SCALES,
            f"group={self.group} with scale={self.scale!r}": self.group > 0 if grouped else self.group == 0,
            f"scale_dtype={self.scale_dtype!r}": self.scale_dtype in SCALE_DTYPES,
            f"input={self.input!r}": self.input in DTYPES,
            f"activation={self.activation!r}": self.activation in ACTIVATIONS,
            f"activation={self.activation!r} with values={self.values!r}": not integers
            or (self.values == "int" and self.bits < 8),
            f"group={self.group} with activation={self.activation!r}": not integers or self.group % 32 == 0,
            f"rank={self.rank}": self.rank == 0 or self.rank in (16, 32, 64, 128),
            "outliers or factors beside quantized activations": not (
                integers and (self.rank or self.outliers)
            ),
        }
        wrong = [text for text, good in checks.items() if not good]
        if wrong:
            raise BackendError(f"LinearForm: {', '.join(wrong)} is not supported.")

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        kind = {"int": "w", "table": "t", "row-table": "rt"}.get(self.values, self.values + "-")
        weight = f"{kind}{self.bits}{'z' if self.zero else ''}"
        scale = {"none": "", "row": "r", "group": f"g{self.group}"}[self.scale]
        dtype = "" if self.scale == "none" else f"-{self.scale_dtype}"
        extras = ("-bias" if self.bias else "") + ("-outliers" if self.outliers else "")
        factors = f"-rank{self.rank}" if self.rank else ""
        return f"{self.family}-{weight}{scale}{dtype}-a{self.activation or ''}-{self.input}{extras}{factors}"

    @property
    def stored_bits(self) -> int:
        """Width of a code in memory."""
        return STORED_BITS[self.bits]

    @property
    def word(self) -> int:
        """Bits of a word: so many that a chunk has at most eight planes."""
        widths = {2: 8, 3: 8, 4: 16} if self.activation else {2: 16, 3: 8, 4: 32, 8: 32}
        return widths[self.stored_bits]

    @property
    def step(self) -> int:
        """Consecutive inputs of one plane: the depth of one matrix instruction."""
        return 32 if self.activation else 16

    @property
    def chunk(self) -> int:
        """Inputs of one chunk of words."""
        return self.step * (self.word if self.stored_bits == 3 else self.word // self.stored_bits)

    @property
    def words(self) -> int:
        """Words of a chunk per output and place: 1, and 3 for codes of 3 bits."""
        return 3 if self.stored_bits == 3 else 1

    @property
    def pairs(self) -> int:
        """Pairs of neighbouring planes in a word; they are decoded together."""
        return self.word // 4 if self.stored_bits == 3 else self.word // self.stored_bits // 2

    @property
    def scale_place(self) -> str:
        """Where scales are applied.

        ``"end"``, or once per ``"chunk"``, ``"pair"`` of planes, ``"plane"``, or ``"element"``.
        """
        if self.scale != "group":
            return "end"
        places = {"chunk": self.chunk, "pair": 2 * self.step, "plane": self.step}
        return next((place for place, size in places.items() if self.group % size == 0), "element")

    @property
    def factor(self) -> float:
        """What decoded values must still be multiplied with, a power of two."""
        return {"e4m3": 256.0, "e2m1": 16384.0}.get(self.values, 1.0)

    @property
    def tensor_scaled(self) -> bool:
        """Whether one more scale belongs to the whole weight (NVFP4)."""
        return self.scale_dtype == "e4m3" and self.scale != "none"

    def arguments(self) -> list[Argument]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        value = DTYPES[self.input]
        found = [
            Argument("x_ptr", "*i8" if self.activation else f"*{value}", "[M, K]"),
            Argument("words_ptr", f"*i{self.word}", f"[chunks · {self.words * self.step}, N]"),
        ]
        if self.scale != "none":
            found.append(
                Argument("scale_ptr", SCALE_DTYPES[self.scale_dtype], f"[groups, N] {self.scale_dtype}")
            )
        if self.tensor_scaled:
            found.append(Argument("tensor_scale_ptr", "*fp32", "[1], of the whole weight"))
        if self.zero:
            found.append(Argument("zero_ptr", "*u8", "[groups, N]"))
        if self.values == "table":
            found.append(Argument("table_ptr", "*fp32", f"[{1 << self.bits}]"))
        if self.values == "row-table":
            found.append(Argument("table_ptr", "*bf16", f"[N, {1 << self.bits}]"))
        if self.activation:
            found.append(Argument("x_scale_ptr", "*fp32", "[M]"))
        if self.bias:
            found.append(Argument("bias_ptr", f"*{value}", "[N]"))
        if self.outliers:
            found.append(Argument("columns_ptr", "*i64", "[outliers], inputs they are"))
            found.append(Argument("values_ptr", f"*{value}", "[N, outliers]"))
        if self.rank:
            found.append(Argument("v_ptr", f"*{value}", "[rank, K]"))
            found.append(Argument("u_ptr", f"*{value}", "[N, rank]"))
        found.append(Argument("y_ptr", f"*{value}", "[M, N]; where SPLITS > 1, parts [SPLITS, M, N] float32"))
        found += [Argument(name, "i32", "") for name in ("M", "N", "K", "chunks", "groups")]
        found += [Argument("outliers", "i32", "")] if self.outliers else []
        found += [Argument("rank", "i32", "")] if self.rank else []
        return found

    def context(self) -> dict[str, Any]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        place = self.scale_place
        return {
            "dtype": DTYPES[self.input],
            "type": f"tl.{self.input}",
            "integers": self.activation is not None,
            "place_of_scale": place,
            "total": "part" if place == "chunk" else "acc",
            # Triton's interpreter multiplies the bits of bfloat16: it is given the same values in float32.
            "operand": ".to(tl.float32)"
            if interpreted() and self.input == "bfloat16" and not self.activation
            else "",
            "tensor_scale": " * tl.load(tensor_scale_ptr)" if self.tensor_scaled else "",
        }


@dataclass(frozen=True)
class ReduceForm:
    """The sum of the parts of a split product.

    Args:
        input: Dtype of the result.
        bias: Whether a bias is added.
    """

    input: str
    bias: bool
    family: ClassVar[str] = "reduce"
    entry: ClassVar[str] = "reduce"

    @property
    def title(self) -> str:
        """A short name, unique per form."""
        return f"reduce-{self.input}{'-bias' if self.bias else ''}"

    def arguments(self) -> list[Argument]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        value = DTYPES[self.input]
        found = [Argument("part_ptr", "*fp32", "[splits, M, N]")]
        found += [Argument("bias_ptr", f"*{value}", "[N]")] if self.bias else []
        found.append(Argument("y_ptr", f"*{value}", "[M, N]"))
        found += [Argument("N", "i32", ""), Argument("splits", "i32", "")]
        return [*found, Argument("size", "i64", "M · N")]

    def context(self) -> dict[str, Any]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        return {}


@dataclass(frozen=True)
class GemvForm(LinearForm):
    """The same for a single row of float activations: no matrix instructions, sums in registers."""

    family: ClassVar[str] = "gemv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation or self.rank or self.outliers:
            raise BackendError("GemvForm: only float activations and a single term are supported.")
