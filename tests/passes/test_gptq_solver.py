from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.errors import CalibrationError, FormatError
from fxcompress.formats import IntFormat
from fxcompress.formats.integer import decode, encode, find_parameters
from fxcompress.passes._gptq_solver import Solution, gptq_solve, inverse_factor

GROUP = IntFormat(4, group_size=8)


def correlated(columns: int, rank: int | None = None, seed: int = 0, tokens: int = 400) -> Tensor:
    """Gram matrix of correlated inputs of very different size."""
    draw = torch.Generator().manual_seed(seed)
    rank = columns if rank is None else rank
    mixing = torch.randn(rank, columns, generator=draw)
    x = torch.randn(tokens, rank, generator=draw) @ mixing + 0.05 * torch.randn(1, columns, generator=draw)
    x = x * torch.exp(torch.randn(columns, generator=draw))
    return x.T @ x / tokens


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 100))


def rounded(w: Tensor, fmt: IntFormat, search: bool = False) -> Tensor:
    w = w[None] if w.dim() == 2 else w
    return encode(w, *find_parameters(w, fmt, search=search), fmt)


def reference(w: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, fmt: IntFormat, damping: float) -> Tensor:
    """The method as the paper derives it: invert H, round a column, eliminate it. Float64, one matrix."""
    w, h = w.double().clone(), gram.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    inverse = torch.linalg.inv(h)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for i in range(w.shape[1]):
        group = i // fmt.group_size if fmt.group_size else 0
        s, z = scale[:, group].double(), zero[:, group].double()
        code = (torch.round(w[:, i] / s) + z).clamp(fmt.qmin, fmt.qmax)
        codes[:, i] = code.to(torch.uint8)
        error = (w[:, i] - (code - z) * s) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def loss_of(w: Tensor, solution: Solution, fmt: IntFormat, gram: Tensor) -> Tensor:
    error = (w - decode(solution.codes, solution.scale, solution.zero, fmt, torch.float32)).double()
    return ((error @ gram.double()) * error).sum(-1)


def test_known_answer() -> None:
    grid = (torch.ones(1, 1, 1), torch.full((1, 1, 1), 8, dtype=torch.uint8))
    solution = gptq_solve(
        torch.tensor([[0.4, 0.4]]),
        torch.tensor([[2.0, 1.0], [1.0, 2.0]]),
        IntFormat(4, group_size=0),
        damping=0,
        act_order=False,
        parameters=grid,
    )
    assert (solution.codes.int() - 8).tolist() == [[[0, 1]]]
    assert solution.loss.item() == pytest.approx(0.56)
    assert solution.rounding_loss.item() == pytest.approx(0.96)
    assert solution.damping == 0


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize(
    "fmt", [GROUP, IntFormat(3, True, 8), IntFormat(4, group_size=0), IntFormat(4, group_size=-1)]
)
def test_diagonal_gram_is_rounding_to_nearest(fmt: IntFormat, search: bool, act_order: bool) -> None:
    w, gram = weight(7, 21), torch.diag(torch.rand(21) + 0.1)
    solution = gptq_solve(w, gram, fmt, search=search, act_order=act_order)
    torch.testing.assert_close(solution.codes, rounded(w, fmt, search), rtol=0, atol=0)
    torch.testing.assert_close(solution.loss, solution.rounding_loss)


def test_full_shrinkage_is_rounding_to_nearest() -> None:
    w = weight(7, 21)
    solution = gptq_solve(w, correlated(21), GROUP, shrinkage=1, search=False)
    torch.testing.assert_close(solution.codes, rounded(w, GROUP), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"act_order": False, "static_groups": False}])
