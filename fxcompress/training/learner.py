"""Student and objective as one module: what Accelerate wraps and the optimiser changes."""

from __future__ import annotations

from torch import Tensor, nn

from fxcompress.training.data import IGNORED
from fxcompress.training.graph import Outputs, TrainingGraph
from fxcompress.training.objective import Objective, Sequences, Step, masked_mean
from fxcompress.training.scores import TeacherScores
from fxcompress.training.views import view

__all__ = ["Learner"]


class Learner(nn.Module):
    """Student and objective as one module, whose call gives the sum of a micro-batch's losses."""

    def __init__(self, student: TrainingGraph, objective: Objective, layers: nn.Module | None) -> None:
        super().__init__()
        self.student, self.objective, self.layers = student, objective, layers
        self.causal = False

    def forward(
        self, sequences: Sequences, teacher: Outputs | None, known: TeacherScores | None, judged: bool
    ) -> Tensor:
        """``Σ`` of the losses (or of what held-out data are judged by)."""
        needs = self.objective.needs
        outputs = self.student(sequences.inputs, "hidden" in needs, "attention" in needs)
        step = view(outputs, teacher, known, sequences, self.causal, self.layers)
        losses = self.objective.held_out(step) if judged else self.objective.per_token(step)
        return masked_mean(losses, step.mask, 1.0)

    def count(self, sequences: Sequences, example: Step) -> int:
        """How many positions of a batch are learned; ``example`` shows how many a row has."""
        labels = sequences.labels
        if labels is not None and self.causal:
            return int((labels[:, 1:] != IGNORED).sum())
        rows = len(sequences.rows)
        if labels is not None and (labels.dim() == 1 or labels.shape[1] == example.mask.shape[1]):
            return int((labels != IGNORED).sum())
        return rows * int(example.mask.shape[1])
