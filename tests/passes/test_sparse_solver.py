"""The SparseGPT solver: known answers, the identity of its loss, masks, rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import CalibrationError, FormatError
from fxcompress.formats import IntFormat
from fxcompress.formats.integer import decode
from fxcompress.passes._pruning import zeros_of
from fxcompress.passes._sparse_solver import regularised, sparsegpt_solve

PAIR = torch.tensor([[2.0, 1.0], [1.0, 2.0]])


def case(batch: int, rows: int, columns: int, seed: int, dead: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3 * columns, columns, generator=draw)
    x = x @ torch.randn(columns, columns, generator=draw)  # correlated
    x[..., :dead] = 0
    return torch.randn(batch, rows, columns, generator=draw), x.mT @ x / x.shape[1]


def test_known_answers() -> None:
    row = torch.tensor([[1.0, 0.9]])
    one = sparsegpt_solve(row, PAIR, 0.5, damping=0.0)
    torch.testing.assert_close(one.weight, torch.tensor([[[0.0, 1.4]]]))
    assert float(one.loss) == pytest.approx(0.75)
    other = sparsegpt_solve(row, PAIR, 0.0, damping=0.0, keep=torch.tensor([[True, False]]))
    torch.testing.assert_close(other.weight, torch.tensor([[[1.0, 0.0]]]))
    assert float(other.loss) == pytest.approx(0.81)
    both = sparsegpt_solve(row, PAIR, 0.0, damping=0.0, keep=torch.zeros(1, 2, dtype=torch.bool))
    assert float(both.loss) == pytest.approx(2.71)  # ½ w H wᵀ


def test_uncorrelated_inputs_leave_the_others_as_they_were() -> None:
    w = torch.tensor([[3.0, 0.1, 2.0, 0.2]])
    found = sparsegpt_solve(w, torch.diag(torch.tensor([1.0, 2.0, 1.0, 4.0])), 0.5)
    assert torch.equal(found.weight, torch.tensor([[[3.0, 0.0, 2.0, 0.0]]]))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 6),
    st.integers(2, 33),
    st.sampled_from([0.1, 0.3, 0.5, 0.8]),
    st.sampled_from([4, 7, 128]),
    st.integers(0, 1),
    st.integers(0, 1 << 16),
)
def test_the_loss_is_that_of_the_change(
    batch: int, rows: int, columns: int, share: float, block: int, dead: int, seed: int
) -> None:
    """Σe²/2 = ½ ΔW H ΔWᵀ exactly, because U H Uᵀ = I."""
    w, gram = case(batch, rows, columns, seed, dead)
    found = sparsegpt_solve(w, gram, share, damping=0.05, block_columns=block)
    h = regularised(gram, found.damping)
    gap = (w - found.weight).double()
    direct = ((gap @ h) * gap).sum(-1) / 2
    torch.testing.assert_close(found.loss, direct, rtol=2e-3, atol=1e-5 * float(h.abs().max()))
    for keep in found.keep:
        assert int((~keep).sum()) == zeros_of(share, rows * columns)
    assert bool((found.weight[~found.keep] == 0).all())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 5)])
@pytest.mark.parametrize("block", [6, 128])
def test_patterns_hold_and_lose_less_than_the_mask_alone(n: int, m: int, block: int) -> None:
    w, gram = case(1, 16, 40, seed=n)
    found = sparsegpt_solve(w, gram, 0.0, groups=(n, m), block_columns=block)
    assert bool((found.keep.unflatten(-1, (-1, m)).sum(-1) == n).all())
    h = gram.double()

    def loss(value: Tensor) -> float:
        gap = (w - value).double()
        return float(((gap @ h) * gap).sum())

    assert loss(found.weight) < loss(w * found.keep)


def test_zeros_that_are_there_stay_and_count() -> None:
    w, gram = case(1, 8, 24, seed=3)
    given_zeros = torch.rand(1, 8, 24, generator=torch.Generator().manual_seed(0)) < 0.7
    found = sparsegpt_solve(w * given_zeros, gram, 0.5, keep=given_zeros)
    assert not bool((found.keep & ~given_zeros).any())
    assert bool((found.weight[~given_zeros] == 0).all())
    assert int((~found.keep).sum()) >= zeros_of(0.5, 8 * 24)


def test_dead_inputs_go_first() -> None:
    w, gram = case(1, 4, 16, seed=1, dead=4)
    found = sparsegpt_solve(w, gram, 0.25)
    assert not bool(found.keep[..., :4].any())
    assert bool(found.keep[..., 4:].all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "groups"), [(8, (2, 4)), (8, (0, 0)), (0, (2, 4)), (12, (0, 0))])
def test_rounding_in_the_same_sweep(symmetric: bool, group: int, groups: tuple[int, int]) -> None:
    w, gram = case(2, 6, 32, seed=7)
    fmt = IntFormat(4, symmetric, group)
    found = sparsegpt_solve(w, gram, 0.5, groups=groups, fmt=fmt, damping=0.05, block_columns=16)
    assert found.codes is not None
    assert found.scale is not None
    assert torch.equal(decode(found.codes, found.scale, found.zero, fmt, torch.float32), found.weight)
    assert bool((found.weight[~found.keep] == 0).all())
    h = regularised(gram, found.damping)
    gap = (w - found.weight).double()
    torch.testing.assert_close(found.loss, ((gap @ h) * gap).sum(-1) / 2, rtol=2e-3, atol=1e-3)


def test_bad_input() -> None:
    w, gram = case(1, 4, 8, seed=0)
    with pytest.raises(FormatError, match=r"expected \[B, N, K\]"):
        sparsegpt_solve(w, gram[:, :4], 0.5)
    with pytest.raises(CalibrationError, match="NaN or inf"):
        sparsegpt_solve(w, gram * torch.nan, 0.5)
    with pytest.raises(FormatError, match="groups of 4 do not divide scale groups of 6"):
        sparsegpt_solve(w, gram, 0.5, groups=(2, 4), fmt=IntFormat(4, False, 6))
