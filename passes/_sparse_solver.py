"""The SparseGPT solver on plain tensors: choose zeros, and let the weights that stay make up for them.

Minimises ``½ (w − ŵ) H (w − ŵ)ᵀ`` per output row over weights with a given number of zeros, column by column:
a column's error is moved into the columns behind it along U with ``H⁻¹ = UᵀU`` (Frantar & Alistarh, 2023,
arXiv:2301.00774, section 3). With a number format the weights that stay are rounded in the same sweep.

Matrices are batched, ``w: [B, N, K]`` with ``gram: [B, K, K]``. Inside, columns come first (``[B, K, N]``).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError, FormatError
from fxcompress.formats import IntFormat
from fxcompress.formats.integer import find_parameters, spread
from fxcompress.passes._gptq_solver import inverse_factor
from fxcompress.passes._pruning import keep_groups, zeros_of


@dataclass(frozen=True, eq=False)
class SparseSolution:
    """What :func:`sparsegpt_solve` found.

    Args:
        weight: ``[B, N, K]`` float32, exactly zero where not kept; dequantized codes with a format.
        keep: ``[B, N, K]`` bool.
        codes: ``[B, N, K]`` uint8 (that of zero where not kept), or None without a format.
        scale, zero: Of the codes, as :func:`find_parameters` gives them.
        loss: ``[B, N]`` float64: Σe²/2 of the sweep. Equals ``½ (w − ŵ) H (w − ŵ)ᵀ`` with the *regularised*
            H, see :func:`regularised`.
        damping: Damping that was used.
    """

    weight: Tensor
    keep: Tensor
    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    loss: Tensor
    damping: float


def sparsegpt_solve(
    w: Tensor,
    gram: Tensor,
    share: float,
    *,
    groups: tuple[int, int] = (0, 0),
    damping: float = 0.01,
    block_columns: int = 128,
    fmt: IntFormat | None = None,
    keep: Tensor | None = None,
) -> SparseSolution:
    """Prune ``w`` so that its outputs on inputs with second moments ``gram`` change least.

    Zeros are chosen block of columns by block of columns, among all rows of a matrix, by ``w²/U_jj²``; the
    count is ``⌊share · N · K⌋`` of every matrix exactly (blocks share it by cumulative rounding). With
    ``groups`` n of every m columns stay, chosen from the weights as updated by the columns before. Columns of
    inputs that were never active go first.

    Args:
        w: ``[B, N, K]`` or ``[N, K]``, floating and finite.
        gram: ``[B, K, K]`` or ``[K, K]``: ``E[x xᵀ]``, finite.
        share: Of zeros, 0 ≤ s < 1; not used with ``groups``.
        groups: ``(n, m)``, or ``(0, 0)``.
        damping: Added to the diagonal, relative to its mean. Default 0.01 (paper).
        block_columns: Columns among which zeros are chosen at once. Default 128 (paper).
        fmt: Number format of what stays; groups of it are fitted when they are reached. None: no rounding.
        keep: bool like ``w``: entries that are zero already stay so, and count.

    Raises:
        FormatError: shapes do not belong together.
        CalibrationError: ``gram`` is not finite, or does not factor.

    Example:
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> found = sparsegpt_solve(torch.tensor([[1.0, 0.9]]), gram, 0.5, damping=0.0)
        >>> [round(x, 6) for x in found.weight.flatten().tolist()], round(float(found.loss), 6)
        ([0.0, 1.4], 0.75)
    """
    w = w.detach().float()
    w = w.unsqueeze(0) if w.dim() == 2 else w
    gram = gram.unsqueeze(0).expand(len(w), -1, -1) if gram.dim() == 2 else gram
    if w.dim() != 3 or tuple(gram.shape) != (w.shape[0], w.shape[2], w.shape[2]):
        raise FormatError(
            f"sparsegpt_solve: weight {tuple(w.shape)} and Gram matrix {tuple(gram.shape)}, expected"
            " [B, N, K] and [B, K, K]."
        )
    if not bool(torch.isfinite(gram).all()):
        raise CalibrationError(
            "the Gram matrix of the inputs contains NaN or inf.",
            fix="check the calibration data, and the model's dtype (float16 overflows).",
        )
    factor, used = inverse_factor(gram, damping, 0.0)
    sweep = _Sweep(w, gram, factor.float(), share, groups, fmt, keep)
    sweep.run(block_columns)
    unit = _mean_activity(gram).double()  # the factor is that of H divided by this
    return SparseSolution(
        weight=sweep.result.mT.contiguous(),
        keep=sweep.keep.mT.contiguous(),
        codes=None if fmt is None else sweep.codes.mT.contiguous(),
        scale=sweep.scale,
        zero=sweep.zero,
        loss=sweep.loss * unit[:, None],
        damping=used,
    )


def regularised(gram: Tensor, damping: float) -> Tensor:
    """``[B, K, K]`` float64: the Hessian whose inverse is factored; inactive inputs get the mean activity."""
    h = (gram.double() + gram.double().mT) / 2
    diagonal = h.diagonal(dim1=1, dim2=2).clamp_min(0)
    active = diagonal > 0
    mean = _mean_activity(gram).double()[:, None]
    h = h * (active[:, :, None] & active[:, None, :])
    torch.diagonal(h, dim1=1, dim2=2).copy_(torch.where(active, diagonal, mean) + damping * mean)
    return h


def _mean_activity(gram: Tensor) -> Tensor:
    """``[B]``: mean of the diagonal over active inputs; 1 without any."""
    diagonal = gram.diagonal(dim1=1, dim2=2).clamp_min(0)
    mean = diagonal.sum(1) / (diagonal > 0).sum(1).clamp_min(1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


class _Sweep:
    """One pass over the columns. Arguments as for :func:`sparsegpt_solve`; columns first inside."""

    def __init__(
        self,
        w: Tensor,
        gram: Tensor,
        factor: Tensor,
        share: float,
        groups: tuple[int, int],
        fmt: IntFormat | None,
        keep: Tensor | None,
    ) -> None:
        self.columns = w.mT.contiguous().clone()  # [B, K, N], overwritten
        self.factor, self.share, self.groups, self.fmt = factor, share, groups, fmt
        self.pivot = factor.diagonal(dim1=1, dim2=2)  # [B, K]
        self.dead = gram.diagonal(dim1=1, dim2=2) <= 0  # [B, K]
        self.free = None if keep is None else keep.reshape(w.shape).mT.contiguous()
        self.result = torch.empty_like(self.columns)
        self.keep = torch.ones_like(self.columns, dtype=torch.bool)
        self.codes = torch.empty_like(self.columns, dtype=torch.uint8)
        self.loss = torch.zeros(w.shape[0], w.shape[1], dtype=torch.float64, device=w.device)
        self.scale: Tensor | None = None
        self.zero: Tensor | None = None
        if fmt is not None:
            self.scale, self.zero = find_parameters(w, fmt, search=True)

    def run(self, block_columns: int) -> None:
        width = self.columns.shape[1]
        cuts = self._cuts(width, block_columns)
        for start, end in itertools.pairwise(cuts):
            if self.fmt is not None and self.fmt.group_size > 0 and start % self.fmt.group_size == 0:
                self._refit(start)
            if not self.groups[1]:
                self._choose(start, end)
            errors = self._block(start, end)
            if end < width:
                self.columns[:, end:].baddbmm_(self.factor[:, start:end, end:].mT, errors, alpha=-1)

    def _cuts(self, width: int, block_columns: int) -> list[int]:
        """Block boundaries, at which every group of m and every group of the format begins."""
        m = max(1, self.groups[1])
        step = max(m, block_columns - block_columns % m)
        cuts = {width, *range(0, width, step)}
        size = 0 if self.fmt is None else self.fmt.group_size
        if 0 < size < width:
            if size % m:
                raise FormatError(f"sparsegpt_solve: groups of {m} do not divide scale groups of {size}.")
            cuts = {width, *range(0, width, min(size, step) if size % min(size, step) == 0 else size)}
        return sorted(cuts)

    def _scores(self, start: int, end: int) -> Tensor:
        """``[B, end − start, N]``: what pruning an entry now would cost; −1 where it is zero for good."""
        score = (self.columns[:, start:end] / self.pivot[:, start:end, None]).square()
        score = score.masked_fill(self.dead[:, start:end, None], 0)
        return score if self.free is None else score.masked_fill(~self.free[:, start:end], -1)

    def _choose(self, start: int, end: int) -> None:
        """The zeros of a block: as many as bring the count up to the share of all columns so far."""
        score = self._scores(start, end)
        rows = score.shape[2]
        gone = zeros_of(self.share, end * rows) - zeros_of(self.share, start * rows)
        index = score.flatten(1).sort(dim=1, stable=True).indices[:, :gone]
        kept = torch.ones_like(score, dtype=torch.bool).flatten(1).scatter_(1, index, False)
        kept = kept.view_as(score)
        self.keep[:, start:end] = kept if self.free is None else kept & self.free[:, start:end]

    def _block(self, start: int, end: int) -> Tensor:
        n, m = self.groups
        errors = torch.empty_like(self.columns[:, start:end])
        scale, zero = self._spread(start, end)
        for i in range(start, end):
            if m and (i - start) % m == 0:
                stop = min(i + m, end)
                kept = keep_groups(self._scores(i, stop).mT, n, m).mT
                self.keep[:, i:stop] = kept if self.free is None else kept & self.free[:, i:stop]
            k = i - start
            column, kept = self.columns[:, i], self.keep[:, i]  # [B, N] each
            value = torch.where(kept, column, 0.0)
            if self.fmt is not None and scale is not None and zero is not None:
                s, z = scale[:, k], zero[:, k]
                code = (column / s).round_().add_(z).clamp_(self.fmt.qmin, self.fmt.qmax)
                code = torch.where(kept, code, z)
                self.codes[:, i] = code
                value = (code - z) * s
            self.result[:, i] = value
            error = (column - value).div_(self.pivot[:, i, None])
            self.loss += error.double().square() / 2
            errors[:, k] = error
            if i + 1 < end:
                self.columns[:, i + 1 : end].addcmul_(
                    self.factor[:, i, i + 1 : end, None], error[:, None], value=-1
                )
        return errors

    def _refit(self, start: int) -> None:
        """Scales of the group that begins, from its columns as they are now."""
        assert self.fmt is not None
        assert self.scale is not None
        size = self.fmt.group_size
        part = self.columns[:, start : start + size].mT
        own = IntFormat(bits=self.fmt.bits, symmetric=self.fmt.symmetric, group_size=part.shape[2])
        scale, zero = find_parameters(part, own, search=True)
        self.scale[..., start // size] = scale[..., 0]
        if self.zero is not None and zero is not None:
            self.zero[..., start // size] = zero[..., 0]

    def _spread(self, start: int, end: int) -> tuple[Tensor | None, Tensor | None]:
        """Scales and zero-points of some columns: ``[B, end − start, N or 1]`` float32."""
        if self.fmt is None or self.scale is None:
            return None, None
        width, size = self.columns.shape[1], self.fmt.group_size

        def columns(table: Tensor) -> Tensor:
            wide = spread(table.float(), size, width)
            wide = wide.expand(-1, -1, width) if wide.shape[-1] == 1 else wide
            return wide[..., start:end].mT

        scale = columns(self.scale)
        zero = torch.full_like(scale, self.fmt.fixed_zero) if self.zero is None else columns(self.zero)
        return scale, zero
