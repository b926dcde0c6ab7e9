from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats import IntFormat, decode, encode, find_parameters
from tests.formats.cases import PROPERTY, formats, normal, round_trip, shapes


def reference_search(w: Tensor, fmt: IntFormat, importance: Tensor | None = None) -> float:
    """Least Σ|ŵ − w|^2.4 of one row over the grid, by definition."""
    best = math.inf
    for i in range(80):
        p = 1 - i / 100
        lo, hi = min(w.min().item(), 0.0) * p, max(w.max().item(), 0.0) * p
        span = max(-lo, hi) / (fmt.qmax // 2) if fmt.symmetric else (hi - lo) / fmt.qmax
        scale = torch.tensor(span, dtype=fmt.scale_dtype).reshape(1, 1, 1)
        zero = None if fmt.symmetric else torch.round(-lo / scale.double()).to(torch.uint8)
        approx = decode(encode(w, scale, zero, fmt), scale, zero, fmt, torch.float64)
        error = (approx - w).abs() ** 2.4
        best = min(best, float((error if importance is None else error * importance).sum()))
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("group_size", [-1, 0, 24])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_finds_the_least_error_of_the_grid(
    bits: int, symmetric: bool, group_size: int, weighted: bool
) -> None:
    fmt = IntFormat(bits=bits, symmetric=symmetric, group_size=group_size)
    for seed in range(4):
        w = normal((1, 1, 24), seed, torch.float64)
        importance = torch.rand(24, generator=torch.Generator().manual_seed(seed)) ** 3 if weighted else None
        error = (round_trip(w, fmt, search=True, importance=importance) - w).abs() ** 2.4
        found = float((error if importance is None else error * importance).sum())
        assert found == pytest.approx(reference_search(w, fmt, importance), rel=1e-4)


@PROPERTY
@given(fmt=formats, shape=shapes, exponent=st.sampled_from([-30, 0, 30]), seed=st.integers(0, 1000))
def test_search_is_never_worse(fmt: IntFormat, shape: tuple[int, int, int], exponent: int, seed: int) -> None:
    w = normal(shape, seed, torch.float64)
    big = w * 10.0**exponent

    def error(approx: Tensor) -> float:
        return float(((approx / 10.0**exponent - w).abs() ** 2.4).sum())

    assert error(round_trip(big, fmt, search=True)) <= error(round_trip(big, fmt)) * (1 + 1e-9)


def test_importance_protects_its_columns() -> None:
    w = normal((1, 1, 64), 3)
    w[..., 0] = 9.0  # an outlier that a plain search clips
    fmt = IntFormat(bits=3, symmetric=True, group_size=0)
    importance = torch.full((64,), 1e-6)
    importance[0] = 1
    plain, guarded = round_trip(w, fmt, search=True), round_trip(w, fmt, search=True, importance=importance)
    assert (guarded - w)[..., 0].abs() < (plain - w)[..., 0].abs()


def test_importance_of_zero_is_allowed_and_another_shape_is_not() -> None:
    w, fmt = normal((1, 2, 6)), IntFormat(bits=4, group_size=4)
    zeros = round_trip(w, fmt, search=True, importance=torch.zeros(6))
    assert torch.equal(zeros, round_trip(w, fmt))
    with pytest.raises(FormatError, match=r"importance \(5,\), expected \(6,\)"):
        find_parameters(w, fmt, search=True, importance=torch.ones(5))
