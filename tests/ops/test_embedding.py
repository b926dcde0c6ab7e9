from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fxcompress.formats import IntFormat, quantize_to_term
from fxcompress.forms import QuantizedWeight, WeightLayout
from tests.ops.graphs import compiled, decomposed, dynamo, operators, pre_dispatch

ROWS, COLUMNS = 15, 21
FORMATS = {
    "w8 rows": IntFormat(8, True, 0),
    "w4 groups": IntFormat(4, False, 7),
    "w4 partial groups": IntFormat(4, False, 8),
    "w3 symmetric": IntFormat(3, True, 8),
    "w6 matrix": IntFormat(6, False, -1),
}


def table(fmt: IntFormat) -> QuantizedWeight:
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return quantize_to_term(w, WeightLayout.rows(w.shape), fmt)


def lookup(indices: Tensor, term: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    value: Tensor = torch.ops.fxcompress.quantized_embedding(
        indices, term.codes, term.scale, term.zero, term.bits, term.group_size, COLUMNS, dtype
    )
    return value


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_equals_a_lookup_in_the_dense_table(
    fmt: IntFormat, shape: tuple[int, ...], index_dtype: torch.dtype
) -> None:
    term = table(fmt)
    indices = torch.randint(ROWS, shape, dtype=index_dtype)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        value = lookup(indices, term, dtype)
        assert value.dtype == dtype
        assert torch.equal(value, F.embedding(indices, term.dense(dtype)))


@pytest.mark.parametrize("index", [-1, ROWS])
def test_indices_out_of_range_are_refused(index: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        lookup(torch.tensor([0, index]), table(FORMATS["w8 rows"]))


@pytest.mark.parametrize("name", FORMATS)
def test_stays_one_node_until_decomposed(name: str) -> None:
    term = table(FORMATS[name])

    def function(indices: Tensor, codes: Tensor, scale: Tensor, *zero: Tensor) -> Tensor:
        value: Tensor = torch.ops.fxcompress.quantized_embedding(
            *(indices, codes, scale, zero[0] if zero else None),
            *(term.bits, term.group_size, COLUMNS, torch.float32),
        )
        return value

    # No size of `indices` equals one of the table: tracing gives equal sizes one symbol.
    indices, others = torch.randint(ROWS, (2, 6)), torch.randint(ROWS, (4, 5))
    parts = (term.codes, term.scale, *([] if term.zero is None else [term.zero]))
    kept = pre_dispatch(function, (indices, *parts))
    assert operators(kept.graph) == ["quantized_embedding"]
    assert operators(dynamo(function, (indices, *parts)).graph) == ["quantized_embedding"]
    plain = decomposed(function, (indices, *parts))
    assert operators(plain.graph) == []
    for graph_module in (kept, plain):
        assert torch.equal(graph_module(others, *parts), lookup(others, term))


@pytest.mark.parametrize("name", ["w8 rows", "w4 partial groups"])
def test_decomposition_gathers_before_it_dequantizes(name: str) -> None:
    term = table(FORMATS[name])
    stored = {tensor.untyped_storage().data_ptr() for tensor in term.tensors().values()}
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            value = func(*args, **(kwargs or {}))
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in stored:  # no view
                largest = max(largest, value.numel())
            return value

    with Sizes():  # type: ignore[no-untyped-call]
        lookup(torch.tensor([3, 1]), term)
    assert 2 * COLUMNS <= largest < 3 * COLUMNS + 8  # rows are padded to whole periods of the packing


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, False) for name in FORMATS), ("w8 rows", True), ("w4 partial groups", True)],
)
def test_compiles_to_the_same_values(name: str, dynamic: bool) -> None:
    term = table(FORMATS[name])
    function = compiled(lambda indices: lookup(indices, term), dynamic)
    for shape in ((2, 3), (4, 5)):
        indices = torch.randint(ROWS, shape)
        assert torch.equal(function(indices), lookup(indices, term))


@pytest.mark.parametrize("name", FORMATS)
def test_opcheck(name: str) -> None:
    term = table(FORMATS[name])
    indices = torch.randint(ROWS, (2, 3))
    torch.library.opcheck(
        torch.ops.fxcompress.quantized_embedding.default,
        (
            *(indices, term.codes, term.scale, term.zero),
            *(term.bits, term.group_size, COLUMNS, torch.float32),
        ),
    )
