"""Distributions that are compared: a teacher's and a student's, over all outcomes or the likeliest few."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import TrainingError

__all__ = ["TeacherScores", "forward_kl", "jensen_shannon", "reverse_kl", "skew_kl"]


@dataclass(frozen=True, eq=False)
class TeacherScores:
    """What a teacher predicts at every position.

    With ``indices`` only the ``k`` likeliest outcomes are known; all others together are one more outcome.
    A divergence between such distributions is a lower bound of the full one, and equals it for k = V.

    Args:
        values: ``[B, T, V]`` scores; or ``[B, T, k]`` log-probabilities of the outcomes ``indices``.
        indices: ``[B, T, k]`` integer, or None.
        temperature: That the log-probabilities were taken at; scores serve any temperature.
    """

    values: Tensor
    indices: Tensor | None = None
    temperature: float = 1.0

    @classmethod
    def top(cls, scores: Tensor, k: int, temperature: float = 1.0) -> TeacherScores:
        """The ``k`` likeliest outcomes of ``scores: [B, T, V]``."""
        found = torch.log_softmax(scores.float() / temperature, -1).topk(min(k, scores.shape[-1]), -1)
        return cls(found.values, found.indices, temperature)

    def pair(self, scores: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """``(log p, log q)`` of teacher and student over the same outcomes, in float32 or float64.

        Args:
            scores: The student's, ``[B, T, V]``.
            temperature: Divides the scores of both.

        Raises:
            TrainingError: the two have other vocabularies, or outcomes were kept at another temperature.
        """
        q = torch.log_softmax(_wide(scores) / temperature, -1)
        if self.indices is None:
            if self.values.shape[-1] != scores.shape[-1]:
                raise vocabulary_mismatch(self.values.shape[-1], scores.shape[-1])
            return torch.log_softmax(_wide(self.values) / temperature, -1).to(q.dtype), q
        if temperature != self.temperature:
            raise TrainingError(
                f"teacher outcomes were kept at temperature {self.temperature:g}, not {temperature:g}.",
                fix="keep them again for this objective.",
            )
        p, chosen = self.values.to(q.dtype), q.gather(-1, self.indices.long())
        others = q.scatter(-1, self.indices.long(), -math.inf)
        if self.indices.shape[-1] == q.shape[-1]:
            return p, chosen
        rest = torch.log((1 - p.exp().sum(-1, keepdim=True)).clamp_min(1e-12))
        return torch.cat([p, rest], -1), torch.cat([chosen, others.logsumexp(-1, keepdim=True)], -1)


def vocabulary_mismatch(teacher: int, student: int) -> TrainingError:
    """The error for models that score other vocabularies."""
    return TrainingError(
        f"the teacher scores {teacher} tokens, the student {student}: scores cannot be compared.",
        fix="take a teacher with the student's tokenizer and vocabulary.",
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _expected(p: Tensor, log_ratio: Tensor) -> Tensor:
    """``Σ p·log_ratio`` where outcomes of probability 0 count nothing."""
    return (p * torch.where(p > 0, log_ratio, torch.zeros_like(log_ratio))).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p‖q)`` in nats, from log-probabilities ``[..., V]``: the student covers the teacher."""
    return _expected(log_p.exp(), log_p - log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(q‖p)``: the student keeps to what the teacher finds likely."""
    return _expected(log_q.exp(), log_q - log_p)


def skew_kl(log_p: Tensor, log_q: Tensor, skew: float, *, reverse: bool = False) -> Tensor:
    """``KL(p ‖ skew·p + (1−skew)·q)``, or reversed ``KL(q ‖ (1−skew)·p + skew·q)``.

    Source: Ko et al., 2024 (DistiLLM, arXiv:2402.03898).
    """
    mine, other = (log_q, log_p) if reverse else (log_p, log_q)
    return forward_kl(mine, mixture(mine, other, skew))


def mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """``log(share·a + (1−share)·b)``."""
    if share in (0.0, 1.0):
        return log_a if share == 1.0 else log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence ``β·KL(p‖m) + (1−β)·KL(q‖m)``, ``m = β·p + (1−β)·q``.

    ``β = 0`` means ``KL(p‖q)`` and ``β = 1`` means ``KL(q‖p)``, the limits of the divergence over ``β`` and
    ``1 − β``.

    Source: Agarwal et al., 2023 (GKD, arXiv:2306.13649).
    """
    if beta == 0:
        return forward_kl(log_p, log_q)
    if beta == 1:
        return reverse_kl(log_p, log_q)
    middle = mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, middle) + (1 - beta) * forward_kl(log_q, middle)


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """``−log q(label)`` per position: scores ``[B, T, V]``, labels ``[B, T]``."""
    flat = F.cross_entropy(_wide(scores).flatten(0, -2), labels.flatten(), reduction="none")
    return flat.reshape(labels.shape)


__all__ += ["cross_entropy", "mixture", "vocabulary_mismatch"]
