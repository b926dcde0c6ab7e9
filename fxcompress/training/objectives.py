"""Objectives on scores: plain fine-tuning, distillation by one divergence or another, MiniLLM.

Every one that compares distributions can learn from the student's own continuations (``on_policy``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.errors import TrainingError
from fxcompress.training.objective import (
    Models,
    Objective,
    Policy,
    Sequences,
    Step,
    check_count,
    check_fraction,
    check_positive,
)
from fxcompress.training.scores import cross_entropy, forward_kl, jensen_shannon, reverse_kl, skew_kl

__all__ = ["Cakld", "CrossEntropy", "Gkd", "Kd", "MiniLlm", "ReverseKd", "SkewKd"]


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Plain fine-tuning: the negative log-likelihood of the labels; no teacher."""

    name: ClassVar[str] = "ce"
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def per_token(self, step: Step) -> Tensor:
        """``−log q(label)``."""
        return cross_entropy(step.scores, step.targets())


@dataclass(frozen=True)
class _Divergence(Objective):
    """Base of divergences between teacher and student.

    Args:
        temperature: Divides both scores. Default 1.
        on_policy: Share of steps that learn from continuations the student draws itself. Default 0.
        new_tokens: Length of these continuations. Default 64.
        sampling_temperature: Of drawing them. Default 1.
    """

    temperature: float = 1.0
    on_policy: float = 0.0
    new_tokens: int = 64
    sampling_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.name, "temperature", self.temperature)
        check_positive(self.name, "sampling_temperature", self.sampling_temperature)
        check_fraction(self.name, "on_policy", self.on_policy)
        check_count(self.name, "new_tokens", self.new_tokens)

    def draw(self, sequences: Sequences, policy: Policy) -> Sequences:
        """Continuations of the student with probability :attr:`on_policy`."""
        if policy.chance() >= self.on_policy:
            return sequences
        return policy.sample(
            sequences,
            new_tokens=self.new_tokens,
            temperature=self.sampling_temperature,
            teacher_share=0.0,
        )

    def _pair(self, step: Step) -> tuple[Tensor, Tensor]:
        return step.teacher_scores().pair(step.scores, self.temperature)


@dataclass(frozen=True)
class Kd(_Divergence):
    """Knowledge distillation: ``(1 − r)·T²·KL(p‖q) + r·CE``.

    Args:
        hard_ratio: The share r of the labels' cross-entropy. Default 0: the teacher alone, as in LLM-QAT.

    Source: Hinton et al., 2015, arXiv:1503.02531.
    """

    hard_ratio: float = 0.0

    name: ClassVar[str] = "kd"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.name, "hard_ratio", self.hard_ratio)

    def per_token(self, step: Step) -> Tensor:
        """See the class."""
        soft = self.temperature**2 * forward_kl(*self._pair(step))
        if not self.hard_ratio:
            return soft
        hard = cross_entropy(step.scores, step.targets())
        return (1 - self.hard_ratio) * soft + self.hard_ratio * hard


@dataclass(frozen=True)
class ReverseKd(_Divergence):
    """``KL(q‖p)``: the student gives up what it cannot follow instead of spreading out."""

    name: ClassVar[str] = "reverse-kl"

    def per_token(self, step: Step) -> Tensor:
        """See the class."""
        return reverse_kl(*self._pair(step))


@dataclass(frozen=True)
class SkewKd(_Divergence):
    """DistiLLM's skew divergence, whose gradient stays bounded where the student is far off.

    Args:
        skew: Share of the own distribution in the mixture that is compared with. Default 0.1 (the paper).
        reverse: ``KL(q‖…)`` instead of ``KL(p‖…)``. Default False.

    Source: Ko et al., 2024, arXiv:2402.03898.
    """

    skew: float = 0.1
    reverse: bool = False

    name: ClassVar[str] = "skew-kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.name, "skew", self.skew)

    def per_token(self, step: Step) -> Tensor:
        """See the class."""
        return skew_kl(*self._pair(step), self.skew, reverse=self.reverse)


@dataclass(frozen=True)
class Gkd(_Divergence):
    """Generalised distillation: a Jensen-Shannon divergence, partly on the student's own text.

    Args:
        beta: 0: ``KL(p‖q)``, 1: ``KL(q‖p)``, between: see
            :func:`~fxcompress.training.scores.jensen_shannon`. Default 0.5.
        on_policy: Default 0.5 (the paper's λ).

    Source: Agarwal et al., 2023, arXiv:2306.13649.
    """

    on_policy: float = 0.5
    beta: float = 0.5

    name: ClassVar[str] = "gkd"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.name, "beta", self.beta)

    def per_token(self, step: Step) -> Tensor:
        """See the class."""
        return jensen_shannon(*self._pair(step), self.beta)


