from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats import CodebookFormat, pack_codes, unpack_codes
from fxcompress.formats.codebook import largest_magnitudes
from fxcompress.forms import CodebookWeight, Component, WeightLayout, from_spec
from tests.ops.graphs import compiled, decomposed, operators, pre_dispatch

LAYOUTS = {
    "linear": WeightLayout((12, 20), (0, 1)),
    "addmm": WeightLayout((20, 12), (1, 0)),
    "experts": WeightLayout((3, 20, 12), (0, 2, 1), batch_dims=1),
}
FORMATS = {
    "one table, groups": CodebookFormat(4, 8, per_row=False),
    "tables per row": CodebookFormat(3, None, per_row=True),
    "both": CodebookFormat(2, 0, per_row=True),
}


def term_of(layout: WeightLayout, fmt: CodebookFormat) -> CodebookWeight:
    generator = torch.Generator().manual_seed(0)
    batch, rows, columns = layout.matrix_shape
    codes = torch.randint(0, 1 << fmt.bits, (batch, rows, columns), generator=generator, dtype=torch.uint8)
    table = torch.randn(fmt.table_shape(batch, rows), generator=generator).to(fmt.table_dtype)
    w = torch.randn(batch, rows, columns, generator=generator)
    scale = None if fmt.group_size is None else largest_magnitudes(w, fmt)
    place = (layout.shape, layout.perm, layout.batch_dims, layout.row_dims)
    return CodebookWeight(fmt.bits, fmt.group_size or 0, *place, pack_codes(codes, fmt.bits), table, scale)


def call(term: CodebookWeight, codes: Tensor, table: Tensor, scale: Tensor | None = None) -> Tensor:
    value: Tensor = torch.ops.fxcompress.dequantize_codebook(
        *(codes, table, scale, term.bits, term.group_size, term.shape, term.perm, term.batch_dims),
        *(term.row_dims, torch.float32),
    )
    return value


def parts_of(term: CodebookWeight) -> tuple[Tensor, ...]:
    return (term.codes, term.table) if term.scale is None else (term.codes, term.table, term.scale)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_values_graphs_and_saving(layout: WeightLayout, fmt: CodebookFormat) -> None:
    term = term_of(layout, fmt)
    dense = term.dense(torch.float32)
    assert dense.shape == layout.shape
    assert dense.is_contiguous()
    matrix = layout.to_matrix(dense)
    codes = unpack_codes(term.codes, term.bits, matrix.shape[2])
    for b, n, k in [(0, 0, 0), (len(matrix) - 1, 5, 11), (0, 11, 3)]:
        table = term.table[b, n] if term.per_row else term.table[0, 0]
        scale = 1.0 if term.scale is None else float(term.scale[b, n, k // 8 if term.group_size else 0])
        torch.testing.assert_close(float(matrix[b, n, k]), float(table[int(codes[b, n, k])]) * scale)
    parts = parts_of(term)
    graph = pre_dispatch(lambda *given: call(term, *given), parts)
    assert operators(graph.graph) == ["dequantize_codebook"]
    plain = decomposed(lambda *given: call(term, *given), parts)
    assert operators(plain.graph) == []
    assert torch.equal(plain(*parts), dense)
    tensors: dict[str, Tensor] = {}
    again: Component = from_spec(term.to_spec("w", tensors), tensors)
    assert again.same_as(term)


def test_compiles_to_the_same_values() -> None:
    term = term_of(LAYOUTS["linear"], FORMATS["both"])
    assert torch.equal(
        compiled(lambda *given: call(term, *given), False)(*parts_of(term)), call(term, *parts_of(term))
    )


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_look_ups_are_rows(fmt: CodebookFormat) -> None:
    term = term_of(LAYOUTS["linear"], fmt)
    for indices in (torch.tensor([[3, 0], [11, 3]]), torch.tensor(5), torch.zeros(0, dtype=torch.int64)):
        rows = torch.ops.fxcompress.codebook_embedding(
            indices, term.codes, term.table, term.scale, term.bits, term.group_size, 20, torch.float32
        )
        assert torch.equal(rows, term.dense(torch.float32)[indices])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(1, 1, 8)}, r"table is \(1, 1, 8\) torch.float32, expected \(1, 1, 16\)"),
        ({"table": torch.zeros(1, 12, 16)}, "table is"),
        ({"scale": None}, "group_size=8 without scales"),
        ({"scale": torch.zeros(1, 12, 3)}, "scale is .* torch.float32, expected .* torch.bfloat16"),
        ({"codes": torch.zeros(1, 12, 9, dtype=torch.uint8)}, "codes is"),
    ],
)
def test_tensors_are_checked(change: dict[str, Tensor | None], message: str) -> None:
    term = term_of(LAYOUTS["linear"], FORMATS["one table, groups"])
    with pytest.raises(FormatError, match=message):
        CodebookWeight(**{**vars(term), **change})
