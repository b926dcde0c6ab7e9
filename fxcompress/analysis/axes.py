"""What a tensor dimension is made of: axes that are cut as one, found by unification.

A dimension is a row-major product of axes, ``(heads, head channels)``; one without axes has size 1. An
axis is a variable, or bound to a product (a view read it so) or to a concatenation (a split read it so).
Ops say which dimensions are the same; what is known about one then holds for all others, in whatever
order ops come:

    fused projection, rows 6144   split in three    →  concatenation of 2048, 2048, 2048
                                  each viewed       →  of (16, 128), (16, 128), (16, 128)
                                  attended together →  the three 16 are one axis: the heads

Sizes may be symbolic (batch, length). Two readings that do not fit together, such as ``(6, 4)`` and ``(4,
6)``, freeze every axis involved. Everything is amortised linear in the number of axes met.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

import sympy
import torch

__all__ = ["Axes", "Axis", "Dim", "Size", "quotient", "size_value"]

Size: TypeAlias = "int | sympy.Expr"


class Axis:
    """One axis; :class:`Axes` decides what it is bound to."""

    __slots__ = ("factors", "parent", "parts", "size")

    def __init__(self, size: Size, parts: tuple[Dim, ...] | None = None) -> None:
        self.size = size
        self.parent: Axis | None = None
        self.factors: Dim | None = None
        self.parts = parts

    @property
    def units(self) -> int:
        """The size of an axis that is not symbolic."""
        if not isinstance(self.size, int):
            raise TypeError(f"the size {self.size} is symbolic")
        return self.size


Dim: TypeAlias = "tuple[Axis, ...]"


def size_value(size: int | torch.SymInt) -> Size:
    """An int, or the expression of a symbolic size; adds no guard."""
    if isinstance(size, torch.SymInt):
        expression: sympy.Expr = size.node.expr
        return int(expression) if expression.is_Integer else expression
    return int(size)


def quotient(size: Size, divisor: Size) -> Size | None:
    """``size / divisor`` where that is an integer for all values of the symbols, else None."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size % divisor == 0 else None
    return _symbolic_quotient(size, divisor)


@lru_cache(maxsize=4096)
def _symbolic_quotient(size: Size, divisor: Size) -> Size | None:
    ratio = sympy.factor(sympy.sympify(size) / sympy.sympify(divisor))
    numerator, denominator = ratio.as_numer_denom()
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_Integer else numerator


