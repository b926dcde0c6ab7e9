"""The GPTQ rounding solver on plain tensors.

Minimises ``(w − ŵ) H (w − ŵ)ᵀ`` per output row over integer codes, column by column: each column is rounded
and its error is moved into the columns not rounded yet, along ``U`` with ``H⁻¹ = UᵀU`` (Frantar et al., 2022,
section 3).

Matrices are batched, ``w: [B, N, K]`` with ``gram: [B, K, K]``, so that experts and depthwise convolutions
are solved together. Inside, columns come first (``[B, K, N]``): one column is then contiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError, FormatError
from fxcompress.formats import IntFormat
from fxcompress.formats.integer import decode, encode, find_parameters

_FLOAT64_COLUMNS = 6144  # factor in float64 up to this K; beyond, a float64 Gram matrix costs too much memory
_ATTEMPTS = 8  # factorisations tried, each with ten times the damping
_FIRST_DAMPING = 1e-6  # of the second attempt when damping=0 did not factor

Parameters = tuple[Tensor, Tensor | None]  # scale, zero


@dataclass(frozen=True, eq=False)
class Solution:
    """What :func:`gptq_solve` found.

    Args:
        codes: ``[B, N, K]`` uint8.
        scale: ``[B, N, G]`` (``[B, 1, 1]`` per matrix) in the format's scale dtype.
        zero: uint8 like ``scale``, or None when symmetric.
        loss: ``[B, N]`` float32: ``(w − ŵ) H (w − ŵ)ᵀ`` of every row in the *given* Gram matrix.
        rounding_loss: ``[B, N]``: the same for rounding to nearest; never below ``loss``.
        energy: ``[B, N]``: ``w H wᵀ``, to make the losses relative.
        damping: Damping that was used: the one asked for, or more where the factorisation failed.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    loss: Tensor
    rounding_loss: Tensor
    energy: Tensor
    damping: float


def gptq_solve(
    w: Tensor,
    gram: Tensor,
    fmt: IntFormat,
    *,
    damping: float = 0.01,
    shrinkage: float = 0.0,
    act_order: bool = True,
    static_groups: bool = True,
    block_columns: int = 128,
    search: bool = True,
    weighted_search: bool = False,
    parameters: Parameters | None = None,
    keep: Tensor | None = None,
) -> Solution:
    """Round ``w`` so that its outputs on inputs with second moments ``gram`` change least.

    A row on which plain rounding happens to lose less in ``gram`` keeps the plain rounding, so no row ends
    worse than round-to-nearest. Columns of inputs that were never active carry no information about their
    error; they are rounded to nearest (the reference code sets them to zero, which other inputs would feel).

    Args:
        w: ``[B, N, K]`` or ``[N, K]``, floating and finite.
        gram: ``[B, K, K]`` or ``[K, K]`` (shared by all matrices): ``E[x xᵀ]``, finite.
        fmt: Number format.
        damping: Added to the diagonal, relative to its mean over active inputs. Default 0.01 (paper, section
            3.3); raised tenfold while the matrix does not factor.
        shrinkage: ρ in 0…1 of ``H ← (1 − ρ) H + ρ diag(H)``; 1 is rounding to nearest. Default 0.
        act_order: Round columns in descending order of ``diag H``. Default True (reference code,
            ``--act-order``).
        static_groups: Choose all scales before rounding, from the original weight. False: refit each group
            when it is reached, from the compensated weight; needs ``act_order=False``.
        block_columns: Columns between two updates of all later columns. Changes speed, not the method.
            Default 128.
        search: Search each range instead of covering it. Default True.
        weighted_search: Weight the searched errors with ``diag H``.
        parameters: ``(scale, zero)`` to use instead of finding them.
        keep: bool like ``w``: entries that stay exactly zero where it is False; ``w`` is zero there.

    Returns:
        The :class:`Solution`, always batched.

    Raises:
        FormatError: shapes do not belong together, or ``static_groups=False`` with ``act_order=True``.
        CalibrationError: ``gram`` is not finite, or does not factor even with much damping.

    Example:
        >>> solution = gptq_solve(torch.randn(8, 16), torch.eye(16), IntFormat(4, group_size=8))
        >>> solution.codes.shape, bool((solution.loss <= solution.rounding_loss).all())
        (torch.Size([1, 8, 16]), True)
    """
    w, gram = _checked(w, gram)
    if act_order and not static_groups:
        raise FormatError(
            "gptq_solve: groups refitted in activation order would need an index per column.",
            fix="static_groups=True, or act_order=False.",
        )
    diagonal = gram.diagonal(dim1=1, dim2=2).clamp_min(0)  # [B, K]

    def find(part: Tensor, start: int) -> Parameters:
        importance = diagonal[:, start : start + part.shape[2]] if search and weighted_search else None
        return _find_parameters(part, fmt, search, importance)

    given = parameters or find(w, 0)
    order = diagonal.argsort(dim=1, descending=True, stable=True) if act_order else _identity(diagonal)
    factor, used = inverse_factor(_permuted(gram, order), damping, shrinkage)
    index = order[:, :, None].expand(-1, -1, w.shape[1])  # [B, K, N]
    kept = None if keep is None else keep.reshape(w.shape).mT.gather(1, index)
    rounder = _Rounder(fmt, order, factor.float(), *given, kept)
    refit = None if static_groups or parameters is not None or fmt.group_size <= 0 else find
    found = rounder.run(w.float().mT.gather(1, index), block_columns, refit)
    codes = torch.empty_like(found).scatter_(1, index, found).mT.contiguous()
    return _better_rows(w, gram, fmt, codes, (rounder.scale, rounder.zero), given, used)


