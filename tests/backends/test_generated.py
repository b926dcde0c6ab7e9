"""Generated kernels against the reference value of their form, run for real on this machine."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.backends.cpu.generator import MANY_ROWS, KernelForm
from fxcompress.backends.cpu.isa import ISAS, PORTABLE, Isa, best_isa, processor_flags
from fxcompress.backends.cpu.native import ensure_kernel
from fxcompress.backends.cpu.tiled import kernel_group, tiled_layout
from fxcompress.formats.integer import IntFormat, make_term
from fxcompress.forms import (
    ActivationQuantizer,
    DynamicPerToken,
    QuantizedWeight,
    StaticPerTensor,
    WeightLayout,
)
from tests.backends.kernel_cases import (
    CASES,
    DYNAMIC,
    QUICK,
    STATIC,
    TOLERANCE,
    Case,
    call,
    error,
    random_term,
    reference,
)

BEST = best_isa(processor_flags())
RUNNABLE = [isa for isa in ISAS.values() if isa.needs <= processor_flags()]


def name(value: object) -> str:
    return (
        value.form.title if isinstance(value, Case) else value.name if isinstance(value, Isa) else str(value)
    )


def check(case: Case, isa: Isa, rows: int, columns: int, tokens: int, *, bias: bool, seed: int = 0) -> None:
    term = random_term(rows, columns, case, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = (torch.randn(tokens, columns, generator=generator) + 0.2).to(case.dtype)
    added = torch.randn(rows, generator=generator) if bias else None
    expected = reference(case, term, x, added)
    assert error(call(case, isa, term, x, added), expected) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_form(case: Case) -> None:
    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(1, 70),
        st.integers(1, 200),
        st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 40]),
        st.booleans(),
        st.integers(0, 99),
    )
    def run(rows: int, columns: int, tokens: int, bias: bool, seed: int) -> None:
        check(case, BEST, rows, columns, tokens, bias=bias, seed=seed)

    run()


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=name)
def test_portable(case: Case) -> None:
    for rows, columns, tokens in [(1, 1, 1), (17, 70, 3), (33, 128, 9), (16, 100, 7)]:
        check(case, PORTABLE, rows, columns, tokens, bias=True)


@pytest.mark.parametrize("case", QUICK, ids=name)
def test_every_number_of_rows(case: Case) -> None:
    term = random_term(24, 96, case)
    x = torch.randn(300, 96)
    expected = reference(case, term, x)
    for tokens in [*range(1, 30), 191, 192, 193, 255, 256, 299, 300]:
        assert error(call(case, BEST, term, x[:tokens]), expected[:tokens]) < 2e-6, tokens


def test_a_row_of_codes_does_not_depend_on_its_neighbours() -> None:
    case = CASES[1]
    term = random_term(40, 128, case)
    x = torch.randn(50, 128)
    together = call(case, BEST, term, x)
    assert all(torch.equal(call(case, BEST, term, x[i : i + 1]), together[i : i + 1]) for i in range(50))


@pytest.mark.parametrize("case", QUICK, ids=name)
def test_any_thread_count_gives_the_same_bits(case: Case) -> None:
    term = random_term(1100, 130, case)  # large enough for several threads, even for one token
    for tokens in (1, 40):
        x = torch.randn(tokens, 130)
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(call(case, BEST, term, x))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("case", QUICK, ids=name)
def test_any_strides(case: Case) -> None:
    term = random_term(20, 64, case)
    wide = torch.randn(4, 5, 128)
    for x in (
        wide[:, :, :64],  # rows further apart than they are long
        wide[:, :, ::2],  # inputs not adjacent
        wide.transpose(0, 1)[:, :, :64],
        wide[:, :1, :64].expand(4, 3, 64),
        torch.randn(64, 7).t(),
        wide[0, 0, :64],
        wide[:0, :, :64],
    ):
        expected = reference(case, term, x.contiguous())
        y = call(case, BEST, term, x)
        assert y.shape == expected.shape
        assert y.numel() == 0 or error(y, expected) < 2e-6


@pytest.mark.parametrize("isa", RUNNABLE, ids=name)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_largest_codes_do_not_saturate(isa: Isa, bits: int) -> None:
    """All codes and activations at their extremes: any 16-bit saturation or overflow changes the sum."""
    columns = 512
    layout = WeightLayout.rows((3, columns))
    top = (1 << bits) - 1
    for value in (-128, 127):
        codes = torch.full((1, 3, columns), top, dtype=torch.uint8)
        codes[:, 1] = 0
        codes[:, 2, ::2] = 0
        zero = torch.tensor([[[0], [top], [0]]], dtype=torch.uint8)
        fmt = IntFormat(bits, False, 0)
        term = make_term(codes, torch.ones(1, 3, 1), zero, layout, fmt)
        unit = StaticPerTensor(8, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
        case = Case(bits, False, 0, unit)
        for tokens in (5, 20):
            y = call(case, isa, term, torch.full((tokens, columns), float(value)))
            assert y[0].tolist() == [top * value * columns, -top * value * columns, top * value * columns / 2]
            assert (y == y[0]).all()


@pytest.mark.parametrize("isa", [isa for isa in RUNNABLE if isa.vnni], ids=name)
@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "activation"),
    [(4, False, 0, DYNAMIC), (4, False, 128, STATIC), (7, True, 900, DYNAMIC), (4, False, 5000, STATIC)],
)
def test_many_rows_give_the_bits_of_few(
    isa: Isa, bits: int, symmetric: bool, group: int, activation: ActivationQuantizer
) -> None:
    """Unpacked panels against codes unpacked in registers; rows longer than a panel, and than two."""
    for rows, columns in ((40, 5003), (70, 9000), (33, 130)):
        case = Case(bits, symmetric, group, activation)
        term = random_term(rows, columns, case)
        x = torch.randn(41, columns) * 2
        few = torch.cat([call(case, isa, term, part) for part in x.split(5)])
        for tokens in (16, 23, 41):
            assert torch.equal(call(case, isa, term, x[:tokens]), few[:tokens])


def test_long_rows_do_not_overflow() -> None:
    columns = 70_000  # 255 · 127 · 70000 exceeds 32 bits
    codes = torch.full((1, 2, columns), 255, dtype=torch.uint8)
    zero = torch.zeros(1, 2, 1, dtype=torch.uint8)
    fmt = IntFormat(8, False, 0)
    term = make_term(codes, torch.ones(1, 2, 1), zero, WeightLayout.rows((2, columns)), fmt)
    unit = StaticPerTensor(8, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
    for tokens in (1, 20):
        y = call(Case(8, False, 0, unit), BEST, term, torch.full((tokens, columns), 127.0))
        assert torch.equal(y, torch.full((tokens, 2), 255.0 * 127 * columns))
    narrow = make_term(
        codes % 16, torch.ones(1, 2, 1), zero, WeightLayout.rows((2, columns)), IntFormat(4, False, 0)
    )
    y = call(Case(4, False, 0, unit), BEST, narrow, torch.full((20, columns), 127.0))
    assert torch.equal(y, torch.full((20, 2), 15.0 * 127 * columns))


@pytest.mark.parametrize("case", QUICK, ids=name)
def test_tiny_and_zero_activations(case: Case) -> None:
    term = random_term(16, 64, case)
    x = torch.randn(4, 64)
    x[1] = 0
    x[2] *= 1e-40  # denormal
    x[3] *= 1e-30
    expected = reference(case, term, x)
    y = call(case, BEST, term, x)
    assert (y[1] == 0).all()
    torch.testing.assert_close(y[2:].double(), expected[2:], rtol=1e-4, atol=1e-38)


@pytest.mark.parametrize("case", QUICK, ids=name)
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
def test_faults_stay_visible_and_in_their_row(case: Case, fault: float) -> None:
    term = random_term(16, 64, case)
    for tokens in (3, 12):
        x = torch.randn(tokens, 64)
        x[1, 5] = fault
        y = call(case, BEST, term, x)
        assert not y[1].isfinite().any()
        rest = [0, *range(2, tokens)]
        assert error(y[rest], reference(case, term, x[rest])) < 2e-6


def test_codes_are_the_references() -> None:
    """An identity weight shows the quantized activations: bit for bit those of the operators."""
    columns = 32
    codes = (torch.eye(columns) + 8).to(torch.uint8)[None]
    term = make_term(
        codes, torch.ones(1, columns, 1), None, WeightLayout.rows((32, 32)), IntFormat(4, True, 0)
    )
    x = torch.cat([torch.randn(200, columns), torch.arange(columns).expand(1, -1) + 0.5]) * 3
    for bits in (8, 4):
        case = Case(4, True, 0, DynamicPerToken(bits))
        form = dataclasses.replace(case.form, activation_bits=bits)
        assert ensure_kernel(form, BEST) is None
        packed = tiled_layout(BEST).pack([term])
        y = torch.ops.fxcompress_cpu.linear(
            *(x, packed["weight"], packed["scale"], None, packed["total"], None, None, None),
            form.call_number(BEST, 32),
        )
        q, scale = torch.ops.fxcompress.quantize_per_token(x, bits)
        assert torch.equal(y, q.float() * scale)


@pytest.mark.skipif(
    not (BEST.bfloat16_flags and "avx512_bf16" in processor_flags()),
    reason="no bfloat16 products to generate",
)
@pytest.mark.parametrize(
    "case",
    [
        Case(4, False, 64, None, torch.float32, "linear-bfloat16"),
        Case(8, True, 0, None, torch.bfloat16, "linear-bfloat16"),
        Case(8, False, 50, None, torch.float32, "linear-bfloat16"),
        Case(3, True, 40, None, torch.float16, "linear-bfloat16"),
    ],
    ids=name,
)
def test_many_rows_as_bfloat16(case: Case) -> None:
    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(8, 70),  # the error of a single output may be large beside the output
        st.integers(1, 1300),  # more inputs than a panel
        st.sampled_from([1, 5, 15, 16, 17, 31, 40, 300]),
        st.booleans(),
        st.integers(0, 99),
    )
    def run(rows: int, columns: int, tokens: int, bias: bool, seed: int) -> None:
        term = random_term(rows, columns, case, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        x = (torch.randn(tokens, columns, generator=generator) + 0.2).to(case.dtype)
        added = torch.randn(rows, generator=generator) if bias else None
        seen = x.to(torch.bfloat16).to(case.dtype) if tokens >= MANY_ROWS else x
        expected = reference(case, term, seen, added)
        assert error(call(case, BEST, term, x, added), expected) < TOLERANCE[case.dtype]

    run()


@pytest.mark.parametrize(
    "case", [Case(4, False, 64, None), Case(8, True, 0, None), Case(3, True, 40, None)], ids=name
)
def test_embedding_and_dense(case: Case) -> None:
    term = random_term(50, 200, case)
    packed = tiled_layout(BEST).pack([term])
    group = kernel_group(term.group_size, 200)
    shared = (packed["weight"], packed["scale"], packed.get("zero"))
    total = packed["total"]
    dense = term.dense(torch.float32)
    for kind, dtype in (("embedding", torch.float32), ("dense", torch.bfloat16)):
        text = "float32" if dtype == torch.float32 else "bfloat16"
        form = KernelForm(kind, case.bits, not case.symmetric, case.group > 0, None, 0, text, text)
        assert ensure_kernel(form, BEST) is None
        number = form.call_number(BEST, group)
        if kind == "embedding":
            for indices in (torch.randint(0, 50, (3, 7)), torch.tensor([49, 0], dtype=torch.int32)):
                rows = torch.ops.fxcompress_cpu.embedding(indices, *shared, total, 200, number)
                assert torch.equal(rows, dense[indices.long()])
            with pytest.raises((RuntimeError, IndexError), match="outside"):
                torch.ops.fxcompress_cpu.embedding(torch.tensor([50]), *shared, total, 200, number)
        else:
            weight = torch.ops.fxcompress_cpu.dense(*shared, 200, number)
            assert torch.equal(weight[:, :50], dense.to(dtype).t())


def test_several_terms_share_one_product() -> None:
    case = CASES[1]
    one, two = random_term(10, 96, case, 1), random_term(21, 96, case, 2)
    layout = tiled_layout(BEST)
    both = layout.pack([one, two])
    x = torch.randn(3, 96)
    y = torch.ops.fxcompress_cpu.linear(
        *(x, both["weight"], both["scale"], both["zero"], both["total"], None, None, None),
        case.form.call_number(BEST, 48),
    )
    assert torch.equal(y, torch.cat([call(case, BEST, one, x), call(case, BEST, two, x)], dim=1))


def test_per_matrix_scales() -> None:
    case = Case(8, True, -1, DYNAMIC)
    term: QuantizedWeight = random_term(9, 33, case)
    assert term.scale.numel() == 1
    x = torch.randn(2, 33)
    assert error(call(Case(8, True, 0, DYNAMIC), BEST, term, x), reference(case, term, x)) < 2e-6