def test_correlated_inputs_lose_less_than_rounding(options: dict[str, Any]) -> None:
    w, gram = weight(32, 90), correlated(90, rank=30)
    solution = gptq_solve(w, gram, GROUP, **options)
    assert bool((solution.loss <= solution.rounding_loss).all())
    assert solution.loss.sum() < 0.5 * solution.rounding_loss.sum()
    torch.testing.assert_close(
        solution.loss.double(), loss_of(w, solution, GROUP, gram), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("block_columns", [1, 5, 128])
@pytest.mark.parametrize("fmt", [GROUP, IntFormat(4, group_size=0)])
def test_equals_elimination_by_the_inverse(fmt: IntFormat, block_columns: int) -> None:
    w, gram = weight(6, 20), correlated(20)
    scale, zero = find_parameters(w[None], fmt)
    assert zero is not None
    solution = gptq_solve(
        w, gram, fmt, act_order=False, search=False, block_columns=block_columns, damping=0.05
    )
    expected = reference(w, gram, scale[0], zero[0], fmt, 0.05)[None]
    better = solution.loss < solution.rounding_loss  # the others keep the nearest codes
    assert bool(better.any())
    torch.testing.assert_close(solution.codes[better], expected[better], rtol=0, atol=0)


def test_activation_order_is_the_permuted_problem() -> None:
    w, gram, fmt = weight(6, 20), correlated(20), IntFormat(4, group_size=0)
    order = gram.diagonal().argsort(descending=True)
    ordered = gptq_solve(w, gram, fmt)
    permuted = gptq_solve(w[:, order], gram[order][:, order], fmt, act_order=False)
    torch.testing.assert_close(ordered.codes[..., order], permuted.codes, rtol=0, atol=0)


def test_matrices_of_a_batch_do_not_see_each_other() -> None:
    w = torch.stack([weight(4, 12, seed) for seed in range(3)])
    gram = torch.stack([correlated(12, seed=seed) for seed in range(3)])
    together = gptq_solve(w, gram, GROUP, weighted_search=True)
    for index in range(3):
        alone = gptq_solve(w[index], gram[index], GROUP, weighted_search=True)
        torch.testing.assert_close(together.codes[index], alone.codes[0], rtol=0, atol=0)
        torch.testing.assert_close(together.scale[index], alone.scale[0], rtol=0, atol=0)


def test_inverse_factor_is_upper_and_inverts() -> None:
    gram = torch.stack([correlated(15), correlated(15, seed=1)])
    factor, used = inverse_factor(gram, 0.01, 0.0)
    assert used == pytest.approx(0.01)
    torch.testing.assert_close(factor, factor.triu(), rtol=0, atol=0)
    mean = gram.double().diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damped = gram.double() / mean + 0.01 * torch.eye(15, dtype=torch.float64)
    unit = factor.mT @ factor @ damped
    torch.testing.assert_close(
        unit, torch.eye(15, dtype=torch.float64).expand(2, -1, -1), rtol=1e-8, atol=1e-8
    )


def test_inactive_inputs_are_rounded_to_nearest() -> None:
    w, gram = weight(6, 20), correlated(20)
    gram[3], gram[:, 3] = 0, 0
    gram[11], gram[:, 11] = 0, 0
    codes = gptq_solve(w, gram, GROUP, search=False).codes
    torch.testing.assert_close(codes[..., [3, 11]], rounded(w, GROUP)[..., [3, 11]], rtol=0, atol=0)


def test_no_active_input_at_all_is_rounding_to_nearest() -> None:
    w = weight(6, 20)
    solution = gptq_solve(w, torch.zeros(20, 20), GROUP, weighted_search=True)
    torch.testing.assert_close(solution.codes, rounded(w, GROUP, search=True), rtol=0, atol=0)
    assert solution.energy.sum() == 0


def test_damping_is_raised_until_the_matrix_factors() -> None:
    indefinite = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    assert gptq_solve(weight(3, 2), indefinite, IntFormat(4, group_size=0)).damping == pytest.approx(10)


def test_a_matrix_that_never_factors_is_refused() -> None:
    hopeless = torch.tensor([[1.0, 1e9], [1e9, 1.0]])
    with pytest.raises(CalibrationError, match=r"does not factor.*Fix: use more calibration data"):
        gptq_solve(weight(3, 2), hopeless, IntFormat(4, group_size=0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gram_is_refused(bad: float) -> None:
    gram = correlated(12)
    gram[2, 5] = bad
    with pytest.raises(CalibrationError, match="NaN or inf"):
        gptq_solve(weight(3, 12), gram, GROUP)


def test_shapes_and_options_are_checked() -> None:
    with pytest.raises(FormatError, match=r"Gram matrix \(1, 11, 11\)"):
        gptq_solve(weight(3, 12), correlated(11), GROUP)
    with pytest.raises(FormatError, match="act_order=False"):
        gptq_solve(weight(3, 12), correlated(12), GROUP, static_groups=False)


@pytest.mark.parametrize(("size", "block_columns"), [(8, 20), (8, 3), (30, 16), (8, 128)])
def test_refitted_groups_do_not_depend_on_the_blocks(size: int, block_columns: int) -> None:
    w, gram, fmt = weight(6, 45), correlated(45), IntFormat(4, group_size=size)
    options: dict[str, Any] = {"act_order": False, "static_groups": False, "search": False}
    whole = gptq_solve(w, gram, fmt, block_columns=45, **options)
    parts = gptq_solve(w, gram, fmt, block_columns=block_columns, **options)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-3, atol=1e-5)
    assert (parts.codes == whole.codes).float().mean() > 0.98


def test_second_call_gives_the_same_and_changes_no_input() -> None:
    w, gram = weight(6, 45), correlated(45, rank=10)
    before = w.clone(), gram.clone()
    one, two = gptq_solve(w, gram, GROUP), gptq_solve(w, gram, GROUP)
    torch.testing.assert_close(one.codes, two.codes, rtol=0, atol=0)
    torch.testing.assert_close((w, gram), before, rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 33),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([0, 1, 3, 8, 16]),
    rank=st.integers(1, 33),
    dead=st.integers(0, 5),
    order=st.sampled_from([(True, True), (False, True), (False, False)]),
    damping=st.sampled_from([0.0, 0.01, 1.0]),
    shrinkage=st.sampled_from([0.0, 0.5, 1.0]),
    block_columns=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    search=st.sampled_from([(False, False), (True, False), (True, True)]),
)
def test_any_problem_ends_in_legal_codes_that_lose_no_more_than_rounding(
    rows: int,
    columns: int,
    bits: int,
    symmetric: bool,
    group_size: int,
    rank: int,
    dead: int,
    order: tuple[bool, bool],
    damping: float,
    shrinkage: float,
    block_columns: int,
    dtype: torch.dtype,
    search: tuple[bool, bool],
) -> None:
    fmt = IntFormat(bits, symmetric, group_size)
    w = weight(rows, columns).to(dtype)
    gram = correlated(columns, rank=min(rank, columns), tokens=50)
    gram[:dead], gram[:, :dead] = 0, 0
    solution = gptq_solve(
        w,
        gram,
        fmt,
        damping=damping,
        shrinkage=shrinkage,
        act_order=order[0],
        static_groups=order[1],
        block_columns=block_columns,
        search=search[0],
        weighted_search=search[1],
    )
    assert solution.codes.shape == (1, rows, columns)
    assert tuple(solution.scale.shape) == fmt.scale_shape(1, rows, columns)
    assert solution.scale.dtype == fmt.scale_dtype
    assert int(solution.codes.min()) >= fmt.qmin
    assert int(solution.codes.max()) <= fmt.qmax
    assert bool((solution.loss <= solution.rounding_loss).all())
    expected = loss_of(w.float(), solution, fmt, gram)
    torch.testing.assert_close(solution.loss.double(), expected, rtol=1e-2, atol=1e-4)
