"""Triton kernels compiled for devices that need not be there: resources, matrix instructions, offsets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from fxcompress.backends.cpu.cached_form import HalfForm
from fxcompress.backends.triton.bytes_form import BytesForm
from fxcompress.backends.triton.cache_form import AttendForm, WriteForm, merge_arguments
from fxcompress.backends.triton.compilation import CompiledKernel, compile_kernel
from fxcompress.backends.triton.generator import interpreted
from fxcompress.backends.triton.linear_form import LinearForm, ReduceForm, UnpackForm
from fxcompress.backends.triton.row_forms import HadamardForm, QuantizeForm
from fxcompress.backends.triton.sparse_form import SparseForm

MOST_REGISTERS = 255
MOST_STACK = 16  # bytes per thread: a spilled register or two outside of the loops
SHARED = {80: 163 << 10, 90: 227 << 10}


class Variant(NamedTuple):
    form: Any
    constants: dict[str, Any]
    capabilities: tuple[int, ...]
    matrix: str = "mma"  # "", "mma", or "wgmma": asynchronous ones where there are any
    warps: int = 4
    stages: int = 3
    aligned: bool = True


BOTH = (80, 90)
SMALL = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLITS": 1, "SCALE_WEIGHT": False}
SPLIT = {**SMALL, "SPLITS": 4}
DEEP = {**SMALL, "BLOCK_K": 128}
LARGE = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "SPLITS": 1, "SCALE_WEIGHT": True}
WHOLE = {"BLOCK_N": 64, "BLOCK_K": 128, "SCALE_WEIGHT": True, "STEPS": 4}
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8}
HALF_C = HalfForm(4, "channel", 64, 0, 64, 0, False)
HALF_T = HalfForm(4, "token", 0, 0, 1, 0, False)
HALF_G = HalfForm(2, "token", 32, 32, 1, 4, True)
HALF_8 = HalfForm(8, "token", 0, 16, 1, 4, True)


def linear(*fields: Any, **more: Any) -> LinearForm:
    return LinearForm(*fields, **more)


VARIANTS = (
    # W4A16: one scale per block, after and before the product; per step of 16 inputs, element and row.
    Variant(linear("int", 4, True, "group", 128, "bfloat16", "float16"), SMALL, BOTH),
    Variant(linear("int", 4, True, "group", 128, "bfloat16", "float16"), LARGE, BOTH, "wgmma"),
    Variant(linear("int", 4, True, "group", 64, "bfloat16", "bfloat16", bias=True), SMALL, (80,)),
    Variant(linear("int", 4, False, "group", 48, "bfloat16", "float16"), SMALL, (90,), stages=2),
    Variant(linear("int", 4, True, "group", 20, "bfloat16", "float16"), SMALL, (80,), stages=2),
    Variant(linear("int", 4, False, "row", 0, "float32", "float16"), SPLIT, (90,), aligned=False),
    # Other widths and values.
    Variant(linear("int", 2, True, "group", 128, "bfloat16", "float16"), DEEP, (90,)),
    Variant(linear("int", 3, True, "group", 128, "bfloat16", "bfloat16"), DEEP, (80,)),
    Variant(linear("int", 8, True, "group", 128, "bfloat16", "bfloat16"), SMALL, (90,)),
    Variant(linear("table", 4, False, "group", 64, "bfloat16", "bfloat16"), SMALL, (90,), stages=2),
    Variant(linear("row-table", 3, False, "none", 0, "float32", "float16"), DEEP, (80,), stages=2),
    Variant(linear("e4m3", 8, False, "row", 0, "float32", "bfloat16"), SMALL, (90,)),
    Variant(linear("e5m2", 8, False, "group", 32, "e8m0", "float16"), SMALL, (80,)),
    Variant(linear("e2m1", 4, False, "group", 32, "e8m0", "bfloat16"), SMALL, (80,), stages=2),
    Variant(linear("e2m1", 4, False, "group", 16, "e4m3", "float16"), SMALL, (90,), stages=2),
    # Second terms in the same kernel.
    Variant(linear("int", 4, True, "group", 128, "bfloat16", "float16", outliers=True), SMALL, (90,)),
    Variant(linear("int", 4, True, "group", 128, "bfloat16", "bfloat16", rank=32), SMALL, (80,), stages=2),
    # W4A8 and its relatives; weights unpacked for many rows; the sum of a split product.
    Variant(
        linear("int", 4, False, "group", 128, "bfloat16", "float16", "int8"), {**LARGE, "BLOCK_N": 64}, BOTH
    ),
    Variant(linear("int", 3, True, "group", 32, "bfloat16", "float16", "int8"), DEEP, (80,), stages=2),
    Variant(linear("int", 2, True, "row", 0, "float32", "bfloat16", "int8"), DEEP, (90,)),
    Variant(UnpackForm("int", 4, True, "group", 128, "bfloat16", "bfloat16"), WHOLE, BOTH, ""),
    Variant(UnpackForm("int", 3, False, "group", 32, "bfloat16", "float16", "int8"), WHOLE, (90,), ""),
    Variant(UnpackForm("e2m1", 4, False, "group", 16, "e4m3", "bfloat16"), WHOLE, (80,), ""),
    Variant(ReduceForm("float16", True), {"BLOCK": 1024}, BOTH, ""),
    # Bytes: integers and 8-bit floats, per token × per channel and in blocks.
    Variant(BytesForm("int8", False, 1, 0, 0, "bfloat16"), TILE, BOTH, "wgmma"),
    Variant(BytesForm("int8", True, 1, 128, 0, "float16", True), TILE, (80,)),
    Variant(BytesForm("e4m3", False, 1, 0, 0, "bfloat16"), TILE, (90,), "wgmma"),
    Variant(BytesForm("e4m3", False, 128, 128, 128, "bfloat16"), {**TILE, "BLOCK_K": 128}, (90,), "wgmma"),
    Variant(BytesForm("e4m3", False, 1, 0, 0, "bfloat16", emulated=True), TILE, (80,)),
    Variant(BytesForm("e5m2", False, 128, 128, 0, "float16", emulated=True), TILE, (80,)),
    # 2:4.
    *(
        Variant(form, {"BLOCK_M": 16, "BLOCK_N": 64, "SPLITS": 1}, where, stages=2)
        for form, where in (
            (SparseForm(16, False, 0, "float16"), (90,)),
            (SparseForm(4, True, 128, "bfloat16"), (90,)),
            (SparseForm(8, False, 0, "float16", True), (80,)),
        )
    ),
    # Rows.
    Variant(QuantizeForm("rms-norm", "int8", 8, "bfloat16"), {"BLOCK": 4096}, BOTH, "", 8, 1),
    Variant(QuantizeForm("layer-norm", "e5m2", 8, "float16"), {"BLOCK": 4096}, (90,), "", 8, 1),
    Variant(QuantizeForm("gate", "e4m3", 8, "bfloat16"), {"BLOCK": 4096}, BOTH, "", 8, 1),
    Variant(HadamardForm(128, "bfloat16"), {"BLOCK": 32}, (80,), "", 4, 1),
    # Caches.
    Variant(
        AttendForm(HALF_C, HALF_T, 128, 128, "float16", None), {"ROWS": 16, "SPLITS": 8}, BOTH, "mma", 4, 2
    ),
    Variant(
        AttendForm(HALF_G, HALF_8, 128, 96, "bfloat16", "bool"), {"ROWS": 16, "SPLITS": 8}, (80,), "mma", 4, 1
    ),
    Variant(WriteForm(HALF_C, 128, "float16"), {}, (80,), "", 4, 1),
    Variant(WriteForm(HALF_G, 128, "bfloat16"), {}, (90,), "", 4, 1),
)
CASES = [(variant, capability) for variant in VARIANTS for capability in variant.capabilities]


@pytest.fixture(scope="module", autouse=True)
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        patch.setenv("FXCOMPRESS_CACHE_DIR", str(folder / "sources"))
        assert not interpreted()
        yield


def name(value: Any) -> str:
    if isinstance(value, Variant):
        return f"{value.form.title}-{'x'.join(str(v) for v in value.constants.values())}"
    return str(value)


@pytest.mark.parametrize(("variant", "capability"), CASES, ids=name)
def test_compiles_within_limits(variant: Variant, capability: int) -> None:
    found = compile_kernel(
        variant.form,
        variant.constants,
        capability,
        warps=variant.warps,
        stages=variant.stages,
        aligned=variant.aligned,
    )
    assert found.registers <= MOST_REGISTERS
    assert found.stack <= MOST_STACK, "registers are spilled"
    assert found.shared <= SHARED[capability]
    if variant.matrix:
        assert found.uses_tensor_cores
    if variant.matrix == "wgmma":
        assert found.uses_wgmma == (capability == 90)
    if not isinstance(variant.form, ReduceForm):
        assert_wide_offsets(found)


def assert_wide_offsets(found: CompiledKernel) -> None:
    """What a program's number is multiplied with has 64 bits, so that no tensor is too large."""
    assert "arith.extsi" in found.ttir
    wide = [line for line in found.ttir.splitlines() if "arith.muli" in line and ": i64" in line]
    assert wide, "no product of 64 bits moves a pointer"


