"""What a training run did."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["TrainingResult"]


@dataclass
class TrainingResult:
    """What a run did.

    Args:
        steps: Steps taken.
        tokens: Tokens learned from.
        losses: Loss of every step.
        held_out: ``(step, loss)`` of every look at held-out data, the one before the first step included.
        best: Step of the parameters that were kept.
        stopped: Whether the run ended early because held-out data stopped improving.
        objective: In words.
    """

    steps: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    stopped: bool = False
    objective: str = ""

    def describe(self) -> str:
        """E.g. ``"kd, 200 steps, held-out loss 0.5 → 0.1"``."""
        text = f"{self.objective}, {self.steps} steps"
        if self.held_out:
            after = min(loss for _, loss in self.held_out)
            text += f", held-out loss {self.held_out[0][1]:.3g} → {after:.3g}"
        return text