@dataclass(frozen=True)
class Cakld(_Divergence):
    """Confidence-aware distillation: ``γ·KL(q‖p) + (1 − γ)·KL(p‖q)``.

    Args:
        gamma: None (default): the teacher's mean confidence, the largest probability at a position, over the
            first ``batches`` batches. A sure teacher has one mode to seek, an unsure one many to cover.
        batches: Default 10.

    Source: Du et al., 2024 (BitDistiller, arXiv:2402.10631).
    """

    gamma: float | None = None
    batches: int = 10

    name: ClassVar[str] = "cakld"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "batches", self.batches)
        if self.gamma is not None:
            check_fraction(self.name, "gamma", self.gamma)

    def prepare(self, models: Models, steps: Iterable[Step]) -> Objective:
        """Find γ."""
        if self.gamma is not None:
            return self
        total, count = 0.0, 0
        for _, step in zip(range(self.batches), steps, strict=False):
            log_p, _ = step.teacher_scores().pair(step.scores.detach(), self.temperature)
            total += float(log_p.amax(-1).exp()[step.mask].double().sum())
            count += int(step.mask.sum())
        return dataclasses.replace(self, gamma=total / max(1, count))

    def per_token(self, step: Step) -> Tensor:
        """See the class."""
        assert self.gamma is not None
        pair = self._pair(step)
        return self.gamma * reverse_kl(*pair) + (1 - self.gamma) * forward_kl(*pair)


@dataclass(frozen=True)
class MiniLlm(Objective):
    """Reverse KL of whole continuations by policy gradient.

    The student (mixed with the teacher) continues every prompt. At each position the effect on the next token
    is taken exactly, the effect on all later ones by their rewards ``r = log p(y) − log q(y)``:

        ∇L = E Σ_t [ ∇KL(q_t‖p_t) − w_t · R_t · ∇log q(y_t) ],   R_t = Σ_{k>t} r_k,   w_t = q(y_t) / p̃(y_t)

    The clipping of the paper's inner epochs is not needed: every continuation is used for one step.

    Args:
        teacher_share: α of the distribution drawn from, ``p̃ = α·p + (1 − α)·q``. Default 0.2 (the paper).
        single_step: Take the next token's effect exactly; else ``R_t`` starts at ``k = t``. Default True.
        length_normalization: Divide ``R_t`` by the number of its rewards. Default True (the paper).
        clip: Rewards are limited to ±this. Default 100 (the authors' code).
        new_tokens: Length of continuations. Default 64.
        sampling_temperature: Of drawing them. Default 1.

    Source: Gu et al., 2023, arXiv:2306.08543.
    """

    teacher_share: float = 0.2
    single_step: bool = True
    length_normalization: bool = True
    clip: float = 100.0
    new_tokens: int = 64
    sampling_temperature: float = 1.0

    name: ClassVar[str] = "minillm"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "scores"})

    def __post_init__(self) -> None:
        check_fraction(self.name, "teacher_share", self.teacher_share)
        check_positive(self.name, "clip", self.clip)
        check_positive(self.name, "sampling_temperature", self.sampling_temperature)
        check_count(self.name, "new_tokens", self.new_tokens)

    @property
    def on_policy(self) -> float:
        """Every step."""
        return 1.0

    def draw(self, sequences: Sequences, policy: Policy) -> Sequences:
        """Continuations by the mixture."""
        return policy.sample(
            sequences,
            new_tokens=self.new_tokens,
            temperature=self.sampling_temperature,
            teacher_share=self.teacher_share,
        )

    def per_token(self, step: Step) -> Tensor:
        """A loss whose gradient is the one above."""
        log_p, log_q = step.teacher_scores().pair(step.scores)
        labels = step.targets().unsqueeze(-1)
        mine, theirs = log_q.gather(-1, labels).squeeze(-1), log_p.gather(-1, labels).squeeze(-1)
        with torch.no_grad():
            rewards = (theirs - mine).clamp(-self.clip, self.clip).masked_fill(~step.mask, 0)
            later = rewards.flip(1).cumsum(1).flip(1)  # Σ_{k>=t}
            counts = step.mask.to(rewards.dtype).flip(1).cumsum(1).flip(1)
            if self.single_step:
                later, counts = later - rewards, counts - step.mask.to(rewards.dtype)
            if self.length_normalization:
                later = later / counts.clamp_min(1)
            drawn = torch.logaddexp(
                theirs + _log(self.teacher_share), mine + _log(1 - self.teacher_share)
            )  # log p̃(y)
            weight = (mine - drawn).exp()
        loss = -weight * later * mine
        return loss + reverse_kl(log_p, log_q) if self.single_step else loss

    def held_out(self, step: Step) -> Tensor:
        """The reverse KL of every next token, which the gradient lowers."""
        return reverse_kl(*step.teacher_scores().pair(step.scores))


def _log(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).log().to(torch.float32)


def unknown_option(name: str, option: str, known: Iterable[str]) -> TrainingError:
    """The error for an option that an objective does not have."""
    return TrainingError(
        f"objective {name!r}: unknown option {option!r}.",
        fix=f"its options are {', '.join(known) or 'none'}.",
    )


__all__ += ["unknown_option"]
