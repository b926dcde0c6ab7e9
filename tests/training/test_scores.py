"""Divergences: known answers, limits, and bounds for the likeliest few."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import TrainingError
from fxcompress.training.scores import TeacherScores, forward_kl, jensen_shannon, reverse_kl, skew_kl

P = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
Q = torch.tensor([0.5, 0.5], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (forward_kl(P, Q), 0.36806),
        (reverse_kl(P, Q), 0.51083),
        (jensen_shannon(P, Q, 0.5), 0.10175),
        (jensen_shannon(P, Q, 0.1), 0.03360),
        (jensen_shannon(P, Q, 0.9), 0.04307),
        (skew_kl(P, Q, 0.1), 0.30714),
    ],
)
def test_known_answers(value: Tensor, expected: float) -> None:
    assert float(value) == pytest.approx(expected, abs=6e-6)


def test_reversed_skew_keeps_the_larger_share_of_the_teacher() -> None:
    mixed = 0.9 * P.exp() + 0.1 * Q.exp()
    expected = float((Q.exp() * (Q - mixed.log())).sum())
    assert float(skew_kl(P, Q, 0.1, reverse=True)) == pytest.approx(expected, abs=1e-12)


def test_generalised_divergence_has_its_defined_limits_and_symmetry() -> None:
    assert torch.equal(jensen_shannon(P, Q, 0.0), forward_kl(P, Q))
    assert torch.equal(jensen_shannon(P, Q, 1.0), reverse_kl(P, Q))
    assert float(jensen_shannon(P, Q, 0.5)) == pytest.approx(float(jensen_shannon(Q, P, 0.5)))
    small = 1e-4
    assert float(jensen_shannon(P, Q, small)) / small == pytest.approx(float(forward_kl(P, Q)), rel=1e-2)


def test_disjoint_support_is_bounded_where_the_method_says_so() -> None:
    a, b = torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])
    assert float(jensen_shannon(a, b, 0.5)) == pytest.approx(math.log(2))
    assert float(skew_kl(a, b, 0.1)) == pytest.approx(-math.log(0.1))
    assert math.isinf(float(forward_kl(a, b)))


def test_gradients_in_the_scores_are_the_closed_forms() -> None:
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    scores = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log().requires_grad_()
    reverse_kl(p.log(), torch.log_softmax(scores, -1)).backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([-0.38078, -0.00495, 0.38573], abs=6e-6)
    scores.grad = None
    forward_kl(p.log(), torch.log_softmax(scores, -1)).backward()
    assert scores.grad.tolist() == pytest.approx([0.3 - 0.7, 0.3 - 0.2, 0.4 - 0.1])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.floats(0.5, 3.0), st.integers(0, 10_000))
def test_the_likeliest_few_give_a_lower_bound_and_all_give_the_divergence(
    size: int, k: int, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    theirs, mine = (3 * torch.randn(1, 4, size, generator=generator, dtype=torch.float64) for _ in range(2))
    full = forward_kl(*TeacherScores(theirs).pair(mine, temperature))
    few = forward_kl(*TeacherScores.top(theirs, k, temperature).pair(mine, temperature))
    assert bool((few <= full + 1e-5).all())
    assert bool((few >= -1e-5).all())
    if k >= size:
        assert torch.allclose(few, full, atol=1e-5)


def test_other_vocabularies_and_temperatures_are_refused() -> None:
    with pytest.raises(TrainingError, match="scores 5 tokens, the student 4"):
        TeacherScores(torch.zeros(1, 2, 5)).pair(torch.zeros(1, 2, 4))
    with pytest.raises(TrainingError, match="temperature 2"):
        TeacherScores.top(torch.zeros(1, 2, 5), 3, 2.0).pair(torch.zeros(1, 2, 5), 1.0)
