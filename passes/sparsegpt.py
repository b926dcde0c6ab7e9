"""SparseGPT: choose zeros column by column, and let the weights that stay make up for them.

    linear(x, w)  →  linear(x, w′ · mask)
    linear(x, w)  →  linear(x, dequantize_weight(codes, scale, zero)), zero where pruned      with ``bits``

Frantar & Alistarh, 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"
(arXiv:2301.00774). Keeps: every use of the weight, its shape and dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.analysis.site_types import SiteKind
from fxcompress.edits import Edit, Refuse, SetWeight
from fxcompress.errors import CalibrationError, FormatError, RecipeError
from fxcompress.formats import IntFormat
from fxcompress.formats.integer import make_term
from fxcompress.pass_base import BlockContext
from fxcompress.passes._input_rows import matrix_count
from fxcompress.passes._moments import linear_grams, moments, stages
from fxcompress.passes._pruning import PruningPass
from fxcompress.passes._selection import Candidate, describe, fitting_format, not_smaller
from fxcompress.passes._sparse_solver import SparseSolution, sparsegpt_solve

_GRAM_NUMBERS = 1 << 28  # Gram matrices of many experts are collected in parts of this many numbers (1 GiB)


@dataclass(frozen=True)
class SparseGpt(PruningPass):
    """Prune weights, and update those that stay so that outputs on calibration data change least.

    Args:
        sparsity, pattern, padding, include, exclude: See :class:`PruningPass`.
        damping: Added to the diagonal of the Hessian, relative to its mean. Default 0.01 (paper).
        block_columns: Columns among which zeros are chosen at once. Default 128 (paper).
        bits: Also round the weights that stay to codes of this width, in the same sweep: an error of rounding
            is made up for like one of pruning. Default None: leave them in floating point.
        group_size, symmetric: Of the codes, as for ``gptq``. Default 64 and False.
        sequential: ``"stage"``: calibrate again after every set of weights with the same input. ``"block"``:
            once per block. Default ``"stage"``.

    Raises:
        RecipeError, FormatError: an option is out of range.
        CalibrationError: the data gave NaN or inf.

    Example:
        >>> sorted(SparseGpt(pattern="2:4", bits=8, group_size=0).provides)
        ['quantized-weights', 'sparse-weights']
    """

    damping: float = 0.01
    block_columns: int = 128
    bits: int | None = None
    group_size: int = 64
    symmetric: bool = False
    sequential: Literal["block", "stage"] = "stage"

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "Prune weights, the others making up for the loss; optionally round them too."
    source: ClassVar[str] = "Frantar & Alistarh, 2023 (SparseGPT, arXiv:2301.00774)"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.damping) not in (int, float) or not 0 <= self.damping < float("inf"):
            raise RecipeError(f"{self.name}: damping={self.damping!r}, expected a number from 0.")
        if type(self.block_columns) is not int or self.block_columns < 1:
            raise RecipeError(
                f"{self.name}: block_columns={self.block_columns!r}, expected a positive integer."
            )
        if not isinstance(self.symmetric, bool):
            raise RecipeError(f"{self.name}: symmetric={self.symmetric!r}, expected true or false.")
        if self.sequential not in ("block", "stage"):
            raise RecipeError(f"{self.name}: sequential={self.sequential!r}, expected 'block' or 'stage'.")
        fmt, (_, m) = self.format, self.groups
        if fmt is not None and fmt.group_size < 0:
            raise RecipeError(
                f"{self.name}: group_size={self.group_size}; one scale per matrix is not supported."
            )
        if fmt is not None and m and fmt.group_size % m:
            raise RecipeError(
                f"{self.name}: group_size={self.group_size} is no multiple of the {m} inputs of a pattern."
            )

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """Rounding, too, is provided when ``bits`` is given."""
        return frozenset({"sparse-weights"} | ({"quantized-weights"} if self.bits is not None else set()))

    @property
    def format(self) -> IntFormat | None:
        """The number format of what stays; None: the weight's own."""
        if self.bits is None:
            return None
        try:
            return IntFormat(bits=self.bits, symmetric=self.symmetric, group_size=self.group_size)
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}") from None

    def matrix_format(self) -> IntFormat | None:
        """See :meth:`Pass.matrix_format`."""
        return self.format

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield :class:`SetMask` (and :class:`SetWeight`) or a :class:`Refuse` for every weight."""
        chosen, refused = self.choose(block)
        yield from refused
        shares = self.shares(block)
        families = stages(chosen)
        known = linear_grams(block, chosen) if self.sequential == "block" else None
        for family in families:
            grams = linear_grams(block, family) if known is None else known
            for candidate in family:
                share = shares.get(candidate.name, float(self.sparsity))
                yield from self._edits(block, candidate, grams.get(candidate.name), share)

    def unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        """See :class:`PruningPass`; with ``bits`` codes must be smaller than the weight, too."""
        reason = super().unsuitable(block, candidate)
        if reason is None and self.format is not None:
            fmt, _ = fitting_format(self.format, candidate.primary.layout.matrix_shape[2])
            reason = not_smaller(fmt, candidate.primary, block.weight(candidate.name).dtype)
        return reason

    def _edits(
        self, block: BlockContext, candidate: Candidate, gram: Tensor | None, share: float
    ) -> Iterator[Edit]:
        name, layout = candidate.name, candidate.primary.layout
        matrix = layout.to_matrix(block.weight(name).detach())  # [B, N, K]
        fmt = None if self.format is None else fitting_format(self.format, matrix.shape[2])[0]
        parts = self._solutions(block, candidate, matrix, gram, share, fmt)
        if parts is None:
            yield Refuse(name, "no calibration token reaches it")
            return
        solutions, lost, energy = parts
        keep = torch.cat([s.keep for s in solutions]).reshape(matrix.shape)
        value = torch.cat([s.weight for s in solutions]).reshape(matrix.shape).to(matrix.dtype)
        if bool(keep.all()):
            yield Refuse(name, f"its share of zeros, {share:.2g}, comes to none")
            return
        error = (lost / energy) ** 0.5 if energy > 0 else 0.0
        note = f", output error {error:.2%}"
        used = max(s.damping for s in solutions)
        if used > self.damping:
            note += f", damping raised to {used:g}"
        yield self.edit(candidate, value, keep, note, error)
        if fmt is not None:
            codes, scale = (
                torch.cat([getattr(s, key) for s in solutions]).reshape(*matrix.shape[:2], -1)
                for key in ("codes", "scale")
            )
            zeros = [s.zero for s in solutions if s.zero is not None]
            zero = torch.cat(zeros).reshape(scale.shape) if zeros else None
            term = make_term(codes, scale, zero, layout, fmt)
            yield SetWeight(name, (term,), f"{describe(fmt)}, rounded while pruned", error)

    def _solutions(
        self,
        block: BlockContext,
        candidate: Candidate,
        matrix: Tensor,
        gram: Tensor | None,
        share: float,
        fmt: IntFormat | None,
    ) -> tuple[list[SparseSolution], float, float] | None:
        """Solutions of all matrices in parts, with their lost and total output energy; None without data."""
        site, columns = candidate.primary, matrix.shape[2]
        count = matrix_count(site)
        split = matrix.reshape(count, -1, columns)  # groups of a convolution become matrices
        mask = block.state.masks.get(candidate.name)
        keep = None if mask is None else mask.matrix.reshape(split.shape)
        step = max(1, _GRAM_NUMBERS // columns**2)
        solutions, lost, energy = [], 0.0, 0.0
        for start in range(0, count, step):
            part = slice(start, min(count, start + step))
            if site.kind is not SiteKind.LINEAR:
                gram = moments(block, candidate, range(part.start, part.stop))
            if gram is None:
                return None
            w = split[part].float()
            wide = gram.expand(len(w), -1, -1)
            found = self._solve(candidate.name, w, wide, share, fmt, None if keep is None else keep[part])
            gap = w - found.weight
            lost += float(((gap @ wide) * gap).double().sum().clamp_min(0))
            energy += float(((w @ wide) * w).double().sum())
            solutions.append(found)
        return solutions, lost, energy

    def _solve(
        self, name: str, w: Tensor, gram: Tensor, share: float, fmt: IntFormat | None, keep: Tensor | None
    ) -> SparseSolution:
        try:
            return sparsegpt_solve(
                w,
                gram,
                share,
                groups=self.groups,
                damping=float(self.damping),
                block_columns=self.block_columns,
                fmt=fmt,
                keep=keep,
            )
        except CalibrationError as error:
            raise CalibrationError(f"{self.name}: {name}: {error}") from error