def _better_rows(
    w: Tensor,
    gram: Tensor,
    fmt: IntFormat,
    codes: Tensor,
    solved: Parameters,
    given: Parameters,
    damping: float,
) -> Solution:
    """Every row as solved, or rounded to nearest where that loses less."""
    weight = w.float()
    plain = encode(w, *given, fmt)
    loss = _losses(weight, codes, *solved, fmt, gram)
    plain_loss = _losses(weight, plain, *given, fmt, gram)
    keep = loss <= plain_loss  # [B, N]; false where either is NaN
    scale, zero = solved
    if scale is not given[0]:  # refitted groups: scales belong to the codes
        scale = torch.where(keep[..., None], scale, given[0])
        zero = None if zero is None or given[1] is None else torch.where(keep[..., None], zero, given[1])
    return Solution(
        codes=torch.where(keep[..., None], codes, plain),
        scale=scale,
        zero=zero,
        loss=torch.where(keep, loss, plain_loss),
        rounding_loss=plain_loss,
        energy=_quadratic(weight, gram),
        damping=damping,
    )


def inverse_factor(gram: Tensor, damping: float, shrinkage: float) -> tuple[Tensor, float]:
    """``U: [B, K, K]`` upper triangular with ``UᵀU`` proportional to the inverse of the regularised ``gram``.

    With J the reversal of all indices and ``J H J = L Lᵀ``, ``R = J L J`` is upper triangular and ``H = R
    Rᵀ``, so ``U = R⁻¹``: one factorisation instead of the usual two with an inverse between them.

    Raises:
        CalibrationError: no factorisation even after raising the damping.
    """
    dtype = torch.float64 if gram.shape[-1] <= _FLOAT64_COLUMNS else torch.float32
    h = gram.to(dtype)
    h = (h + h.mT) / 2
    diagonal = h.diagonal(dim1=1, dim2=2).clamp_min(0)  # [B, K]
    active = diagonal > 0
    mean = diagonal.sum(1, keepdim=True) / active.sum(1, keepdim=True).clamp_min(1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    h = h * ((1 - shrinkage) / mean[..., None]) * (active[:, :, None] & active[:, None, :])
    diagonal = torch.where(active, diagonal / mean, torch.ones_like(diagonal))
    level = torch.full_like(mean[:, 0], damping)  # [B]
    for _ in range(_ATTEMPTS):
        torch.diagonal(h, dim1=1, dim2=2).copy_(diagonal + level[:, None])
        lower, info = torch.linalg.cholesky_ex(h.flip(1, 2))
        failed = (info != 0) | ~torch.isfinite(lower).all(dim=2).all(dim=1)
        if not bool(failed.any()):
            eye = torch.eye(h.shape[-1], dtype=dtype, device=h.device).expand_as(h)
            return torch.linalg.solve_triangular(lower.flip(1, 2), eye, upper=True), float(level.max())
        level = torch.where(failed, (level * 10).clamp_min(_FIRST_DAMPING), level)
    raise CalibrationError(
        f"the Gram matrix of the inputs does not factor, even with damping {float(level.max()):g}.",
        fix="use more calibration data, or a higher damping.",
    )


class _Rounder:
    """Rounds columns one after the other.

    Args:
        fmt: Number format.
        order: ``[B, K]``: position → column.
        factor: ``U: [B, K, K]`` float32 over positions.
        scale: ``[B, N, G]`` or ``[B, 1, 1]``.
        zero: Like ``scale``, or None.
        keep: ``[B, K, N]`` bool over positions: where False, the code is that of zero. None: everywhere.
    """

    def __init__(
        self,
        fmt: IntFormat,
        order: Tensor,
        factor: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        keep: Tensor | None = None,
    ) -> None:
        self.keep = keep
        self.fmt, self.factor = fmt, factor
        self.pivot = factor.diagonal(dim1=1, dim2=2)  # [B, K]
        self.scale, self.zero = scale, zero
        self.group_of = order // fmt.group_size if fmt.group_size > 0 else torch.zeros_like(order)

    def run(
        self, columns: Tensor, block_columns: int, refit: Callable[[Tensor, int], Parameters] | None
    ) -> Tensor:
        """Codes ``[B, K, N]`` uint8 of ``columns: [B, K, N]`` float32, which is overwritten."""
        if refit is not None:
            self.scale = self.scale.clone()
            self.zero = None if self.zero is None else self.zero.clone()
        codes = torch.empty_like(columns, dtype=torch.uint8)
        cuts = self._cuts(columns.shape[1], block_columns, refit is not None)
        for start, end in itertools.pairwise(cuts):
            errors = self._block(columns, codes, start, end, refit)  # [B, end − start, N]
            if end < columns.shape[1]:
                columns[:, end:].baddbmm_(self.factor[:, start:end, end:].mT, errors, alpha=-1)
        return codes

    def _cuts(self, width: int, block_columns: int, refit: bool) -> list[int]:
        """Block boundaries; a group that is refitted must start on up-to-date columns, up to its own end."""
        size, step = self.fmt.group_size, block_columns
        if refit and size <= step:
            step -= step % size
        cuts = {width, *range(0, width, step)}
        return sorted(cuts | set(range(0, width, size))) if refit else sorted(cuts)

    def _block(
        self,
        columns: Tensor,
        codes: Tensor,
        start: int,
        end: int,
        refit: Callable[[Tensor, int], Parameters] | None,
    ) -> Tensor:
        errors = torch.empty_like(columns[:, start:end])
        scale, zero = self._spread(start, end)
        for i in range(start, end):
            if refit is not None and i % self.fmt.group_size == 0:
                self._refit(refit, columns, i)
                scale, zero = self._spread(start, end)
            k = i - start
            column, s, z = columns[:, i], scale[:, k], zero[:, k]  # [B, N] each
            code = (column / s).round_().add_(z).clamp_(self.fmt.qmin, self.fmt.qmax)
            if self.keep is not None:
                code = torch.where(self.keep[:, i], code, z)
            codes[:, i] = code
            error = (column - (code - z) * s).div_(self.pivot[:, i, None])
            errors[:, k] = error
            if i + 1 < end:
                columns[:, i + 1 : end].addcmul_(
                    self.factor[:, i, i + 1 : end, None], error[:, None], value=-1
                )
        return errors

    def _spread(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Scales and zero-points of the columns at some positions: ``[B, end − start, N or 1]`` float32."""
        index = self.group_of[:, start:end, None].expand(-1, -1, self.scale.shape[1])
        scale = self.scale.float().mT.gather(1, index)
        if self.zero is None:
            return scale, torch.full_like(scale, self.fmt.fixed_zero)
        return scale, self.zero.float().mT.gather(1, index)

    def _refit(self, find: Callable[[Tensor, int], Parameters], columns: Tensor, start: int) -> None:
        scale, zero = find(columns[:, start : start + self.fmt.group_size].mT, start)
        group = start // self.fmt.group_size
        self.scale[..., group] = scale[..., 0]
        if self.zero is not None and zero is not None:
            self.zero[..., group] = zero[..., 0]


def _checked(w: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    w = w.detach().unsqueeze(0) if w.dim() == 2 else w.detach()
    gram = gram.detach().unsqueeze(0).expand(len(w), -1, -1) if gram.dim() == 2 else gram.detach()
    if w.dim() != 3 or tuple(gram.shape) != (w.shape[0], w.shape[2], w.shape[2]):
        raise FormatError(
            f"gptq_solve: weight {tuple(w.shape)} and Gram matrix {tuple(gram.shape)}, expected [B, N, K] and"
            " [B, K, K]."
        )
    if not bool(torch.isfinite(gram).all()):
        raise CalibrationError(
            "the Gram matrix of the inputs contains NaN or inf.",
            fix="check the calibration data, and the model's dtype (float16 overflows).",
        )
    return w, gram


def _find_parameters(w: Tensor, fmt: IntFormat, search: bool, importance: Tensor | None) -> Parameters:
    """Scales and zero-points; ``importance: [B, K]`` or None."""
    if importance is None:
        return find_parameters(w, fmt, search=search)
    found = []
    for matrix, weights in zip(w, importance.float(), strict=True):
        active = weights if bool((weights > 0).any()) else torch.ones_like(weights)
        found.append(find_parameters(matrix[None], fmt, search=True, importance=active))
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def _identity(diagonal: Tensor) -> Tensor:
    return torch.arange(diagonal.shape[1], device=diagonal.device).expand_as(diagonal)


def _permuted(gram: Tensor, order: Tensor) -> Tensor:
    """``gram`` with rows and columns in ``order``."""
    batch = torch.arange(len(gram), device=gram.device)[:, None, None]
    return gram[batch, order[:, :, None], order[:, None, :]]


def _losses(
    w: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: IntFormat, gram: Tensor
) -> Tensor:
    return _quadratic(w - decode(codes, scale, zero, fmt, torch.float32), gram)


def _quadratic(rows: Tensor, gram: Tensor) -> Tensor:
    """``r H rᵀ`` of every row of ``[B, N, K]``: ``[B, N]`` float32."""
    return ((rows @ gram.float()) * rows).sum(-1).clamp_min(0)
