"""Kernels for codes that index a table: every form against its reference, and selected for a whole model."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxcompress
from fxcompress.backends.cpu.codebook import (
    CodebookDense,
    CodebookEmbedding,
    CodebookLinear,
    codebook_layout,
    pack_columns,
)
from fxcompress.backends.cpu.codebook_form import CodebookForm
from fxcompress.backends.cpu.isa import (
    AVX2,
    AVX512_VNNI,
    ISAS,
    NEON,
    PORTABLE,
    Isa,
    best_isa,
    processor_flags,
)
from fxcompress.backends.cpu.kernel_types import LinearSpec
from fxcompress.backends.cpu.toolchain import BASE_FLAGS, find_compiler
from fxcompress.errors import BackendError
from fxcompress.formats import CodebookFormat, pack_codes
from fxcompress.formats.codebook import largest_magnitudes
from fxcompress.forms import CodebookWeight
from tests.backends.kernel_cases import TOLERANCE, error
from tests.passes.models import Attention
from tests.zoo import entry

BEST = best_isa(processor_flags())
X86 = bool(processor_flags() & {"sse2"})
CASES = [  # bits, table per row, group (None: no scales), dtype
    (4, False, 64, torch.float32),
    (4, True, None, torch.bfloat16),
    (3, True, None, torch.float32),
    (2, False, 24, torch.float16),
    (5, True, 40, torch.float32),
    (6, False, 0, torch.float32),
    (7, True, None, torch.float32),
    (8, False, 16, torch.float32),
]


def random_term(rows: int, columns: int, case: tuple[Any, ...], seed: int = 0) -> CodebookWeight:
    bits, per_row, group, _ = case
    generator = torch.Generator().manual_seed(seed)
    group = group if group is None or group <= columns else 0
    fmt = CodebookFormat(bits, group, per_row)
    table = torch.randn(fmt.table_shape(1, rows), generator=generator).to(fmt.table_dtype)
    codes = torch.randint(0, 1 << bits, (1, rows, columns), dtype=torch.uint8, generator=generator)
    scale = None
    if group is not None:
        scale = largest_magnitudes(torch.randn(1, rows, columns, generator=generator), fmt)
    packed = pack_codes(codes, bits)
    return CodebookWeight(bits, group or 0, (rows, columns), (0, 1), 0, 1, packed, table, scale)


def spec_of(term: CodebookWeight, dtype: torch.dtype, rows: int | None = None) -> LinearSpec:
    table = "rows" if term.per_row else "shared"
    sizes = rows or term.shape[0], term.shape[1]
    return LinearSpec(term.bits, True, term.group_size, *sizes, None, None, dtype, table=table)


def call(isa: Isa, terms: list[CodebookWeight], x: Tensor, bias: Tensor | None = None) -> Tensor:
    spec = spec_of(terms[0], x.dtype, sum(term.shape[0] for term in terms))
    kernel = CodebookLinear(isa)
    assert kernel.refuses(spec) is None
    return kernel.run(x, None, codebook_layout(isa).pack(terms), spec, bias)


def reference(term: CodebookWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.double(), term.dense(torch.float64), None if bias is None else bias.double())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form(case: tuple[Any, ...]) -> None:
    dtype = case[3]

    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(1, 70),
        st.integers(1, 200),
        st.sampled_from([1, 2, 3, 4, 5, 6, 7, 13, 40]),
        st.booleans(),
        st.integers(0, 99),
    )
    def run(rows: int, columns: int, tokens: int, biased: bool, seed: int) -> None:
        term = random_term(rows, columns, case, seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator) if biased else None
        expected = reference(term, x, bias)
        # Sums cancel: rounding is relative to what is summed.
        size = (x.double().abs() @ term.dense(torch.float64).abs().T).norm()
        found = (call(BEST, [term], x, bias).double() - expected).norm()
        assert found <= TOLERANCE[dtype] * (size + expected.norm())

    run()


@pytest.mark.parametrize(
    "isa", [isa for isa in (AVX2, PORTABLE) if isa.needs <= processor_flags()], ids=lambda isa: isa.name
)
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_other_instruction_sets(case: tuple[Any, ...], isa: Isa) -> None:
    for rows, columns, tokens in [(1, 1, 1), (17, 70, 3), (33, 128, 9), (16, 100, 4)]:
        term, x = random_term(rows, columns, case), torch.randn(tokens, columns)
        bias = torch.randn(rows)
        assert error(call(isa, [term], x, bias), reference(term, x, bias)) < 3e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_by_index_are_exact(case: tuple[Any, ...]) -> None:
    term, dtype = random_term(50, 203, case), case[3]
    spec, kernel = spec_of(term, dtype), CodebookEmbedding(BEST)
    assert kernel.refuses(spec) is None
    packed = codebook_layout(BEST).pack([term])
    dense = term.dense(dtype)
    for indices in (torch.randint(0, 50, (3, 7)), torch.arange(50), torch.tensor([49], dtype=torch.int32)):
        assert torch.equal(kernel.run(indices, packed, spec), dense[indices.long()])
    with pytest.raises((RuntimeError, IndexError), match="outside"):
        kernel.run(torch.tensor([50]), packed, spec)


def test_many_rows_with_bfloat16_products() -> None:
    term = random_term(50, 203, CASES[0])
    spec, kernel = spec_of(term, torch.float32), CodebookDense(BEST)
    assert kernel.refuses(spec) is None
    x = torch.randn(2, 20, 203)
    y = kernel.run(x, None, codebook_layout(BEST).pack([term]), spec, torch.ones(50))
    assert error(y, reference(term, x, torch.ones(50))) < 6e-3


def test_siblings_threads_strides_and_faults() -> None:
    one, two = random_term(600, 260, CASES[2], 1), random_term(500, 260, CASES[2], 2)
    for tokens in (1, 40):
        x = torch.randn(tokens, 260)
        expected = torch.cat([reference(one, x), reference(two, x)], dim=1)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call(BEST, [one, two], x))
        assert error(results[0], expected) < 3e-6
        assert all(torch.equal(result, results[0]) for result in results)
    wide = torch.randn(4, 5, 520)
    for x in (wide[:, :, :260], wide[:, :, ::2], wide[:0, :, :260], wide.transpose(0, 1)[:, :, :260]):
        y = call(BEST, [one], x)
        assert y.shape == (*x.shape[:-1], 600)
        assert y.numel() == 0 or error(y, reference(one, x.contiguous())) < 3e-6
    for tokens in (3, 12):
        x = torch.randn(tokens, 260)
        x[1, 5] = float("nan")
        y = call(BEST, [one], x)
        assert not y[1].isfinite().any()
        assert y[[0, *range(2, tokens)]].isfinite().all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("lanes", [4, 16])
def test_packed_codes(bits: int, lanes: int) -> None:
    """Read codes back by the rule of templates/codebook_unpack.j2, spelled out once more here."""
    rows, columns, group = 16, 45, 20
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    packed = pack_columns(codes, bits, group, lanes).numpy()
    per_group = -(-group // lanes)
    for n in range(0, rows, 3):
        for k in range(columns):
            chunk, lane = k // group * per_group + k % group // lanes, k % group % lanes
            number, bit, start = 0, 0, 0
            for width in (4, 2, 1):
                for _ in range(bits // 4 if width == 4 else bits % (2 * width) // width):
                    part = packed[n // 8, chunk, start + lane * width : start + (lane + 1) * width]
                    number |= int.from_bytes(part.tobytes(), "little") << bit
                    bit, start = bit + 8 * width, start + lanes * width
            assert number >> (bits * (n % 8)) & ((1 << bits) - 1) == codes[n, k]


def forms() -> list[CodebookForm]:
    dtypes = ("float32", "bfloat16", "float16")
    return [
        CodebookForm(kind, bits, per_row, grouped, dtype, dtype)
        for kind in ("codebook-linear", "codebook-rows")
        for bits in range(2, 9)
        for per_row in (False, True)
        for grouped in (False, True)
        for dtype in dtypes
    ]


def test_numbers_and_titles_are_unique() -> None:
    assert len({form.title for form in forms()}) == len(forms())
    numbers = {form.number(isa) for form in forms() for isa in ISAS.values()}
    assert len(numbers) == len(forms()) * len(ISAS)
    with pytest.raises(BackendError, match="bits=1, input='int8'"):
        CodebookForm("codebook-linear", 1, False, False, "int8", "float32")


@pytest.mark.parametrize("isa", ISAS.values(), ids=lambda isa: isa.name)
def test_every_source_renders_and_compiles(isa: Isa, tmp_path: Path) -> None:
    for form in forms():
        source = form.render(isa)
        assert source.startswith(f"// {form.title}\n// instruction set: {isa.name};")
        assert "{{" not in source
        assert "{%" not in source
    compiler = find_compiler()
    for form in forms()[7::23] if X86 and isa is not NEON else []:
        path = tmp_path / "kernel.cpp"
        path.write_text(form.render(isa))
        flags = [flag for flag in (*BASE_FLAGS, *compiler.openmp, *isa.flags) if flag != "-shared"]
        command = [*compiler.command, *flags, "-O1", "-Wall", "-Wextra", "-fsyntax-only", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "warning" not in result.stderr, result.stderr


@pytest.mark.skipif(not X86, reason="x86 instructions")
def test_values_are_selected_in_registers(tmp_path: Path) -> None:
    compiler = find_compiler()
    for isa, expected in ((AVX512_VNNI, "vpermps"), (AVX2, "vpermps")):
        path = tmp_path / "kernel.cpp"
        path.write_text(CodebookForm("codebook-linear", 4, True, False, "float32", "float32").render(isa))
        flags = [flag for flag in (*BASE_FLAGS, *isa.flags) if flag != "-shared"]
        command = [*compiler.command, *flags, "-S", str(path), "-o", str(tmp_path / "kernel.s")]
        subprocess.run(command, capture_output=True, check=True)
        text = (tmp_path / "kernel.s").read_text()
        assert expected in text
        assert "gather" not in text


X = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0))
LEARNED = {"quantize-codebook": {"table": "kmeans", "bits": 3, "weighting": "second-moment"}}


@pytest.mark.parametrize(
    ("recipe", "kernel"),
    [
        ([{"quantize-codebook": {"group_size": 8}}, "fuse-siblings"], "t4g-float32-float32"),
        ([LEARNED, "quantize-activations", "fuse-siblings"], "t3r-float32-float32"),
    ],
    ids=["nf4", "kmeans with quantized activations"],
)
def test_selected_for_a_model(recipe: Any, kernel: str) -> None:
    torch._dynamo.reset()
    small = fxcompress.compress(
        Attention().eval(), recipe, [(X,)], example_inputs=(X,), progress=False, verify="off"
    )
    compiled = small(X)
    kernels = {text.partition(", ")[0] for text in small.explain().values()}  # a residual may follow
    assert kernels == {f"generated {BEST.name} {kernel}"}
    small.set_backend("eager")
    torch.testing.assert_close(compiled, small(X), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_tied_table_is_looked_up_and_multiplied() -> None:
    torch._dynamo.reset()
    model = entry("llama-tied-odd")
    recipe = [{"quantize-codebook": {"heads": True}}, "fuse-siblings"]
    small = fxcompress.compress(model.build(), recipe, verify="off", progress=False)
    ids = model.tensors(1, 5)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    compiled = small.generate(input_ids=ids, **options)
    assert all("t4" in text for text in small.explain().values())
    packed = [{ref.name for ref in refs} for _, refs in small._store._packed]
    assert sum("model.embed_tokens.weight" in names for names in packed) == 1  # look-up and head share it
    small.set_backend("eager")
    assert torch.equal(compiled, small.generate(input_ids=ids, **options))
    torch._dynamo.reset()