class Axes:
    """All axes of one program, and why some may not be cut."""

    def __init__(self) -> None:
        self.frozen: list[tuple[Dim, str]] = []
        self.operations = 0

    # -- reading -------------------------------------------------------------------------------------------

    def root(self, axis: Axis) -> Axis:
        """The representative of all axes unified with ``axis``."""
        top = axis
        while top.parent is not None:
            top = top.parent
        while axis.parent is not None:
            axis.parent, axis = top, axis.parent
        return top

    def leaves(self, dim: Dim) -> list[Axis]:
        """The axes of a dimension with products expanded: variables and concatenations."""
        found: list[Axis] = []
        stack = list(reversed(dim))
        while stack:
            self.operations += 1
            axis = self.root(stack.pop())
            if axis.factors is None:
                found.append(axis)
            else:
                stack.extend(reversed(axis.factors))
        return found

    def variables(self, dim: Dim) -> Iterator[Axis]:
        """All unbound axes inside a dimension, repeated where they occur repeatedly."""
        for leaf in self.leaves(dim):
            if leaf.parts is None:
                yield leaf
            else:
                for part in leaf.parts:
                    yield from self.variables(part)

    def segments(self, dim: Dim) -> list[Dim]:
        """The dimension as the finest known concatenation."""
        leaves = self.leaves(dim)
        if not leaves or leaves[0].parts is None:
            return [tuple(leaves)]
        rest = tuple(leaves[1:])
        pieces = [piece for part in leaves[0].parts for piece in self.segments((*part, *rest))]
        if not rest:
            leaves[0].parts = tuple(pieces)  # nested ones flattened, so that the depth stays small
        return pieces

    @staticmethod
    def size(dim: Dim) -> Size:
        """The size of a dimension."""
        result: Size = 1
        for axis in dim:
            result = result * axis.size
        return result

    def count(self, dim: Dim) -> int:
        """The size of a dimension that is not symbolic."""
        return math.prod(axis.units for axis in dim)

    # -- building ------------------------------------------------------------------------------------------

    def new(self, size: Size) -> Dim:
        """A dimension of one new axis; none for size 1."""
        return () if size == 1 else (Axis(size),)

    def freeze(self, dim: Dim, reason: str) -> None:
        """No axis of the dimension may be cut, now or when more is known about it."""
        if dim:
            self.frozen.append((dim, reason))

    def new_frozen(self, size: Size, reason: str) -> Dim:
        """A new dimension that may not be cut."""
        dim = self.new(size)
        self.freeze(dim, reason)
        return dim

    def concat(self, parts: Sequence[Dim]) -> Dim:
        """The dimension in which the parts lie one after the other."""
        parts = [part for part in parts if self.size(part) != 0] or list(parts[:1])
        if len(parts) == 1:
            return parts[0]
        total: Size = 0
        for part in parts:
            total = total + self.size(part)
        if not isinstance(total, int):
            for part in parts:
                self.freeze(part, "it is concatenated with data of varying length")
        return (Axis(total, tuple(parts)),)

    def segment(self, dim: Dim, sizes: Sequence[Size], reason: str) -> list[Dim]:
        """Split a dimension into consecutive pieces; freezes it when a piece ends inside an axis."""
        queue = deque(self.segments(dim))
        pieces: list[Dim] = []
        for size in sizes:
            if size == 0:
                pieces.append(self.new(0))
                continue
            taken: list[Dim] = []
            while size != 0 and queue:
                self.operations += 1
                part = self._next(queue)
                held = self.size(part)
                if not isinstance(held, int) or not isinstance(size, int):
                    if held != size:
                        return self._unfit([dim], sizes, reason)
                elif held > size:
                    halves = self._cut(part, size)
                    if halves is None:
                        return self._unfit([dim], sizes, reason)
                    part, rest = halves
                    queue.extendleft(reversed(self.segments(rest)))
                    held = size
                taken.append(part)
                size = size - held
            if size != 0 or not taken:
                return self._unfit([dim], sizes, reason)
            pieces.append(self.concat(taken))
        return pieces

    def regroup(self, dims: Sequence[Dim], sizes: Sequence[Size], reason: str) -> list[Dim]:
        """What a reshape to ``sizes`` makes of dimensions; freezes those whose axes would be cut through."""
        leaves = deque(leaf for dim in dims for leaf in self.leaves(dim))
        result: list[Dim] = []
        for index, size in enumerate(sizes):
            taken: list[Axis] = []
            while size != 1:
                self.operations += 1
                axis = self.root(leaves.popleft()) if leaves else None
                if axis is None:
                    return [*result, *self._unfit([tuple(taken)], sizes[index:], reason)]
                rest = quotient(size, axis.size)
                if rest is not None:
                    taken.append(axis)
                    size = rest
                elif self._split(axis, size):
                    leaves.extendleft(reversed(self.leaves((axis,))))
                else:
                    return [*result, *self._unfit([tuple(taken), (axis, *leaves)], sizes[index:], reason)]
            result.append(tuple(taken))
        return result

    def unify(self, one: Dim, two: Dim, reason: str) -> None:
        """Both dimensions are cut alike; what does not fit is frozen.

        Outer axes that fit stay aligned whatever lies inside, because the sizes of both are equal.
        """
        if one == two:
            return
        left, right = deque(self.leaves(one)), deque(self.leaves(two))
        while left and right:
            self.operations += 1
            a, b = self.root(left.popleft()), self.root(right.popleft())
            if a.factors is not None or b.factors is not None:  # bound since, as part of the other side
                left.extendleft(reversed(self.leaves((a,))))
                right.extendleft(reversed(self.leaves((b,))))
            elif a.size == b.size:
                if not self._same(a, b, reason):
                    left.append(a)
                    right.append(b)
                    break
            elif self._split(a, b.size):
                left.extendleft(reversed(self.leaves((a,))))
                right.appendleft(b)
            elif self._split(b, a.size):
                right.extendleft(reversed(self.leaves((b,))))
                left.appendleft(a)
            else:
                left.append(a)
                right.append(b)
                break
        self.freeze(tuple(left), reason)
        self.freeze(tuple(right), reason)

    # -- binding -------------------------------------------------------------------------------------------

    def _same(self, a: Axis, b: Axis, reason: str) -> bool:
        """Unify two axes of equal size; False when they are concatenations that do not fit."""
        if a is b:
            return True
        if a.parts is None or b.parts is None:
            variable, other = (a, b) if a.parts is None else (b, a)
            variable.parent = other
            return True
        left, right = deque(self.segments((a,))), deque(self.segments((b,)))
        a.parent = b
        while left and right:
            self.operations += 1
            one, two = self._next(left), self._next(right)
            size, other_size = self.size(one), self.size(two)
            if size != other_size:
                if not isinstance(size, int) or not isinstance(other_size, int):
                    return False
                longer, common = (one, other_size) if size > other_size else (two, size)
                halves = self._cut(longer, common)
                if halves is None:
                    return False
                rest = self.segments(halves[1])
                if longer is one:
                    one = halves[0]
                    left.extendleft(reversed(rest))
                else:
                    two = halves[0]
                    right.extendleft(reversed(rest))
            self.unify(one, two, reason)
        return True

    def _next(self, queue: deque[Dim]) -> Dim:
        """Take the first piece of a concatenation, which may have become one itself."""
        first, *rest = self.segments(queue.popleft())
        queue.extendleft(reversed(rest))
        return first

    def _split(self, axis: Axis, outer: Size) -> bool:
        """Bind an axis to a product whose first factor has size ``outer``; False when that is impossible."""
        axis = self.root(axis)
        inner = quotient(axis.size, outer)
        if inner is None or axis.factors is not None or outer == 1 or inner == 1:
            return False
        if axis.parts is None:
            axis.factors = (Axis(outer), Axis(inner))
            return True
        counts = [quotient(self.size(part), inner) for part in axis.parts]
        if any(count is None for count in counts):
            return False
        shared: Dim | None = None
        outers: list[Dim] = []
        reason = "a reshape cuts through concatenated channels"
        for part, count in zip(axis.parts, counts, strict=True):
            assert count is not None
            head, tail = self.regroup([part], [count, inner], reason)
            outers.append(head)
            if shared is None:
                shared = tail
            else:
                self.unify(shared, tail, reason)
        assert shared is not None
        axis.parts, axis.factors = None, (*self.concat(outers), *shared)
        return True

    def _cut(self, part: Dim, at: int) -> tuple[Dim, Dim] | None:
        """Two pieces of a dimension that is no concatenation; None when ``at`` lies inside an axis."""
        leaves = self.leaves(part)
        first, rest = leaves[0], tuple(leaves[1:])
        inner, size = self.size(rest), first.size
        if not isinstance(inner, int) or not isinstance(size, int) or at % inner or first.parts is not None:
            return None
        head, tail = self.new(at // inner), self.new(size - at // inner)
        first.parts = (head, tail)
        return (*head, *rest), (*tail, *rest)

    def _unfit(self, dims: Sequence[Dim], sizes: Sequence[Size], reason: str) -> list[Dim]:
        for dim in dims:
            self.freeze(dim, reason)
        return [self.new_frozen(size, reason) for size in sizes]
