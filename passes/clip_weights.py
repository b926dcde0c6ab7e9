"""Clip weights before rounding, where the outputs on calibration data gain by a finer grid.

    W  →  clamp(W, −m, m),  one m per row and group of inputs

The clipping part of AWQ (Lin et al., 2023, arXiv:2306.00978; authors' code): the range of a group may be
shrunk down to 55 % when the error of the group's partial output, rounding included, becomes smaller. Changes
the function: a clipped weight is another weight. Put it behind ``awq`` and before the pass that rounds, which
should then cover the full range (``search: false``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.analysis.attention import find_attention
from fxcompress.edits import Edit, Refuse, SetTensor
from fxcompress.errors import RecipeError
from fxcompress.formats import IntFormat
from fxcompress.pass_base import BlockContext, Pass
from fxcompress.passes._balancing import check_weight_format, make_target
from fxcompress.passes._input_rows import Rows, matrix_count, unsupported
from fxcompress.passes._output_error import quantized, sample_rows
from fxcompress.passes._selection import Candidate, Role, SelectivePass, candidates, fitting_format

_ROWS = 1 << 24  # numbers of one partial output held at a time


@dataclass(frozen=True)
class ClipWeights(SelectivePass):
    """Shrink the range of every row and group where that lowers the output error.

    Args:
        bits, group_size, symmetric: Number format of the weights that follows; a recipe that goes on with
            another is refused. Default 4 bits, groups of 64, asymmetric.
        steps: Ranges m·(1 − i/(2·steps)), i = 0 … steps−1, are tried. Default 10 (the authors' code).
        tokens: Number of calibration tokens they are judged on. Default 256 (the authors take 512).
        scores: Also clip weights that make queries and keys, which the authors leave alone because a
            score multiplies two errors. Default False. They are found by dataflow.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError, FormatError: an option is out of range, or another format follows.
        CalibrationError: the calibration data gave NaN or inf.

    Example:
        >>> ClipWeights(bits=3).preserves_function
        False
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    steps: int = 10
    tokens: int = 256
    scores: bool = False

    name: ClassVar[str] = "clip-weights"
    summary: ClassVar[str] = "Clip weights where a finer grid lowers the error of outputs."
    source: ClassVar[str] = "Lin et al., 2023 (AWQ, arXiv:2306.00978), authors' code"
    provides: ClassVar[frozenset[str]] = frozenset({"clipped-weights"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized-weights", "clipped-weights", "low-rank"})
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("steps", "tokens"):
            if type(getattr(self, option)) is not int or getattr(self, option) < 1:
                raise RecipeError(
                    f"{self.name}: {option}={getattr(self, option)!r}, expected a positive integer."
                )
        if not isinstance(self.scores, bool):
            raise RecipeError(f"{self.name}: scores={self.scores!r}, expected true or false.")
        if self._format().group_size < 0:
            raise RecipeError(
                f"{self.name}: group_size={self.group_size}; one range per matrix is not supported.",
                fix="group_size=0 gives one range per row.",
            )

    def _format(self) -> IntFormat:
        return make_target(self.name, self.bits, self.group_size, self.symmetric, None).weights

    def check_later(self, later: Sequence[Pass]) -> None:
        """See :meth:`Pass.check_later`."""
        check_weight_format(self.name, self._format(), later)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetTensor` or a :class:`Refuse` for every matrix of the block."""
        self.check_patterns(block.program)
        attentions = find_attention(block.program)
        scores = frozenset(n for site in attentions for n in (*site.query_weights, *site.key_weights))
        chosen = []
        for candidate in candidates(block):
            reason = self._unsuitable(block, candidate, scores)
            if reason is None:
                chosen.append(candidate)
            else:
                yield Refuse(candidate.name, reason)
        if not chosen:
            return
        samples = sample_rows(block, [candidate.primary for candidate in chosen], self.tokens)
        for candidate in chosen:
            yield self._clip(block, candidate, samples[candidate.primary])

    def _unsuitable(self, block: BlockContext, candidate: Candidate, scores: frozenset[str]) -> str | None:
        site = candidate.primary
        reason = self.unselected(block.program, candidate.name)
        if reason is not None:
            return reason
        if candidate.role is not Role.MATRIX:
            return f"{candidate.role.value}, rounded at 8 bits, where clipping gains nothing"
        if len(candidate.uses) > 1:
            return "used at several places, whose inputs would ask for different ranges"
        if candidate.name in scores and not self.scores:
            return "makes queries or keys (scores=False)"
        why = unsupported(site)
        if why is None and matrix_count(site) != site.layout.matrix_shape[0]:
            why = "its channels form groups, whose rows are told apart by convolution only"
        return why

    def _clip(self, block: BlockContext, candidate: Candidate, rows: Sequence[Rows]) -> Edit:
        name, layout = candidate.name, candidate.primary.layout
        weight = block.weight(name).detach()
        matrix = layout.to_matrix(weight)  # [B, N, K]
        fmt, _ = fitting_format(self._format(), matrix.shape[-1])
        if not any(part.values.shape[1] for part in rows):
            return Refuse(name, "no calibration token reaches it")
        bound = best_bounds(matrix.float(), rows, fmt, self.steps)  # [B, N, G]
        size = fmt.group_size or matrix.shape[-1]
        wide = bound.repeat_interleave(size, -1)[..., : matrix.shape[-1]].to(matrix.dtype)
        clipped = torch.minimum(torch.maximum(matrix, -wide), wide)
        changed = int((clipped != matrix).sum())
        if not changed:
            return Refuse(name, "no smaller range lowers the output error")
        share = float((clipped != matrix).any(-1).float().mean())
        reason = f"clipped {changed} of {matrix.numel()} weights, in {share:.0%} of the rows"
        return SetTensor(name, layout.from_matrix(clipped).contiguous(), reason)


def best_bounds(matrix: Tensor, rows: Sequence[Rows], fmt: IntFormat, steps: int) -> Tensor:
    """The bound of every row and group with the least error of the partial output, rounding included.

    Args:
        matrix: ``[B, N, K]`` float32.
        rows: Input rows of the matrices.
        fmt: Number format that follows, per row or per group.
        steps: Number of bounds tried.

    Returns:
        ``[B, N, G]`` float32: m·(1 − i/(2·steps)) with m the largest magnitude.
    """
    _, count, columns = matrix.shape
    size = fmt.group_size or columns
    largest = torch.stack([part.abs().amax(-1) for part in matrix.split(size, -1)], -1)  # [B, N, G]
    best = largest.clone()
    for index, part in enumerate(matrix.split(size, -1)):
        own = IntFormat(bits=fmt.bits, symmetric=fmt.symmetric, group_size=0)
        gram = _gram(rows, matrix.shape[0], slice(index * size, index * size + part.shape[-1]), matrix)
        least = torch.full((matrix.shape[0], count), torch.inf)
        for step in range(steps):
            bound = largest[..., index] * (1 - step / (2 * steps))  # [B, N]
            clipped = torch.minimum(torch.maximum(part, -bound.unsqueeze(-1)), bound.unsqueeze(-1))
            gap = quantized(clipped, own) - part  # [B, N, L]
            error = ((gap @ gram) * gap).sum(-1).cpu()  # [B, N] = Σ_t (Σ_k x_tk gap_k)²
            better = error < least
            least = torch.where(better, error, least)
            best[..., index] = torch.where(better.to(best.device), bound, best[..., index])
    return best


def _gram(rows: Sequence[Rows], batches: int, columns: slice, like: Tensor) -> Tensor:
    """``Σ_t x xᵀ`` of some columns: ``[B or 1, L, L]``; zero for matrices that no row meets."""
    length = columns.stop - columns.start
    every = all(part.first is None and len(part.values) == 1 for part in rows)
    gram = torch.zeros(1 if every else batches, length, length, device=like.device)
    for part in rows:
        x = part.values[..., columns].float()
        first = 0 if part.first is None else part.first
        gram[first : first + len(x)] += x.mT @ x
    return gram
