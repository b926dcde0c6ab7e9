"""What the source of a product kernel depends on, besides tile sizes: the form of weight and activations."""

from __future__ import annotations

import struct
from collections.abc import Sequence
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
BLOCKS = (64, 128)
"""Inputs a program may read at once."""
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
    chunk: ClassVar[int] = max(BLOCKS)
    """Inputs are padded to a multiple of it."""

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
    def words(self) -> int:
        """Words of a thread and span: 1; for codes of 3 bits two of their lower bits, one of the third."""
        return 3 if self.stored_bits == 3 else 1

    @property
    def span(self) -> int:
        """Inputs that four neighbouring threads hold: steps of 16, four inputs of each a thread."""
        return 128 if self.stored_bits == 3 else 128 // self.stored_bits

    @property
    def depth(self) -> int:
        """Inputs of one tile of words."""
        return 128 if self.stored_bits == 3 else 2 * self.span

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(word, shift) that bring two consecutive codes to the halves of a word, for all of one place."""
        width = 2 if self.stored_bits == 3 else self.stored_bits
        lower = range(2 if self.stored_bits == 3 else 1)
        return [(word, shift) for word in lower for shift in range(0, 16, width)]

    @property
    def scale_place(self) -> str:
        """Where scales are applied.

        ``"end"``, or once per ``"block"``, ``"step"`` of 16 inputs, or ``"element"``.
        """
        if self.scale != "group":
            return "end"
        if any(self.group % size == 0 for size in self._blocks):
            return "block"
        return "step" if self.group % 16 == 0 else "element"

    @property
    def _blocks(self) -> tuple[int, ...]:
        return tuple(size for size in BLOCKS if size % self.depth == 0)

    @property
    def block_k(self) -> tuple[int, ...]:
        """Inputs a program may read at once."""
        return tuple(size for size in self._blocks if self.scale_place != "block" or self.group % size == 0)

    @property
    def packed(self) -> bool:
        """Whether two codes are decoded into one register of two 16-bit floats."""
        narrow = self.bits < 8 or self.input == "float16"
        return self.values == "int" and narrow and self.scale_place != "element" and not interpreted()

    @property
    def nibbles(self) -> bool:
        """Whether codes of 4 bits are looked up in registers, byte by byte."""
        return self.values in ("table", "e2m1") and self.bits == 4

    @property
    def magic(self) -> int:
        """The number whose mantissa codes are put into."""
        if not self.packed:
            return 8388608 if self.values == "int" else 0
        return 1024 if self.input == "float16" else 128

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
            Argument("words_ptr", "*i32", f"[tiles of 64 outputs, tiles of {self.depth} inputs, words]"),
        ]
        if self.scale != "none":
            found.append(
                Argument("scale_ptr", SCALE_DTYPES[self.scale_dtype], f"[groups, N] {self.scale_dtype}")
            )
        if self.tensor_scaled:
            found.append(Argument("tensor_scale_ptr", "*fp32", "[1], of the whole weight"))
        if self.zero:
            found.append(Argument("zero_ptr", "*u8", "[groups, N]"))
        if self.values == "table" and self.nibbles:
            found.append(Argument("table_ptr", "*i32", "[2, 8], bytes of bfloat16 and of float16"))
        elif self.values == "table":
            found.append(Argument("table_ptr", "*fp16", f"[{1 << self.bits}]"))
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
        kind, found = f"tl.{self.input}", [f"v{i}" for i in range(len(self.pairs))]
        tables = {"int": ["offset"], "table": ["table_ptr"], "row-table": ["table_ptr", "n", "in_n"]}
        more = tables.get(self.values, [])
        levels = len(found).bit_length() - 1
        return {
            "dtype": DTYPES[self.input],
            "type": kind,
            "integers": self.activation is not None,
            "place_of_scale": self.scale_place,
            "packed": self.packed,
            "magic": self.magic,
            "last": "" if self.packed else ", 1",
            "nibbles": self.nibbles,
            "registers": self.nibbles and not interpreted(),
            "halves": [f"h{i}" for i in range(8)],
            "eight": ["word", *(f"t{i}" for i in range(8) if self.values == "table")],
            "entries": [f"${9 + i}" for i in range(8)]
            if self.values == "table"
            else _bytes_of_floats(self.input),
            "table_at": 0 if self.input == "bfloat16" else 8,
            "offset_type": kind if self.packed else "tl.float32",
            "code_mask": f"0x{(1 << self.stored_bits) - 1:04X}{(1 << self.stored_bits) - 1:04X}",
            "pairs": self.pairs,
            "pair_parameters": ["word", *more],
            "pair_arguments": ["word", *more],
            "joined": _joined(found),
            # [spans, thread, N, code of a pair, pairs' numbers bit by bit] → [spans, step, thread, pair of a
            # step, code, N]: as a matrix instruction holds its second operand, so that no code moves.
            "order": [0, *range(4, 3 + levels), 1, 3 + levels, 3, 2],
            # Codes times a scale of few bits, rounded once: as the reference does.
            "unscaled": isinstance(self, UnpackForm) and self.codes,
            "multiplies": self.input == self.scale_dtype == "bfloat16" and not interpreted(),
            # Triton's interpreter multiplies the bits of bfloat16: it is given the same values in float32.
            "operand": ".to(tl.float32)" if interpreted() and self.input == "bfloat16" else "",
            "tensor_scale": " * tl.load(tensor_scale_ptr)" if self.tensor_scaled else "",
        }


def _bytes_of_floats(dtype: str) -> list[str]:
    """Lower, then upper bytes of what codes of E2M1 stand for, less 2**14, in words of four."""
    signs, sizes = (1.0, -1.0), (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    values = [sign * size / 16384 for sign in signs for size in sizes]
    if dtype == "bfloat16":
        bits = [struct.unpack("<I", struct.pack("<f", value))[0] >> 16 for value in values]
    else:
        bits = [struct.unpack("<H", struct.pack("<e", value))[0] for value in values]
    parts = [[b >> shift & 255 for b in bits] for shift in (0, 8)]
    words = [sum(part[4 * i + j] << 8 * j for j in range(4)) for part in parts for i in range(4)]
    return [f"0x{word:08X}" for word in words]


def _joined(values: Sequence[str]) -> str:
    """Nested joins of tiles, an even number of times halved: the last dimension tells neighbours apart."""
    if len(values) == 1:
        return values[0]
    return f"tl.join({_joined(values[::2])}, {_joined(values[1::2])})"


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
class UnpackForm(LinearForm):
    """The dense weight ``[N, K]`` of packed codes, for products of many rows.

    With int8 activations the codes less their zero-points, int8; else the weight in the activations' dtype.
    """

    family: ClassVar[str] = "unpack"
    entry: ClassVar[str] = "unpack"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank or self.outliers or self.bias:
            raise BackendError("UnpackForm: only the weight itself is unpacked.")

    @property
    def codes(self) -> bool:
        """Whether codes are wanted, not the weight."""
        return self.activation is not None

    def arguments(self) -> list[Argument]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        left_out = {"x_ptr", "x_scale_ptr", "y_ptr", "M", *(("scale_ptr",) if self.codes else ())}
        found = [argument for argument in super().arguments() if argument.name not in left_out]
        place = next(i for i, argument in enumerate(found) if not argument.name.endswith("_ptr"))
        kind = "*i8" if self.codes else f"*{DTYPES[self.input]}"
        return [*found[:place], Argument("y_ptr", kind, "[N, K]"), *found[place:]]
