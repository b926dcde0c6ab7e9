from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import CalibrationError
from fxcompress.passes._low_rank_solver import (
    cholesky_root,
    decompose,
    output_loss,
    refit_left,
    relative_loss,
)

shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))


def problem(rows: int, columns: int, seed: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of strongly correlated inputs of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens or 4 * columns, columns, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    x = x * torch.logspace(-2, 2, columns, dtype=torch.float64)
    return w, x.T @ x / len(x)


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 10**6), st.data())
def test_loss_is_the_sum_of_the_discarded_squares(
    shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    w, gram = problem(*shape, seed)
    found = decompose(w, cholesky_root(gram))
    rank = data.draw(st.integers(1, min(shape)))
    u, v = found.factors(rank)
    assert (u.shape, v.shape) == ((shape[0], rank), (rank, shape[1]))
    loss = output_loss(w - u @ v, gram)
    assert abs(loss - found.loss(rank)) <= 1e-10 * found.energy
    assert abs(found.energy - output_loss(w, gram)) <= 1e-10 * found.energy


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 10**6), st.data())
def test_never_above_plain_and_diagonal_metrics(
    shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    w, gram = problem(*shape, seed)
    rank = data.draw(st.integers(1, min(shape)))

    def lost(root: Tensor | None) -> float:
        u, v = decompose(w, root).factors(rank)
        return output_loss(w - u @ v, gram)

    best = lost(cholesky_root(gram))
    slack = 1e-9 * output_loss(w, gram)
    assert best <= lost(None) + slack
    assert best <= lost(gram.diagonal().sqrt().sqrt()) + slack  # ASVD's scale, from magnitudes


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(0, 10**6), st.sampled_from(["none", "diagonal", "cholesky"]))
def test_full_rank_is_exact(shape: tuple[int, int], seed: int, kind: str) -> None:
    w, gram = problem(*shape, seed)
    root = {"none": None, "diagonal": gram.diagonal().sqrt(), "cholesky": cholesky_root(gram)}[kind]
    u, v = decompose(w, root).factors(min(shape))
    torch.testing.assert_close(u @ v, w, rtol=0, atol=1e-7)


def test_any_root_of_the_gram_matrix_gives_the_same_approximation() -> None:
    w, gram = problem(9, 7, 0)
    values, vectors = torch.linalg.eigh(gram)
    for root in (cholesky_root(gram), vectors * values.clamp_min(0).sqrt()):
        u, v = decompose(w, root).factors(3)
        first = u @ v if root is not None else None
    again = decompose(w, cholesky_root(gram)).factors(3)
    assert first is not None
    torch.testing.assert_close(first, again[0] @ again[1], rtol=1e-7, atol=1e-7)


def test_equal_inputs_are_plain_singular_values() -> None:
    w, _ = problem(9, 7, 1)
    plain = decompose(w).factors(4)
    for root in (torch.full((7,), 3.0), 3 * torch.eye(7)):
        u, v = decompose(w, root).factors(4)
        torch.testing.assert_close(u @ v, plain[0] @ plain[1])


def test_factors_are_balanced_and_finite_for_a_zero_weight() -> None:
    w, gram = problem(9, 7, 2)
    u, v = decompose(w, cholesky_root(gram)).factors(5)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))
    u, v = decompose(torch.zeros(5, 4)).factors(2)
    assert not (u @ v).any()
    assert torch.isfinite(u).all()


def test_a_singular_gram_matrix_is_damped_just_enough() -> None:
    w, gram = problem(12, 10, 3, tokens=4)  # rank 4, and one input never active
    gram[:, 0] = gram[0] = 0
    root = cholesky_root(gram)
    torch.testing.assert_close(root @ root.T, gram, rtol=1e-6, atol=1e-6 * float(gram.diagonal().mean()))
    u, v = decompose(w, root).factors(4)
    assert output_loss(w - u @ v, gram) <= 1e-6 * output_loss(w, gram)  # four directions carry all inputs
    assert torch.equal(cholesky_root(torch.zeros(3, 3)).diagonal() > 0, torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gram_matrices_that_are_not_finite_are_refused(bad: float) -> None:
    gram = torch.eye(3)
    gram[1, 1] = bad
    with pytest.raises(CalibrationError, match="NaN or inf"):
        cholesky_root(gram)


def test_refitting_is_least_squares() -> None:
    w, gram = problem(9, 12, 4)
    v = torch.randn(3, 12, dtype=torch.float64)
    u = refit_left(w, v, gram)
    best = output_loss(w - u @ v, gram)
    for _ in range(5):
        assert output_loss(w - (u + 1e-3 * torch.randn_like(u)) @ v, gram) > best
    own = decompose(w, cholesky_root(gram)).factors(4)
    torch.testing.assert_close(refit_left(w, own[1], gram) @ own[1], own[0] @ own[1], rtol=1e-6, atol=1e-6)


def test_relative_loss() -> None:
    w = torch.eye(2)
    assert relative_loss(w, 0 * w, None) == 1.0
    assert relative_loss(0 * w, 0 * w, None) == 0.0
    assert relative_loss(w, torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([3.0, 1.0]))) == 0.5