@pytest.mark.parametrize("capability", BOTH)
def test_other_kernels_of_a_source_compile(capability: int) -> None:
    form = AttendForm(HALF_G, HALF_8, 128, 96, "bfloat16", "bool")
    constants = {"ROWS": 16, "SPLITS": 8, "PADDED": 16}
    merge = compile_kernel(form, constants, capability, entry="merge", arguments=merge_arguments(form))
    assert merge.stack <= MOST_STACK
    keep = compile_kernel(WriteForm(HALF_G, 128, "bfloat16"), {"TOKENS": 16}, capability, entry="keep")
    assert keep.stack <= MOST_STACK


def test_matrix_instructions_take_the_operands_they_should() -> None:
    eight = compile_kernel(BytesForm("e4m3", False, 1, 0, 0, "bfloat16"), TILE, 90)
    assert ".e4m3.e4m3" in eight.ptx
    wide = compile_kernel(BytesForm("e4m3", False, 1, 0, 0, "bfloat16", emulated=True), TILE, 80)
    assert ".f16.f16" in wide.ptx
    integers = compile_kernel(BytesForm("int8", False, 1, 0, 0, "bfloat16"), TILE, 80)
    assert ".s8.s8.s32" in integers.ptx
    narrow = compile_kernel(linear("int", 4, False, "group", 128, "bfloat16", "float16", "int8"), SMALL, 80)
    assert ".f16.f16" in narrow.ptx  # both kinds of codes are exact in float16


