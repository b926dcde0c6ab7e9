"""Unification of dimensions: what two readings of one dimension together say, and when they do not fit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.analysis.axes import Axes, Dim, quotient
from fxcompress.analysis.unit_positions import unit_positions


def sizes(axes: Axes, dim: Dim) -> list[object]:
    """The structure of a dimension: sizes of factors, a list for a concatenation."""
    return [
        leaf.size if leaf.parts is None else [sizes(axes, part) for part in leaf.parts]
        for leaf in axes.leaves(dim)
    ]


def test_a_variable_takes_the_structure_of_what_it_equals() -> None:
    axes = Axes()
    one, two = axes.new(24), (*axes.new(4), *axes.new(6))
    axes.unify(one, two, "")
    assert sizes(axes, one) == [4, 6]
    assert not axes.frozen


def test_structure_learned_later_reaches_everything_unified_before() -> None:
    axes = Axes()
    one, two = axes.new(12), axes.new(12)
    axes.unify(one, two, "")
    heads, _ = axes.regroup([two], [3, 4], "")
    assert sizes(axes, one) == [3, 4]
    assert next(axes.variables(one)) is axes.root(heads[0])


def test_a_fused_projection_is_understood_from_its_split() -> None:
    axes = Axes()
    rows = axes.new(36)
    parts = axes.segment(rows, [12, 12, 12], "")
    viewed = [axes.regroup([part], [3, 4], "") for part in parts]
    for heads, _ in viewed[1:]:
        axes.unify(viewed[0][0], heads, "")
    (heads,) = axes.leaves(viewed[0][0])
    assert unit_positions(axes, rows, heads)[1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]
    assert not axes.frozen


def test_heads_with_their_own_query_key_and_value() -> None:
    axes = Axes()
    rows = axes.new(24)
    heads, inner = axes.regroup([rows], [2, 12], "")
    axes.segment(inner, [4, 4, 4], "")
    assert [axes.count(part) for part in axes.segments(inner)] == [4, 4, 4]
    assert unit_positions(axes, rows, axes.leaves(heads)[0]).tolist() == [[*range(12)], [*range(12, 24)]]


def test_concatenated_heads_viewed_as_one_dimension_of_heads() -> None:
    axes = Axes()
    parts = [(*axes.new(4), *axes.new(8)), (*axes.new(2), *axes.new(8))]
    whole = axes.concat(parts)
    heads, channels = axes.regroup([whole], [6, 8], "")
    assert sizes(axes, heads) == [[[4], [2]]]
    assert axes.root(parts[0][1]) is axes.root(parts[1][1]) is axes.root(channels[0])
    assert not axes.frozen


def test_grouped_queries_move_with_their_key() -> None:
    axes = Axes()
    queries, keys = axes.new(8), axes.new(4)
    query_heads, channels = axes.regroup([queries], [4, 2], "")
    key_heads, key_channels = axes.regroup([keys], [2, 2], "")
    axes.unify(query_heads, (*key_heads, *axes.new(2)), "")
    axes.unify(channels, key_channels, "")
    unit = axes.leaves(key_heads)[0]
    label = unit_positions(axes, queries, unit)
    assert label.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert unit_positions(axes, keys, unit).tolist() == [[0, 1], [2, 3]]


def test_flattened_pictures_and_concatenated_channels() -> None:
    axes = Axes()
    channels, columns = axes.new(5), axes.new(245)
    axes.unify((*channels, *axes.new(49)), columns, "")
    assert unit_positions(axes, columns, axes.leaves(channels)[0])[3].tolist() == [*range(147, 196)]
    one, two, reader = axes.new(16), axes.new(32), axes.new(48)
    axes.unify(axes.concat([one, two]), reader, "")
    assert unit_positions(axes, reader, axes.leaves(two)[0])[4].tolist() == [20]


def test_concatenations_cut_at_other_places_are_refined() -> None:
    axes = Axes()
    left, right = [axes.new(3), axes.new(5)], [axes.new(6), axes.new(2)]
    axes.unify(axes.concat(left), axes.concat(right), "")
    assert [axes.count(piece) for piece in axes.segments(axes.concat(left))] == [3, 3, 2]
    assert not axes.frozen


@pytest.mark.parametrize("shapes", [((6, 4), (4, 6)), ((2, 9), (3, 6))])
def test_readings_that_do_not_fit_freeze_both(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    axes = Axes()
    one, two = ((*axes.new(a), *axes.new(b)) for a, b in shapes)
    axes.unify(one, two, "why")
    assert {reason for _, reason in axes.frozen} == {"why"}
    assert {axis for dim, _ in axes.frozen for axis in axes.variables(dim)} == {
        *axes.variables(one),
        *axes.variables(two),
    }


def test_a_slice_through_a_head_freezes_it() -> None:
    axes = Axes()
    rows = axes.new(12)
    axes.regroup([rows], [3, 4], "")
    pieces = axes.segment(rows, [6, 6], "why")
    assert [axes.count(piece) for piece in pieces] == [6, 6]
    assert {axis for dim, _ in axes.frozen for axis in axes.variables(dim)} >= {*axes.variables(rows)}


def test_symbolic_sizes_divide_without_guards() -> None:
    import sympy

    batch = sympy.Symbol("s0", positive=True, integer=True)
    assert quotient(4 * batch, batch) == 4
    assert quotient(4 * batch, 4) == batch
    assert quotient(batch, 4) is None
    axes = Axes()
    merged = axes.regroup([axes.new(batch), axes.new(4), axes.new(7)], [4 * batch, 7], "")
    assert [axes.size(dim) for dim in merged] == [4 * batch, 7]
    again = axes.regroup(merged, [batch, 4, 7], "")
    assert [axes.size(dim) for dim in again] == [batch, 4, 7]
    assert not axes.frozen


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_reading_keeps_the_size_and_every_position(data: st.DataObject) -> None:
    """Random products, splits, concatenations and unifications of dimensions of one size."""
    axes = Axes()
    size = data.draw(st.sampled_from([8, 12, 24, 36]))
    dims = [axes.new(size) for _ in range(data.draw(st.integers(2, 4)))]
    for _ in range(data.draw(st.integers(1, 6))):
        dim = data.draw(st.sampled_from(dims))
        how = data.draw(st.sampled_from(["view", "split", "join"]))
        if how == "view":
            outer = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            dims.append(tuple(x for part in axes.regroup([dim], [outer, size // outer], "") for x in part))
        elif how == "split":
            at = data.draw(st.integers(1, size - 1))
            dims.append(axes.concat(axes.segment(dim, [at, size - at], "")))
        else:
            axes.unify(dim, data.draw(st.sampled_from(dims)), "")
    frozen = {axis for dim, _ in axes.frozen for axis in axes.variables(dim)}
    for dim in dims:
        assert axes.count(tuple(axes.leaves(dim))) == size
        once = {axis for axis in axes.variables(dim) if [*axes.variables(dim)].count(axis) == 1}
        for axis in once - frozen:
            positions = unit_positions(axes, dim, axis)
            assert positions.shape[0] == axis.size
            assert positions.flatten().unique().numel() == positions.numel()
            assert int(positions.max()) < size
