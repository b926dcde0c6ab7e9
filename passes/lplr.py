"""Replace weights by two thin factors of low-bit codes, found with a random sketch and without data.

    linear(x, w)  →  linear(linear(x, dequantize_weight(v)), dequantize_weight(u))
    conv(x, w)    →  conv1x1(conv(x, v), u)

Saha, Srivastava & Pilanci, 2023, "Matrix Compression via Randomized Low Rank and Low Precision Factorization"
(LPLR, NeurIPS 2023, arXiv:2310.11028): the left factor is the rounded sketch ``Q(W S)`` of the columns,
the right one is the rounded least-squares solution for it, ``Q(L⁺ W)``, so that it makes up for the
rounding of the left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.edits import Edit, Refuse, SetWeight
from fxcompress.errors import FormatError, RecipeError
from fxcompress.formats import IntFormat
from fxcompress.formats.integer import quantize_to_term
from fxcompress.forms import LowRank, QuantizedWeight, WeightLayout
from fxcompress.pass_base import BlockContext
from fxcompress.passes._low_rank import check_share, no_factors
from fxcompress.passes._low_rank_solver import relative_loss
from fxcompress.passes._rank import aligned
from fxcompress.passes._selection import Candidate, Role, SelectivePass, candidates, describe, fitting_format


@dataclass(frozen=True)
class Lplr(SelectivePass):
    """Sketch the columns of every weight, round, solve for the other factor, round.

    Args:
        keep: Share of the weight's stored bits that the codes may take: rank ``⌊keep·N·K·b/(N·u_bits +
            K·v_bits)⌋`` for weights of b bits, scales aside. Default 0.5.
        rank: The same rank for every weight instead. Default None.
        u_bits, v_bits: Widths of the codes, 2…8. Default 8 (paper's main setting).
        group_size: Numbers that share a scale; 0 = one per row. Default 0. Ranges are minimum to maximum.
        power_iterations: Products with ``W Wᵀ`` that sharpen the sketch (Halko et al., 2011), orthogonalised
            in between. Default 2; 0 is the plain sketch.
        multiple: Ranks from ``keep`` are rounded down to a multiple of this. Default 8.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError, FormatError: an option is out of range.

    Example:
        >>> Lplr(keep=0.25).rank_for(4096, 4096, 16)
        1024
    """

    keep: float = 0.5
    rank: int | None = field(default=None, kw_only=True)
    u_bits: int = 8
    v_bits: int = 8
    group_size: int = 0
    power_iterations: int = 2
    multiple: int = field(default=8, kw_only=True)

    name: ClassVar[str] = "lplr"
    summary: ClassVar[str] = "Factor weights into low-bit codes with a random sketch (no data needed)."
    source: ClassVar[str] = "Saha et al., 2023 (LPLR, arXiv:2310.11028)"
    provides: ClassVar[frozenset[str]] = frozenset({"low-rank", "quantized-weights"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "low-rank", "sparse-weights"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "keep", self.keep, open_end=True)
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise RecipeError(f"{self.name}: rank={self.rank!r}, expected a positive integer.")
        for option, least in (("power_iterations", 0), ("multiple", 1), ("group_size", 0)):
            value = getattr(self, option)
            if type(value) is not int or value < least:
                raise RecipeError(f"{self.name}: {option}={value!r}, expected an integer from {least}.")
        try:
            _ = self._format(self.u_bits), self._format(self.v_bits)
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}") from None

    def rank_for(self, rows: int, columns: int, bits: int) -> int:
        """The rank that ``keep`` allows a matrix of numbers of ``bits`` bits."""
        room = self.keep * rows * columns * bits / (rows * self.u_bits + columns * self.v_bits)
        return aligned(math.floor(room + 1e-9), self.multiple, up=False)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetWeight` or a :class:`Refuse` for every weight of the block."""
        self.check_patterns(block.program)
        for candidate in candidates(block):
            reason = self.unselected(block.program, candidate.name)
            if reason is None and candidate.role is not Role.MATRIX:
                reason = f"{candidate.role.value}: left to quantize-weights"
            reason = reason or no_factors(candidate.primary)
            if reason is not None:
                yield Refuse(candidate.name, reason)
                continue
            yield self._edit(block, candidate)

    def _format(self, bits: int) -> IntFormat:
        return IntFormat(bits=bits, symmetric=False, group_size=self.group_size)

    def _edit(self, block: BlockContext, candidate: Candidate) -> Edit:
        name, layout = candidate.name, candidate.primary.layout
        weight = block.weight(name).detach()
        matrix = layout.to_matrix(weight)[0]
        rows, columns = matrix.shape
        width = torch.finfo(weight.dtype).bits
        rank = self.rank_for(rows, columns, width) if self.rank is None else self.rank
        small = min(rows, columns)
        if self.rank is not None and rank > small:
            return Refuse(name, f"rank {rank} is above what a {rows} × {columns} matrix has")
        rank = min(rank, small)
        if rank < 1:
            return Refuse(name, f"keep={self.keep:g} of {rows} × {columns} numbers does not pay for rank 1")
        u, v = self.factors(matrix, rank, block.generator)
        term = LowRank.of(layout, u, v)
        if term.nbytes >= weight.numel() * weight.element_size():
            return Refuse(name, f"rank {rank} takes {term.nbytes} bytes, the weight {weight.nbytes}")
        value = layout.to_matrix(term.dense(torch.float32))[0]
        words = ", ".join(dict.fromkeys((describe(u.format), describe(v.format))))
        error = relative_loss(matrix, value, None)
        return SetWeight(name, (term,), reason=f"rank {rank} of {small}, {words}, weight error {error:.2%}")

    def factors(
        self, weight: Tensor, rank: int, generator: torch.Generator
    ) -> tuple[QuantizedWeight, QuantizedWeight]:
        """Codes of ``u: [N, rank]`` and ``v: [rank, K]`` for ``weight: [N, K]``."""
        w = weight.double()
        sketch = torch.randn(w.shape[1], rank, generator=generator, dtype=torch.float64).to(w.device)
        left = w @ (sketch / math.sqrt(rank))
        for _ in range(self.power_iterations):
            basis, _ = torch.linalg.qr(left)
            left = w @ (w.mT @ basis)
        u = self._rounded(left, self.u_bits, weight.dtype)
        right = torch.linalg.lstsq(u.dense(torch.float64), w, driver="gelsd").solution
        return u, self._rounded(right, self.v_bits, weight.dtype)

    def _rounded(self, matrix: Tensor, bits: int, dtype: torch.dtype) -> QuantizedWeight:
        fmt, _ = fitting_format(self._format(bits), matrix.shape[1])
        return quantize_to_term(matrix.to(dtype), WeightLayout.rows(matrix.shape), fmt)
