"""Sparse weights on the CPU: kernels against dense products, which form runs, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.backends.cpu import sparse
from fxcompress.backends.cpu.generator import DTYPES
from fxcompress.backends.cpu.isa import AVX512_VNNI, PORTABLE
from fxcompress.backends.cpu.native import ensure_kernel
from fxcompress.backends.cpu.selection import this_machine
from fxcompress.backends.cpu.sparse_form import SparseForm
from fxcompress.backends.cpu.sparse_native import python_sparse_expand, python_sparse_linear
from fxcompress.capture import capture_model
from fxcompress.manager import run_recipe
from fxcompress.passes._pruning import keep_groups
from tests.engine.models import build, tokens

HAS_KERNEL = this_machine().isa is AVX512_VNNI
OPERATORS = {
    "operators": (
        lambda *a: torch.ops.fxcompress_cpu.sparse_linear(*a),
        lambda *a: torch.ops.fxcompress_cpu.sparse_expand(*a),
    ),
    "python": (python_sparse_linear, python_sparse_expand),
}


def weight(rows: int, columns: int, kind: str, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(rows * columns)
    dense = torch.randn(rows, columns, generator=draw)
    if ":" in kind:
        n, m = map(int, kind.split(":"))
        return (dense * keep_groups(dense.abs(), n, m)).to(dtype)
    return (dense * (torch.rand(rows, columns, generator=draw) < float(kind))).to(dtype)


@pytest.mark.parametrize("kind", ["2:4", "4:8", "1:4", "0.5", "0.05", "0", "1"])
@pytest.mark.parametrize(("rows", "columns"), [(7, 16), (33, 48), (5, 45), (3, 4)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_layout_holds_the_weight(kind: str, rows: int, columns: int, turned: bool) -> None:
    dense = weight(rows, columns, kind, torch.float32)
    parameter = dense.t().contiguous() if turned else dense
    term = sparse.row_bitmap(parameter, (1, 0) if turned else (0, 1))
    assert torch.equal(term.dense(torch.float32), parameter)
    if columns % 16 == 0:
        assert term.even == (kind in ("2:4", "4:8"))


def test_zeros_among_what_is_kept_leave_words_even_and_sizes_equal() -> None:
    dense = weight(32, 64, "2:4", torch.float32)
    dense[3, dense[3].nonzero()[0]] = 0
    term = sparse.row_bitmap(dense, (0, 1))
    assert term.even
    assert term.values.numel() == 32 * 64 // 2 + 16
    assert torch.equal(term.dense(torch.float32), dense)
    loose = sparse.row_bitmap(weight(64, 100, "0.2", torch.float32), (0, 1))
    assert not loose.even
    assert (loose.values.numel() - 16) % (64 * 100 // 64) == 0


def test_half_the_entries_of_a_row_need_not_be_half_of_every_word() -> None:
    dense = torch.zeros(2, 32)
    dense[0, :12], dense[0, 28:], dense[1, ::2] = 1.0, 2.0, 3.0
    assert not sparse.row_bitmap(dense, (0, 1)).even


@pytest.mark.skipif(not HAS_KERNEL, reason="the generated kernel is for AVX-512")
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", ["2:4", "0.5", "0.1"])
@pytest.mark.parametrize("way", list(OPERATORS))
def test_products_and_expansion(dtype: torch.dtype, kind: str, way: str) -> None:
    linear, expand = OPERATORS[way]
    for rows, columns in ((40, 64), (300, 480), (9, 45)):
        dense = weight(rows, columns, kind, dtype)
        term = sparse.row_bitmap(dense, (0, 1))
        form = SparseForm(DTYPES[dtype], term.even)
        assert ensure_kernel(form, AVX512_VNNI) is None
        number = form.number(AVX512_VNNI)
        packed = (term.values, term.bits, term.offsets)
        assert torch.equal(expand(*packed, columns, number), dense)
        bias = torch.randn(rows)
        for count in (1, 2, 7, 19):
            x = torch.randn(count, columns).to(dtype)
            for given, added in ((None, 0.0), (bias, bias)):
                y = linear(x, *packed, given, number)
                exact = x.double() @ dense.double().T + added
                size = exact.abs().max() + 1e-9
                limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
                assert y.dtype == dtype
                assert float((y.double() - exact).abs().max() / size) < limit
        strided = torch.randn(2, 3, columns + 5).to(dtype)[..., 2 : 2 + columns]
        expected = F.linear(strided.float(), dense.float())
        got = linear(strided, *packed, None, number).float()
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=5e-2)
        assert linear(torch.empty(0, columns, dtype=dtype), *packed, None, number).shape == (0, rows)


class Wide(nn.Module):
    """Products of one and of many rows, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 64), nn.Linear(64, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


RECIPES: dict[str, Any] = {
    "2:4": "sparse-2of4",
    "other": [{"allocate-sparsity": {}}, {"wanda": {"sparsity": 0.8}}, "pack-sparse"],
    "codes": "sparse-2of4-w8a8",
}


@pytest.mark.parametrize(("kind", "fast"), [("2:4", True), ("2:4", False), ("other", True), ("codes", True)])
def test_compiled_as_the_reference(kind: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, many rows; with the kernel where there is one, and executed dense."""
    if not fast:
        monkeypatch.setattr(sparse, "PAYS_BELOW", 0.0)
        monkeypatch.setattr(sparse, "PAYS_EVEN", 0.0)
    torch.manual_seed(0)
    model = Wide().eval()
    made = fxcompress.compress(model, RECIPES[kind], [(torch.randn(20, 48),)], progress=False)
    inputs = [torch.randn(count, 48) for count in (2, 40)]
    compiled = [made(x) for x in inputs]
    said = made.explain()
    made.set_backend("eager")
    for x, y in zip(inputs, compiled, strict=True):
        torch.testing.assert_close(y, made(x), rtol=1e-4, atol=2e-2 if kind == "codes" else 1e-5)
    assert set(said) == {"up.weight", "down.weight"}
    for text in said.values():
        if kind == "codes":
            assert "int8 sym per row, executed with its zeros as codes; generated" in text or not HAS_KERNEL
        elif fast and HAS_KERNEL:
            assert "generated sparse, up to 32 rows" in text
        else:
            assert "executed dense:" in text


def test_memory_is_that_of_the_entries_where_a_kernel_reads_them() -> None:
    made = fxcompress.compress(build(), "sparse-2of4", [{"input_ids": tokens()}], progress=False)
    made(input_ids=tokens())
    sparse_bytes = sum(row.bytes_before for row in made.report.rows if row.zeros is not None)
    dense_bytes = sum(row.bytes_before for row in made.report.rows) - sparse_bytes
    held = made.resident_bytes() - dense_bytes
    assert held <= (0.9 if HAS_KERNEL else 1.01) * sparse_bytes  # offsets weigh much in rows of 16 inputs


def test_torch_compile_takes_packed_weights_and_refuses_edited_ones() -> None:
    """Its graph reads the user's parameters, so an edit of them would be lost."""
    model, x = Wide().eval(), torch.randn(2, 48)
    pruned = {"prune-magnitude": {"pattern": "2:4"}}
    options = {"recipe": [pruned, "pack-sparse"], "inner": "eager"}
    with torch.no_grad():
        y = torch.compile(model, backend="fxcompress", options=options)(x)
        state = run_recipe(capture_model(model, (x,)), [pruned], verify="off").state
        weights = {name: state.effective(name) for name in state.masks}
        torch.testing.assert_close(y, torch.func.functional_call(model, weights, (x,)))
        assert set(weights) == {"up.weight", "down.weight"}
        torch._dynamo.reset()
        with pytest.raises(Exception, match="the recipe edits it in place"):
            torch.compile(model, backend="fxcompress", options={"recipe": [pruned], "inner": "eager"})(x)
    torch._dynamo.reset()


def test_what_pays_is_a_rule_over_densities() -> None:
    assert sparse.pays(50, 100, even=True)
    assert not sparse.pays(50, 100, even=False)
    assert sparse.pays(30, 100, even=False)
    assert not sparse.pays(51, 100, even=True)


def test_the_source_is_the_same_in_every_process_and_only_for_its_set() -> None:
    forms = [SparseForm(dtype, even) for dtype in DTYPES.values() for even in (False, True)]
    assert len({form.number(AVX512_VNNI) for form in forms}) == len(forms)
    assert "_mm512_maskz_expand_ps" in forms[0].render(AVX512_VNNI)
    assert PORTABLE.lanes != sparse.CHUNK  # elsewhere there is no kernel, and weights are executed dense
