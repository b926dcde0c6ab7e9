"""Sources and instruction sets: what is generated, for whom, and that foreign code compiles."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fxcompress.backends.cpu import isa as isa_module
from fxcompress.backends.cpu.generator import (
    DTYPES,
    GROUP_SHIFT,
    AnyForm,
    AttentionForm,
    KernelForm,
    flush_steps,
    output_dtype,
    render,
)
from fxcompress.backends.cpu.isa import (
    AVX2,
    AVX512_VNNI,
    AVX_VNNI,
    ISAS,
    NEON,
    PORTABLE,
    best_isa,
    machine_isa,
    processor_flags,
)
from fxcompress.backends.cpu.tiled import pack_tiles
from fxcompress.backends.cpu.toolchain import BASE_FLAGS, find_compiler
from fxcompress.errors import BackendError

W4A8 = KernelForm("linear", 4, True, True, "dynamic", 8, "float32", "float32")
X86 = bool(processor_flags() & {"sse2"})


def all_forms() -> list[AnyForm]:
    activations = [(None, 0), ("dynamic", 8), ("static", 8), ("dynamic", 4)]
    flags = [False, True]
    dtypes = ["float32", "bfloat16", "float16"]
    linear = [
        KernelForm("linear", bits, zero, grouped, *activation, dtype, dtype)
        for bits, zero, grouped, activation, dtype in itertools.product(
            range(2, 9), flags, flags, activations, dtypes
        )
    ]
    others = [
        KernelForm(kind, bits, zero, grouped, None, 0, dtype, dtype)
        for kind, bits, zero, grouped, dtype in itertools.product(
            ["embedding", "dense"], range(2, 9), flags, flags, dtypes
        )
    ]
    wide = [dataclasses.replace(form, kind="linear-bfloat16") for form in linear if form.activation is None]
    return [*linear, *wide, *others, *map(AttentionForm, dtypes)]


def test_numbers_tell_group_and_dtype() -> None:
    for form in [form for form in all_forms() if isinstance(form, KernelForm)][::5]:
        number = form.call_number(AVX2, 32768)
        assert number >> GROUP_SHIFT == 32768
        assert number & ((1 << GROUP_SHIFT) - 1) == form.number(AVX2)
        assert number < 2**63
        assert DTYPES[output_dtype(number)] == form.output


def test_numbers_and_titles_are_unique() -> None:
    forms = all_forms()
    assert len({form.title for form in forms}) == len(forms)
    numbers = {form.number(isa) for form in forms for isa in ISAS.values()}
    assert len(numbers) == len(forms) * len(ISAS)
    assert max(numbers) < 1 << GROUP_SHIFT


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
def test_every_source_renders_and_says_what_it_is(isa: isa_module.Isa) -> None:
    for form in [form for form in all_forms() if isinstance(form, KernelForm)][::7]:
        if form.kind == "linear-bfloat16" and not isa.bfloat16_flags:
            with pytest.raises(BackendError, match=f"no bfloat16 products with {isa.name}"):
                render(form, isa)
            continue
        source = render(form, isa)
        assert source.startswith(f"// {form.title}\n// instruction set: {isa.name};")
        assert f"weight:      {form.bits} bits" in source
        assert "{{" not in source
        assert "{%" not in source


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
def test_attention_renders_and_compiles_for_every_set(isa: isa_module.Isa, tmp_path: Path) -> None:
    for dtype in DTYPES.values():
        form = AttentionForm(dtype)
        source = form.render(isa)
        assert source.startswith(f"// {form.title}\n// instruction set: {isa.name};")
        assert "{{" not in source
        assert "{%" not in source
        if X86 and isa is not NEON:
            assert "fx_run" in assembly(form, isa, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits=9"),
        ({"kind": "conv"}, "kind='conv'"),
        ({"activation": "magic"}, "activation='magic'"),
        ({"activation": None}, "activation_bits=8 with activation=None"),
        ({"kind": "linear-bfloat16"}, "activation='dynamic' with kind='linear-bfloat16'"),
        ({"input": "float64"}, "input='float64'"),
        ({"output": "int8"}, "output='int8'"),
    ],
)
def test_forms_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        KernelForm(**{**vars(W4A8), **change})


@pytest.mark.parametrize("bits", range(2, 9))
def test_narrow_sums_are_widened_in_time(bits: int) -> None:
    steps = flush_steps(bits, AVX2)
    largest = 15 if bits == 8 else (1 << bits) - 1
    assert steps >= 1
    assert steps * 2 * largest * 128 <= 32767
    assert flush_steps(bits, AVX512_VNNI) > 4096


def assembly(form: AnyForm, isa: isa_module.Isa, folder: Path) -> str:
    compiler = find_compiler()
    source = folder / "kernel.cpp"
    source.write_text(form.render(isa))
    flags = [flag for flag in (*BASE_FLAGS, *compiler.openmp, *form.flags(isa)) if flag != "-shared"]
    command = [*compiler.command, *flags, "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-S", str(source)]
    result = subprocess.run(
        [*command, "-o", str(folder / "kernel.s")], capture_output=True, text=True, check=True
    )
    assert "warning" not in result.stderr, result.stderr
    return (folder / "kernel.s").read_text()


@pytest.mark.skipif(not X86, reason="x86 instructions")
@pytest.mark.parametrize(
    ("isa", "form", "expected"),
    [
        (AVX512_VNNI, W4A8, [r"vpdpbusd", "%zmm"]),
        (AVX_VNNI, W4A8, [r"vpdpbusd", "%ymm"]),
        (AVX2, W4A8, ["vpmaddubsw", "%ymm"]),
        (
            AVX512_VNNI,
            KernelForm("linear", 3, False, False, None, 0, "bfloat16", "float16"),
            ["vpternlogd", "%zmm"],
        ),
        (
            AVX512_VNNI,
            KernelForm("linear-bfloat16", 4, True, True, None, 0, "float32", "float32"),
            ["vdpbf16ps", "%zmm"],
        ),
    ],
    ids=["avx512vnni", "avxvnni", "avx2", "avx512 floats", "avx512 bfloat16"],
)
def test_the_expected_instructions_appear(
    isa: isa_module.Isa, form: KernelForm, expected: list[str], tmp_path: Path
) -> None:
    text = assembly(form, isa, tmp_path)
    for instruction in expected:
        assert instruction in text
    if isa is not AVX2:
        assert "vpmaddubsw" not in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "fma", "f16c"}, AVX2),
        ({"avx2", "fma", "f16c", "avx_vnni"}, AVX_VNNI),
        ({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}, AVX512_VNNI),
        ({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}, AVX2),
        ({"avx2"}, PORTABLE),
        ({"asimd", "asimddp"}, NEON),
        (set(), PORTABLE),
    ],
)
def test_best_isa(flags: set[str], expected: isa_module.Isa) -> None:
    assert best_isa(frozenset(flags)) is expected


def test_isa_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_isa({"FXCOMPRESS_CPU_ISA": "portable"}) is PORTABLE
    with pytest.raises(BackendError, match="'avx3' is unknown"):
        machine_isa({"FXCOMPRESS_CPU_ISA": "avx3"})
    monkeypatch.setattr(isa_module, "_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    assert machine_isa({}) is AVX2
    with pytest.raises(BackendError, match="lacks avx512_vnni"):
        machine_isa({"FXCOMPRESS_CPU_ISA": "avx512vnni"})


@pytest.mark.parametrize("isa", [PORTABLE, AVX512_VNNI, NEON], ids=lambda isa: isa.name)
@pytest.mark.parametrize("bits", range(2, 9))
def test_tiles_hold_every_code(bits: int, isa: isa_module.Isa) -> None:
    """Read codes back by the rule of templates/unpack.j2, spelled out once more here."""
    rows, columns, group = 37, 45, 20
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    tiles = pack_tiles(codes, bits, group, isa).numpy()
    for n, k in itertools.product(range(0, rows, 5), range(columns)):
        block, lane = divmod(n, isa.block)
        chunk, place = 2 * (k // group) + (k % group) // 16, k % group % 16
        half, byte = lane // isa.lanes, lane % isa.lanes * 4 + place % 4
        vector = place // 4 * 2 + half
        if bits == 8:
            code = tiles[block, chunk, vector, byte]
        else:
            code, low, plane = 0, 0, 0
            for width in (4, 2, 1):
                if bits - low >= width:
                    count = 8 // width
                    stored = int(tiles[block, chunk, plane + vector // count, byte])
                    code |= (stored >> (vector % count * width) & ((1 << width) - 1)) << low
                    low, plane = low + width, plane + 8 // count
        assert code == codes[n, k]