def test_two_codes_are_decoded_by_a_mask_and_an_addition() -> None:
    for dtype, addition in (("bfloat16", "fma.rn.bf16x2"), ("float16", "add.rn.f16x2")):
        form = linear("int", 4, True, "group", 128, "bfloat16", dtype)
        found = compile_kernel(form, SMALL, 90)
        pairs = SMALL["BLOCK_N"] * SMALL["BLOCK_K"] // 2 // 128  # of a thread
        assert found.ptx.count(addition) == pairs


def test_codes_stay_in_the_threads_that_multiply_them() -> None:
    """Between the words and the matrix instructions nothing goes through shared memory."""
    for form in (
        linear("int", 4, True, "group", 128, "bfloat16", "bfloat16"),
        linear("int", 2, False, "row", 0, "float32", "float16"),
        linear("int", 8, False, "row", 0, "float32", "float16"),
    ):
        block = {"BLOCK_K": form.block_k[-1], "BLOCK_N": 128}
        found = compile_kernel(form, {**SMALL, **block}, 90, warps=2)
        inside = found.ptx[found.ptx.index("mma.sync") :]
        assert "st.shared" not in inside[: inside.rindex("mma.sync")]


def test_a_tensor_of_more_elements_than_32_bits_has_wide_sizes() -> None:
    narrow = ReduceForm("float16", False)
    found = compile_kernel(narrow, {"BLOCK": 1024}, 80)
    assert "i64" in found.ttir
    assert [argument.kind for argument in narrow.arguments()][-1] == "i64"
