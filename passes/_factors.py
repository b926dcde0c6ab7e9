"""Rounding the dense factors of low-rank weights: each is a matrix of its own, with inputs of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxcompress.edits import ReviseWeight
from fxcompress.formats import FloatFormat, IntFormat, quantize_to_float_term
from fxcompress.formats.integer import make_term, quantize_to_term
from fxcompress.forms import DenseWeight, LowRank, SiteForm, WeightLayout, WeightTerm
from fxcompress.passes._gptq_solver import Solution
from fxcompress.passes._low_rank_solver import refit_left, relative_loss
from fxcompress.passes._selection import describe, fitting_format

Solver = Callable[[Tensor, Tensor, IntFormat], Solution]
"""``(w: [N, K], gram: [K, K], format)`` to codes."""


def has_dense_factors(form: SiteForm) -> bool:
    """Whether a low-rank term of the form has a factor that no pass has rounded yet."""
    return any(_dense(term) for term in form.terms)


def round_factors(name: str, form: SiteForm, fmt: IntFormat | FloatFormat, *, search: bool) -> ReviseWeight:
    """Every dense factor rounded to nearest, where codes are smaller."""
    notes: list[str] = []

    def rounded(factor: WeightTerm) -> WeightTerm:
        if not isinstance(factor, DenseWeight):
            return factor
        fitting = _smaller(factor.values, fmt, notes)
        if fitting is None:
            return factor
        layout = WeightLayout.rows(factor.values.shape)
        if isinstance(fitting, FloatFormat):
            return quantize_to_float_term(factor.values, layout, fitting)
        return quantize_to_term(factor.values, layout, fitting, search=search and fitting.bits < 8)

    terms = tuple(
        dataclasses.replace(term, u=rounded(term.u), v=rounded(term.v)) if isinstance(term, LowRank) else term
        for term in form.terms
    )
    return ReviseWeight(name, terms, f"factors {', '.join(dict.fromkeys(notes))}")


def solve_factors(
    name: str, form: SiteForm, target: Tensor, gram: Tensor, fmt: IntFormat, solve: Solver
) -> ReviseWeight:
    """Every dense factor rounded so that the outputs change least.

    The right factor multiplies the inputs; the left one multiplies what the *rounded* right one gives, so its
    Gram matrix is ``v̂ G v̂ᵀ``, and before it is rounded it is fitted again to make up for the right
    one's error.

    Args:
        name: The parameter.
        form: Its form.
        target: ``[N, K]``: the dense weight, for the error to report.
        gram: ``[K, K]``: second moments of the inputs.
        fmt: Number format.
        solve: Rounds one matrix.
    """
    notes: list[str] = []

    def rounded(w: Tensor, moments: Tensor, like: DenseWeight) -> WeightTerm:
        fitting = _smaller(like.values, fmt, notes)
        if not isinstance(fitting, IntFormat):
            return DenseWeight(w.to(like.values.dtype))
        found = solve(w, moments, fitting)
        return make_term(found.codes, found.scale, found.zero, WeightLayout.rows(w.shape), fitting)

    terms: list[WeightTerm] = []
    for term in form.terms:
        if not isinstance(term, LowRank) or not _dense(term):
            terms.append(term)
            continue
        u, v = term.u, term.v
        if isinstance(v, DenseWeight):
            whole = u.dense(torch.float32).double() @ v.values.double()
            v = rounded(v.values, gram, v)
            if isinstance(u, DenseWeight):
                fitted = refit_left(whole, v.dense(torch.float32), gram)
                u = DenseWeight(fitted.to(u.values.dtype))
        if isinstance(u, DenseWeight):
            inner = v.dense(torch.float32).double()
            u = rounded(u.values, (inner @ gram.double() @ inner.mT).float(), u)
        terms.append(dataclasses.replace(term, u=u, v=v))
    value = sum_of_matrices(terms)
    error = relative_loss(target, value, gram)
    words = ", ".join(dict.fromkeys(notes))
    return ReviseWeight(name, tuple(terms), f"factors {words}, output error {error:.2%}", error)


def sum_of_matrices(terms: Sequence[WeightTerm]) -> Tensor:
    """The terms of a plain matrix as ``[N, K]`` float64."""
    total = torch.zeros(())
    for term in terms:
        layout: WeightLayout = term.layout  # type: ignore[attr-defined]
        total = total + layout.to_matrix(term.dense(torch.float32))[0].double()
    return total


def _dense(term: WeightTerm) -> bool:
    return isinstance(term, LowRank) and any(isinstance(factor, DenseWeight) for factor in (term.u, term.v))


def _smaller(
    values: Tensor, fmt: IntFormat | FloatFormat, notes: list[str]
) -> IntFormat | FloatFormat | None:
    """The format for one factor, or None when its codes and scales would not be smaller than its numbers."""
    rows, columns = values.shape[-2:]
    fitting = fmt if isinstance(fmt, FloatFormat) else fitting_format(fmt, columns)[0]
    if fitting.bits_per_weight(rows, columns) >= torch.finfo(values.dtype).bits:
        notes.append(f"{rows} × {columns} kept {str(values.dtype).removeprefix('torch.')}")
        return None
    notes.append(describe(fitting))
    return fitting
