"""Give back with a thin pair of factors what rounding took from a weight.

    linear(x, dequantize_weight(codes))  →  linear(x, dequantize_weight(codes)) + linear(linear(x, v), u)

The factors are the best approximation of ``W − Ŵ`` in a metric: that of the inputs' second moments (Liu
et al., 2024, "EoRA", arXiv:2410.21271: the eigenspace of the activations), of their mean magnitudes
(Zhang et al., 2024, "LQER", arXiv:2402.02446), or plain (Yao et al., 2023, "ZeroQuant-V2",
arXiv:2303.08302). Rounding the rest again and repeating is the initialisation of Li et al., 2023, "LoftQ"
(arXiv:2310.08659).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.edits import Edit, Refuse, ReviseWeight
from fxcompress.errors import FormatError, RecipeError
from fxcompress.formats import IntFormat
from fxcompress.formats.integer import quantize_to_term
from fxcompress.forms import (
    CodebookWeight,
    DenseWeight,
    DoubleQuantizedCodebook,
    LowRank,
    QuantizedWeight,
    WeightLayout,
    WeightTerm,
)
from fxcompress.forms.double_quantized import round_to_codebook
from fxcompress.pass_base import BlockContext
from fxcompress.passes._factors import sum_of_matrices
from fxcompress.passes._low_rank import Metric, input_grams, no_factors
from fxcompress.passes._low_rank_solver import Decomposition, cholesky_root, decompose, relative_loss
from fxcompress.passes._magnitudes import mean_magnitude
from fxcompress.passes._moments import stages
from fxcompress.passes._selection import Candidate, Role, SelectivePass, candidates, fitting_format

_ROUNDED = (QuantizedWeight, CodebookWeight, DoubleQuantizedCodebook)


@dataclass(frozen=True)
class LowRankResidual(SelectivePass):
    """Add factors of the rounding error to every rounded weight.

    Put it behind ``quantize-weights`` or ``gptq``, and behind every pass that changes dense weights.

    Args:
        rank: Of the factors. Default 32 (LQER; EoRA uses 128 for models fifty times as large).
        metric: ``"outputs"``: least error of the outputs on calibration data (EoRA). ``"magnitudes"``: errors
            weighed by the mean magnitude of each input (LQER). ``"weights"``: plain (no data needed).
            Default ``"outputs"``.
        iterations: 1: keep the codes. n > 1: n − 1 times round ``W − u·v`` to nearest in the codes' own
            format and take the factors of what is missing then (LoftQ); the best of all is kept, measured in
            ``metric``. Not every step improves. Default 1.
        bits: Width of the factors' codes, 2…8, one scale per row; None keeps them in the model's dtype.
            With 8 (LQER) they take a quarter of the room of float32. Default None.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError, FormatError: an option is out of range.
        CalibrationError: the metric needs data and there are none, or they gave NaN or inf.

    Example:
        >>> LowRankResidual(rank=16, metric="weights", iterations=5).rank
        16
    """

    rank: int = 32
    metric: Literal["outputs", "magnitudes", "weights"] = "outputs"
    iterations: int = 1
    bits: int | None = None

    name: ClassVar[str] = "low-rank-residual"
    summary: ClassVar[str] = "Add a low-rank term that makes up for the rounding error of weights."
    source: ClassVar[str] = (
        "Liu et al., 2024 (EoRA, arXiv:2410.21271); Li et al., 2023 (LoftQ, arXiv:2310.08659)"
    )
    requires: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})
    provides: ClassVar[frozenset[str]] = frozenset({"low-rank-residual"})
    needs_calibration: ClassVar[bool] = True  # unless metric="weights"
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"low-rank-residual", "sparse-weights", "fused-siblings"}  # a dense term would fill the zeros
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("rank", "iterations"):
            value = getattr(self, option)
            if type(value) is not int or value < 1:
                raise RecipeError(f"{self.name}: {option}={value!r}, expected a positive integer.")
        if self.metric not in ("outputs", "magnitudes", "weights"):
            raise RecipeError(
                f"{self.name}: metric={self.metric!r}, expected 'outputs', 'magnitudes' or 'weights'."
            )
        try:
            _ = None if self.bits is None else IntFormat(bits=self.bits, symmetric=False, group_size=0)
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}") from None
        object.__setattr__(self, "needs_calibration", self.metric != "weights")

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`ReviseWeight` or a :class:`Refuse` for every weight of the block."""
        self.check_patterns(block.program)
        chosen = []
        for candidate in candidates(block):
            reason = self._unsuitable(block, candidate)
            if reason is None:
                chosen.append(candidate)
            else:
                yield Refuse(candidate.name, reason)
        for stage in stages(chosen):
            metrics = self._metrics(block, stage)
            for candidate in stage:
                yield self._edit(block, candidate, metrics[candidate.name])

    def _unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        reason = self.unselected(block.program, candidate.name)
        if reason is not None:
            return reason
        terms = block.state.form(candidate.name).terms
        if not any(isinstance(term, _ROUNDED) for term in terms):
            return "its weight is not rounded: there is no error to make up for"
        if candidate.role is not Role.MATRIX:
            return f"{candidate.role.value}: its columns were scaled before rounding, its error is small"
        if any(isinstance(term, LowRank) for term in terms):
            return "it has a low-rank term already"
        rows, columns = candidate.primary.layout.matrix_shape[1:]
        reason = no_factors(candidate.primary)
        if reason is None and self.rank > min(rows, columns):
            reason = f"rank {self.rank} is above what a {rows} × {columns} matrix has"
        return reason

    def _metrics(self, block: BlockContext, stage: Sequence[Candidate]) -> Mapping[str, Metric | str]:
        if self.metric == "weights":
            return {candidate.name: Metric(None) for candidate in stage}
        found: dict[str, Metric | str] = {}
        if self.metric == "magnitudes":
            for candidate in stage:
                scale = mean_magnitude(block, candidate)
                found[candidate.name] = "no calibration token reaches it" if scale is None else Metric(scale)
            return found
        for name, gram in input_grams(block, stage).items():
            found[name] = gram if isinstance(gram, str) else Metric(cholesky_root(gram), gram)
        return found

    def _edit(self, block: BlockContext, candidate: Candidate, metric: Metric | str) -> Edit:
        name, layout = candidate.name, candidate.primary.layout
        if isinstance(metric, str):
            return Refuse(name, metric)
        dense = block.state.dense_target(name).detach()
        target = layout.to_matrix(dense)[0].double()
        terms = block.state.form(name).terms
        first = _loss(target, sum_of_matrices(terms), metric)
        best: tuple[float, tuple[WeightTerm, ...]] | None = None
        for step in range(self.iterations):
            found = decompose(target - sum_of_matrices(terms), metric.root)
            low_rank = self._term(layout, found, dense.dtype)
            loss = _loss(target, sum_of_matrices((*terms, low_rank)), metric)
            if best is None or loss < best[0]:
                best = loss, (*terms, low_rank)
            if step + 1 < self.iterations:
                terms = _rounded_again(terms, target - sum_of_matrices((low_rank,)), dense.dtype)
        assert best is not None
        loss, terms = best
        new, old = sum(term.nbytes for term in terms), dense.numel() * dense.element_size()
        if new >= old:
            return Refuse(
                name, f"with factors of rank {self.rank} it would take {new} bytes, the weight {old}"
            )
        error = relative_loss(target, sum_of_matrices(terms), metric.gram)
        what = "weight" if metric.gram is None else "output"
        reason = f"rank {self.rank}, {what} error {error:.2%}"
        if first > 0:
            reason += f", {(loss / first) ** 0.5:.0%} of the rounding error is left"
        return ReviseWeight(name, terms, reason, None if metric.gram is None else error)

    def _term(self, layout: WeightLayout, found: Decomposition, dtype: torch.dtype) -> LowRank:
        u, v = (factor.to(dtype) for factor in found.factors(self.rank))
        if self.bits is None:
            return LowRank.of(layout, DenseWeight(u), DenseWeight(v))
        fmt = IntFormat(bits=self.bits, symmetric=False, group_size=0)
        return LowRank.of(layout, *(quantize_to_term(f, WeightLayout.rows(f.shape), fmt) for f in (u, v)))


def _loss(target: Tensor, value: Tensor, metric: Metric) -> float:
    """``‖(W − Ŵ)L‖²``."""
    gap = target - value
    root = metric.root
    weighed = gap if root is None else gap * root.double() if root.dim() == 1 else gap @ root.double()
    return float(weighed.square().sum())


def _rounded_again(terms: Sequence[WeightTerm], rest: Tensor, dtype: torch.dtype) -> tuple[WeightTerm, ...]:
    """The quantized term rounded to nearest for ``rest: [N, K]`` less the other terms."""
    others = [term for term in terms if not isinstance(term, _ROUNDED)]
    if others:
        rest = rest - sum_of_matrices(others)

    def new(term: WeightTerm) -> WeightTerm:
        if isinstance(term, CodebookWeight | DoubleQuantizedCodebook):
            return round_to_codebook(term, rest[None].to(dtype))
        if not isinstance(term, QuantizedWeight):
            return term
        value = term.layout.from_matrix(rest[None]).to(dtype)
        fmt, _ = fitting_format(term.format, rest.shape[1])
        return quantize_to_term(value, term.layout, fmt)

    return tuple(map(new, terms))
