from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats import IntFormat, quantize_to_term
from fxcompress.forms import DynamicPerToken, FixedOutliers, OutlierColumns, OutlierSplit, WeightLayout
from fxcompress.ops import apply_quantizer
from tests.ops.graphs import compiled, decomposed, operators, pre_dispatch

OPS = torch.ops.fxcompress


def split(x: Tensor, threshold: float, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    q, scale, rest = OPS.quantize_outlier_split(x, bits, threshold)
    return q, scale, rest


def test_known_codes() -> None:
    x = torch.tensor([[127.0, 1.0, -2.0], [0.5, 4.0, 2.0]])
    q, scale, rest = split(x, 6.0)
    assert rest.tolist() == [[127.0, 0.0, 0.0], [0.5, 0.0, 0.0]]  # the whole channel, every token of it
    assert q.tolist() == [[0, 64, -127], [0, 127, 64]]  # 63.5 ties to even
    assert scale.flatten().tolist() == [pytest.approx(2 / 127), pytest.approx(4 / 127)]
    assert split(torch.tensor([[6.0, 5.999]]), 6.0)[2].tolist() == [[6.0, 0.0]]  # reached counts


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    bits=st.integers(2, 8),
    seed=st.integers(0, 500),
)
def test_an_infinite_threshold_is_plain_per_token_and_a_tiny_one_is_float(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int, seed: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    q, scale, rest = split(x, math.inf, bits)
    plain_q, plain_scale = OPS.quantize_per_token(x, bits)
    assert torch.equal(q, plain_q)
    assert torch.equal(scale, plain_scale)
    assert not rest.any()
    q, _, rest = split(x, 1e-30, bits)
    assert not q.any()
    assert torch.equal(rest, x)
    assert torch.equal(apply_quantizer(x, OutlierSplit(bits, 1e-30)), x)


def test_a_planted_outlier_leaves_the_error_of_other_channels_unchanged() -> None:
    x = torch.randn(7, 20)
    planted = x.clone()
    planted[3, 5] = 60.0
    quantizer = OutlierSplit(8, 6.0)
    error = apply_quantizer(x.index_fill(1, torch.tensor(5), 0), quantizer)
    value = apply_quantizer(planted, quantizer)
    others = [k for k in range(20) if k != 5]
    assert torch.equal(value[:, others], error[:, others])
    assert torch.equal(value[:, 5], planted[:, 5])
    naive = apply_quantizer(planted, DynamicPerToken(8))
    assert (naive - planted)[3].norm() > 5 * (value - planted)[3].norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_faults_stay_visible_in_their_channel(bad: float) -> None:
    x = torch.tensor([[1.0, bad, 2.0], [1.0, 0.5, 2.0]])
    value = apply_quantizer(x, OutlierSplit(8, 6.0))
    assert not bool(torch.isfinite(value[0, 1]))
    assert bool(torch.isfinite(value[:, [0, 2]]).all())


@settings(max_examples=50, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([-1, 0, 3, 8]),
    transposed=st.booleans(),
    outliers=st.sets(st.integers(0, 10), max_size=4),
    seed=st.integers(0, 500),
)
def test_the_product_gathers_the_right_columns(
    bits: int, symmetric: bool, group_size: int, transposed: bool, outliers: set[int], seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 11, generator=draw)
    layout = WeightLayout((11, 6), (1, 0)) if transposed else WeightLayout.rows((6, 11))
    stored = w.T.contiguous() if transposed else w
    term = quantize_to_term(stored, layout, IntFormat(bits, symmetric, group_size))
    rest = torch.zeros(2, 3, 11)
    for k in outliers:
        rest[..., k] = torch.randn(2, 3, generator=draw)
    fields = (term.codes, term.scale, term.zero, bits, group_size, list(layout.shape), list(layout.perm))
    found = OPS.outlier_product(rest, *fields)
    dense = layout.to_matrix(term.dense(torch.float32))[0]
    torch.testing.assert_close(found, rest @ dense.T, rtol=1e-5, atol=1e-6)


def test_no_graph_break_and_static_shapes() -> None:
    term = quantize_to_term(torch.randn(6, 11), WeightLayout.rows((6, 11)), IntFormat(8, True, 0))

    def function(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        q, s, rest = OPS.quantize_outlier_split(x, 8, 6.0)
        side = OPS.outlier_product(rest, codes, scale, None, 8, 0, [6, 11], [0, 1])
        return OPS.dequantize_activation(q, s, None, torch.float32).sum(-1, keepdim=True) + side

    x = torch.randn(3, 11)
    x[1, 4] = 9
    given = (x, term.codes, term.scale)
    assert operators(pre_dispatch(function, given).graph) == [
        "quantize_outlier_split",
        "outlier_product",
        "dequantize_activation",
    ]
    assert operators(decomposed(function, given).graph) == ["outlier_product"]
    torch.testing.assert_close(compiled(function, dynamic=True)(*given), function(*given))
    torch.library.opcheck(OPS.outlier_product.default, (x, *given[1:], None, 8, 0, [6, 11], [0, 1]))


def test_fixed_columns() -> None:
    x = torch.tensor([[1.0, 100.0, -2.0], [0.5, 3.0, 2.0]])
    value = apply_quantizer(x, FixedOutliers(8, torch.tensor([1])))
    assert torch.equal(value[:, 1], x[:, 1])
    rest = x.clone()
    rest[:, 1] = 0
    assert torch.equal(value[:, [0, 2]], apply_quantizer(rest, DynamicPerToken(8))[:, [0, 2]])


@pytest.mark.parametrize("perm", [(0, 1), (1, 0)])
def test_outlier_columns_are_zero_elsewhere(perm: tuple[int, int]) -> None:
    shape = (4, 5) if perm == (0, 1) else (5, 4)
    values = torch.arange(8.0).reshape(4, 2)
    term = OutlierColumns(shape, perm, torch.tensor([1, 3]), values)
    dense = term.layout.to_matrix(term.dense(torch.float64))[0]
    assert torch.equal(dense[:, [1, 3]].float(), values)
    assert not dense[:, [0, 2, 4]].any()


def test_fields_are_checked() -> None:
    with pytest.raises(FormatError, match="threshold=inf"):
        OutlierSplit(8, math.inf)
    with pytest.raises(FormatError, match="threshold=0"):
        OutlierSplit(8, 0.0)
    with pytest.raises(FormatError, match="bits=9"):
        OutlierSplit(9, 6.0)
    with pytest.raises(FormatError, match="non-empty int64 vector"):
        FixedOutliers(8, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(FormatError, match=r"values is \(4, 3\)"):
        OutlierColumns((4, 5), (0, 1), torch.tensor([1, 3]), torch.zeros(4, 3))
    with pytest.raises(FormatError, match="no matrix"):
        OutlierColumns((4, 5, 6), (0, 1, 2), torch.tensor([1]), torch.zeros(4, 1))
