"""Low-rank approximation of one matrix in the metric of its inputs, on plain tensors, in float64.

With ``G = E[x xᵀ]`` and any root ``G = L Lᵀ``, ``E‖(W − Ŵ)x‖² = ‖(W − Ŵ)L‖²_F``. So the best Ŵ of rank k
comes from the singular value decomposition ``W L = U Σ Vᵀ``, and what it loses is the sum of the squared
singular values left out. Since ``Ŵ = U_k Σ_k V_kᵀ L⁻¹ = U_k (U_kᵀ W)``, the root is never inverted: a
badly conditioned Gram matrix costs no accuracy. With a diagonal root the same gives ASVD and FWSVD,
without one the plain SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError

_ATTEMPTS = 10  # Cholesky factorisations tried, each with ten times the damping


@dataclass(frozen=True, eq=False)
class Decomposition:
    """``W L = U Σ Vᵀ``.

    Args:
        weight: W: ``[N, K]`` float64.
        left: U: ``[N, min(N, K)]``.
        values: Σ: ``[min(N, K)]``, descending.
    """

    weight: Tensor
    left: Tensor
    values: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``u: [N, rank]``, ``v: [rank, K]`` of the best approximation.

        Matching columns and rows are of equal length, so that neither leaves the range of a narrow dtype.
        """
        left = self.left[:, :rank]
        right = left.mT @ self.weight
        length = right.norm(dim=1).sqrt()
        length = torch.where(length > 0, length, torch.ones_like(length))
        return left * length, right / length[:, None]

    def loss(self, rank: int) -> float:
        """``‖(W − Ŵ)L‖²_F``: the sum of the squared singular values left out."""
        return float(self.values[rank:].square().sum())

    @property
    def energy(self) -> float:
        """``‖W L‖²_F``."""
        return float(self.values.square().sum())


def decompose(weight: Tensor, root: Tensor | None = None) -> Decomposition:
    """Decompose ``weight: [N, K]`` in the metric of ``root``.

    Args:
        weight: Floating and finite.
        root: ``[K, K]`` (any L with ``G = L Lᵀ``), ``[K]`` for a diagonal one, or None for the identity.
    """
    w = weight.detach().double()
    a = w if root is None else w * root.double() if root.dim() == 1 else w @ root.double()
    left, values, _ = torch.linalg.svd(a, full_matrices=False)
    return Decomposition(w, left, values)


def cholesky_root(gram: Tensor, shrinkage: float = 0.0) -> Tensor:
    """Lower triangular L with ``L Lᵀ = G`` in float64, damped as far as that needs.

    Args:
        gram: ``[K, K]``, symmetric.
        shrinkage: ρ in 0…1 of ``G ← (1 − ρ) G + ρ diag(G)``.

    Raises:
        CalibrationError: NaN or inf, or no factorisation even with much damping.
    """
    g = gram.detach().double()
    if not bool(torch.isfinite(g).all()):
        raise CalibrationError(
            "the Gram matrix of the inputs contains NaN or inf.",
            fix="check the calibration data, and the model's dtype (float16 overflows).",
        )
    g = (g + g.mT) / 2
    diagonal = g.diagonal().clamp_min(0)
    g = (1 - shrinkage) * g + shrinkage * torch.diag(diagonal)
    mean = float(diagonal.mean())
    unit = mean if mean > 0 else 1.0
    eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
    damping = 0.0
    lower: Tensor
    for attempt in range(_ATTEMPTS):
        lower, info = torch.linalg.cholesky_ex(g + damping * eye)
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            return lower
        if attempt == 0:  # lift the least eigenvalue above zero
            least = float(torch.linalg.eigvalsh(g)[0])
            damping = max(0.0, -least) + 1e-12 * unit
        else:
            damping *= 10
    raise CalibrationError(
        "the Gram matrix of the inputs does not factor, even with much damping.",
        fix="use more calibration data.",
    )


def refit_left(weight: Tensor, v: Tensor, gram: Tensor) -> Tensor:
    """``u: [N, r]`` that minimises ``E‖(W − u v)x‖²`` for a fixed ``v: [r, K]``: ``W G vᵀ (v G vᵀ)⁻¹``."""
    w, right, g = weight.double(), v.double(), gram.double()
    inverse: Tensor = torch.linalg.pinv(right @ g @ right.mT, hermitian=True)
    return w @ g @ right.mT @ inverse


def output_loss(difference: Tensor, gram: Tensor | None) -> float:
    """``E‖D x‖² = tr(D G Dᵀ)``; ``‖D‖²_F`` without a Gram matrix."""
    d = difference.double()
    return float((d * d).sum() if gram is None else ((d @ gram.double()) * d).sum().clamp_min(0))


def relative_loss(weight: Tensor, approximation: Tensor, gram: Tensor | None) -> float:
    """``‖(W − Ŵ)x‖ / ‖W x‖``; 0 when the inputs were never active."""
    size = output_loss(weight, gram)
    return (output_loss(weight.double() - approximation.double(), gram) / size) ** 0.5 if size > 0 else 0.0
