from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import FormatError
from fxcompress.forms import WeightLayout


def arange(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def test_linear_is_the_matrix_itself() -> None:
    w = arange(3, 5)
    layout = WeightLayout.rows(w.shape)
    assert layout == WeightLayout((3, 5), (0, 1))
    assert layout.matrix_shape == (1, 3, 5)
    assert torch.equal(layout.to_matrix(w), w[None])


def test_addmm_is_transposed() -> None:
    w = arange(5, 3)  # [K, N]
    layout = WeightLayout((5, 3), (1, 0))
    assert torch.equal(layout.to_matrix(w), w.t()[None])


def test_convolution_rows_multiply_unfolded_patches() -> None:
    w, x = torch.randn(4, 3, 2, 2), torch.randn(1, 3, 5, 5)
    matrix = WeightLayout.rows(w.shape).to_matrix(w)[0]
    patches = F.unfold(x, (2, 2))[0]  # [K, L]
    torch.testing.assert_close(matrix @ patches, F.conv2d(x, w)[0].flatten(1))


def test_transposed_convolution_rows_are_its_output_channels() -> None:
    w = arange(2, 4, 3, 3)  # [I, O, kh, kw]
    matrix = WeightLayout((2, 4, 3, 3), (1, 0, 2, 3)).to_matrix(w)
    assert matrix.shape == (1, 4, 18)
    assert torch.equal(matrix[0, 3], w[:, 3].flatten())


def test_experts_are_batches() -> None:
    w = arange(3, 5, 4)  # [E, K, N]
    layout = WeightLayout((3, 5, 4), (0, 2, 1), batch_dims=1)
    assert layout.matrix_shape == (3, 4, 5)
    assert torch.equal(layout.to_matrix(w), w.transpose(1, 2))


def test_several_row_dimensions() -> None:
    w = arange(5, 2, 3)  # [K, heads, head_dim], as an einsum may hold it
    layout = WeightLayout((5, 2, 3), (1, 2, 0), row_dims=2)
    assert layout.matrix_shape == (1, 6, 5)
    assert torch.equal(layout.to_matrix(w)[0, 4], w[:, 1, 1])


def test_no_reduction_dimension_means_one_input() -> None:
    assert WeightLayout((7,), (0,)).matrix_shape == (1, 7, 1)


@settings(deadline=None)
@given(data=st.data())
def test_from_matrix_inverts_to_matrix(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    perm = tuple(data.draw(st.permutations(range(len(shape)))))
    row_dims = data.draw(st.integers(1, len(shape)))
    batch_dims = data.draw(st.integers(0, len(shape) - row_dims))
    layout = WeightLayout(shape, perm, batch_dims, row_dims)
    w = arange(*shape)
    matrix = layout.to_matrix(w)
    assert matrix.shape == layout.matrix_shape
    assert torch.equal(layout.from_matrix(matrix), w)
    assert torch.equal(layout.from_matrix(matrix.contiguous()), w)


@pytest.mark.parametrize("perm", [(0,), (0, 0), (1, 2), (0, 1, 2), (-1, 0)])
def test_refuses_what_is_no_permutation(perm: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="no permutation of 2 dimensions"):
        WeightLayout((3, 4), perm)


@pytest.mark.parametrize(("batch_dims", "row_dims"), [(-1, 1), (0, 0), (2, 1), (1, 2), (0, 3)])
def test_refuses_counts_that_do_not_fit(batch_dims: int, row_dims: int) -> None:
    with pytest.raises(FormatError, match=r"do not fit shape \(3, 4\)"):
        WeightLayout((3, 4), (0, 1), batch_dims, row_dims)


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 4, 1)])
def test_refuses_a_parameter_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"expected \(3, 4\)"):
        WeightLayout.rows((3, 4)).to_matrix(torch.zeros(shape))


def test_is_hashable_and_compares_by_value() -> None:
    layouts = [WeightLayout((2, 2), perm, 0, rows) for perm, rows in product([(0, 1), (1, 0)], [1, 2])]
    assert len({*layouts, *layouts}) == 4
