"""What an objective is: a small frozen dataclass that gives a loss per position.

@dataclass(frozen=True)
class Mine(Objective):
    name = "mine"

    def per_token(self, step: Step) -> Tensor:
        log_p, log_q = step.teacher_scores().pair(step.scores)
        return forward_kl(log_p, log_q)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fxcompress.errors import TrainingError
from fxcompress.training.graph import Outputs, TrainingGraph
from fxcompress.training.scores import TeacherScores

__all__ = ["Models", "Objective", "Policy", "Sequences", "Step"]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Inputs of one step, and which of their positions are learned.

    Args:
        inputs: Captured inputs by placeholder name, ``[B, ...]``.
        ids: Placeholder of the token ids ``[B, T]``; None for models without tokens.
        labels: ``[B, T]`` token ids, -100 where not learned; for other models whatever labels there are.
        rows: Numbers of the sequences in the data set, for caches and random choices.
    """

    inputs: Mapping[str, Any]
    ids: str | None
    labels: Tensor | None
    rows: tuple[int, ...] = ()

    @property
    def tokens(self) -> Tensor:
        """The token ids ``[B, T]``."""
        if self.ids is None:
            raise TrainingError("this objective needs a model that takes token ids.")
        value: Tensor = self.inputs[self.ids]
        return value


@dataclass(frozen=True, eq=False)
class Step:
    """What an objective sees of one forward pass.

    Scores at position t belong to ``labels[:, t]``: for language models they are shifted already.

    Args:
        student, teacher: What the models gave; the teacher's is None when nobody asked for it.
        scores: The student's ``[B, T, V]`` (for models without tokens the main output, flattened to
            ``[B, T, …]``).
        known: What is known of the teacher's scores.
        labels: ``[B, T]`` with -100 where not learned, or None.
        mask: ``[B, T]`` bool: positions that count.
        sequences: The inputs.
        causal: Whether the model predicts the next token.
        module: The objective's own layers, when it has any.
    """

    student: Outputs
    teacher: Outputs | None
    scores: Tensor
    known: TeacherScores | None
    labels: Tensor | None
    mask: Tensor
    sequences: Sequences
    causal: bool
    module: nn.Module | None = None

    def teacher_scores(self) -> TeacherScores:
        """The teacher's scores.

        Raises:
            TrainingError: there is no teacher.
        """
        if self.known is None:
            raise TrainingError("this objective needs a teacher.")
        return self.known

    def targets(self) -> Tensor:
        """Labels, 0 where they do not count.

        Raises:
            TrainingError: there are none.
        """
        if self.labels is None:
            raise TrainingError("this objective needs labels, and the data have none.")
        return self.labels.masked_fill(~self.mask, 0)

    def positions(self, x: Tensor) -> Tensor:
        """The part of a value per position ``[B, T, …]`` that belongs to :attr:`mask`."""
        return x[:, : self.mask.shape[1]]


@dataclass(frozen=True, eq=False)
class Models:
    """The two models, and how to run them.

    Args:
        student, teacher: Training graphs.
        module: The objective's own layers.
    """

    student: TrainingGraph
    teacher: TrainingGraph | None
    module: nn.Module | None = None


class Policy(Protocol):
    """What an on-policy objective draws from."""

    def sample(
        self, sequences: Sequences, *, new_tokens: int, temperature: float, teacher_share: float
    ) -> Sequences:
        """Continue the sequences' prompts by the student, or a mixture with the teacher; only these count."""
        ...

    def chance(self) -> float:
        """A number in [0, 1), the same for all processes in this step."""
        ...


@dataclass(frozen=True)
class Objective(ABC):
    """Base of objectives; fields are options.

    Class attributes:
        name: For recipes and reports.
        needs: Any of ``"teacher"``, ``"labels"``, ``"hidden"``, ``"attention"``, ``"scores"`` (the whole of
            the teacher's, so that they cannot be kept as the likeliest few).
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})

    @property
    def on_policy(self) -> float:
        """The share of steps whose sequences the objective draws itself."""
        return 0.0

    def layers(self, models: Models, example: Step) -> nn.Module | None:
        """Layers of the objective's own, trained with the student; ``example`` shows the sizes."""
        return None

    def prepare(self, models: Models, steps: Any) -> Objective:
        """The objective after what it must find out before training; ``steps`` yields :class:`Step`."""
        return self

    def draw(self, sequences: Sequences, policy: Policy) -> Sequences:
        """The sequences to learn from in this step; the default takes the data."""
        return sequences

    @abstractmethod
    def per_token(self, step: Step) -> Tensor:
        """The loss at every position, ``[B, T]``; what :attr:`Step.mask` leaves out is ignored."""

    def held_out(self, step: Step) -> Tensor:
        """What is judged on held-out data, ``[B, T]``; the default is the loss itself."""
        return self.per_token(step)

    def describe(self) -> str:
        """For reports."""
        return self.name


def check_fraction(name: str, option: str, value: object, *, above: float = 0.0, below: float = 1.0) -> None:
    """Refuse an option outside of a range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not above <= value <= below:  # type: ignore[operator]
        raise TrainingError(f"objective {name!r}: {option}={value!r}, expected {above:g}…{below:g}.")


def check_count(name: str, option: str, value: object) -> None:
    """Refuse an option that is no positive integer."""
    if type(value) is not int or value < 1:
        raise TrainingError(f"objective {name!r}: {option}={value!r}, expected a positive integer.")


def check_positive(name: str, option: str, value: object) -> None:
    """Refuse an option that is no positive number."""
    if type(value) not in (int, float) or not 0 < value < float("inf"):  # type: ignore[operator]
        raise TrainingError(f"objective {name!r}: {option}={value!r}, expected a positive number.")


def masked_mean(losses: Tensor, mask: Tensor, count: Tensor | float) -> Tensor:
    """``Σ losses where mask / count``."""
    return torch.where(mask, losses, torch.zeros_like(losses)).sum() / count


__all__ += ["check_count", "check_fraction", "check_positive", "masked_mean"]
