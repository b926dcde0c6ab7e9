"""Options of a training run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from fxcompress.errors import TrainingError

__all__ = ["TrainingOptions"]


@dataclass(frozen=True)
class TrainingOptions:
    """How long, how fast and how safely.

    Args:
        steps: Optimiser steps. Default 200.
        batch_size: Sequences per step, all processes and micro-batches together. Default 8.
        accumulation: Micro-batches that a process splits its part of a step into. Default 1.
        learning_rate: Of AdamW. Default 1e-4 (LoRA's usual; latent weights want about 2e-5, LLM-QAT).
        schedule: ``"cosine"`` (default), ``"linear"`` (both end at 0) or ``"constant"``.
        warmup: Share of the steps in which the rate rises from 0. Default 0.03 (QLoRA).
        weight_decay: Default 0 (LLM-QAT).
        clip_norm: Largest norm of all gradients together; 0 does not clip. Default 1.
        precision: ``"no"`` (default), ``"bf16"`` or ``"fp16"``: autocast of both models' products.
        evaluate_every: Steps between looks at held-out data; 0 (default): ten looks in all.
        patience: Looks without improvement before the run stops; None (default) never stops early.
        checkpoint_every: Steps between checkpoints; 0 (default): at every look.
        keep: Checkpoints that are kept. Default 2.
        top_k: Keep the teacher's ``top_k`` likeliest outcomes per token instead of asking it in every step;
            0 (default) asks.
        checkpointing: Run blocks again in the backward pass instead of keeping their values. Default True.
        log_dir: Folder for TensorBoard; None (default) writes nothing.
        seed: Of the order of the data and of everything drawn.

    Raises:
        TrainingError: an option is out of range.
    """

    steps: int = 200
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    evaluate_every: int = 0
    patience: int | None = None
    checkpoint_every: int = 0
    keep: int = 2
    top_k: int = 0
    checkpointing: bool = True
    log_dir: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("steps", "batch_size", "accumulation", "keep"):
            self._check(
                option, type(getattr(self, option)) is int and getattr(self, option) >= 1, "at least 1"
            )
        for option in ("evaluate_every", "checkpoint_every", "top_k"):
            self._check(
                option, type(getattr(self, option)) is int and getattr(self, option) >= 0, "0 or more"
            )
        for option in ("learning_rate", "weight_decay", "clip_norm"):
            value = getattr(self, option)
            fine = type(value) in (int, float) and 0 <= value < math.inf
            self._check(option, fine and (value > 0 or option != "learning_rate"), "a positive number")
        self._check("warmup", type(self.warmup) in (int, float) and 0 <= self.warmup < 1, "a share below 1")
        self._check(
            "schedule", self.schedule in ("cosine", "linear", "constant"), "cosine, linear or constant"
        )
        self._check("precision", self.precision in ("no", "bf16", "fp16"), "no, bf16 or fp16")
        fine = self.patience is None or (type(self.patience) is int and self.patience >= 1)
        self._check("patience", fine, "a number of looks or None")

    def _check(self, option: str, fine: bool, expected: str) -> None:
        if not fine:
            raise TrainingError(f"training: {option}={getattr(self, option)!r}, expected {expected}.")

    def rate(self, step: int) -> float:
        """The learning rate of a step, numbered from 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - rising) / max(1, self.steps - rising)
        left = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * left

    @property
    def look(self) -> int:
        """Steps between looks at held-out data."""
        return self.evaluate_every or max(1, self.steps // 10)

    @property
    def save(self) -> int:
        """Steps between checkpoints."""
        return self.checkpoint_every or self.look

    def fingerprint(self, *more: Any) -> str:
        """Hash of what decides how training goes, so that a run is only continued by the same one."""
        own = dataclasses.asdict(self)
        for option in ("log_dir", "keep", "checkpoint_every", "accumulation", "checkpointing"):
            own.pop(option)
        return hashlib.sha256(json.dumps([own, *map(str, more)], sort_keys=True).encode()).hexdigest()
