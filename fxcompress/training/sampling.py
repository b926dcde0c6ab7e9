"""Drawing continuations from the student, or from a mixture with the teacher, for on-policy objectives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import TrainingError
from fxcompress.training.data import IGNORED
from fxcompress.training.graph import TrainingGraph
from fxcompress.training.objective import Sequences

__all__ = ["Sampler"]


class Sampler:
    """The loop's :class:`~fxcompress.training.objective.Policy`.

    Every row draws from a generator of its own, seeded by run, step and row, so that what is drawn does not
    depend on how rows are spread over processes. Captured graphs keep no cache: a continuation of n tokens
    costs n calls.

    Args:
        student: Drawn from.
        teacher: Mixed in; may be None.
        seed: Of the run.
        step: Of the optimiser.
        longest: Tokens that the model can take, or None.
    """

    def __init__(
        self, student: TrainingGraph, teacher: TrainingGraph | None, seed: int, step: int, longest: int | None
    ) -> None:
        self.student, self.teacher = student, teacher
        self.seed, self.step, self.longest = seed, step, longest

    def chance(self) -> float:
        """A number in [0, 1) for this step."""
        return float(torch.rand((), generator=self._generator("step"), dtype=torch.float64))

    def _generator(self, *key: object) -> torch.Generator:
        text = "|".join(map(str, (self.seed, self.step, *key)))
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    @torch.no_grad()
    def sample(
        self, sequences: Sequences, *, new_tokens: int, temperature: float, teacher_share: float
    ) -> Sequences:
        """Continue the prompts: what comes before the first learned token, or the first half.

        Raises:
            TrainingError: the model takes other inputs than token ids and masks of their shape, or a
                teacher is needed and missing.
        """
        if teacher_share and self.teacher is None:
            raise TrainingError("continuations are to be drawn from the teacher too, and there is none.")
        tokens, prompt = sequences.tokens, _prompt_length(sequences)
        room = new_tokens if self.longest is None else min(new_tokens, self.longest - prompt)
        if room < 1:
            raise TrainingError(f"a prompt of {prompt} tokens leaves no room to continue it.")
        ids = tokens[:, :prompt]
        generators = [self._generator(row) for row in sequences.rows or range(len(ids))]
        for _ in range(room):
            inputs = _of_length(sequences, ids)
            scores = self.student(inputs).scores[:, -1].float()
            probabilities = torch.softmax(scores / temperature, -1)
            if teacher_share and self.teacher is not None:
                theirs = torch.softmax(self.teacher(inputs).scores[:, -1].float() / temperature, -1)
                probabilities = teacher_share * theirs + (1 - teacher_share) * probabilities
            drawn = [
                torch.multinomial(row.cpu(), 1, generator=generator)
                for row, generator in zip(probabilities, generators, strict=True)
            ]
            ids = torch.cat([ids, torch.stack(drawn).to(ids.device)], 1)
        labels = ids.clone()
        labels[:, :prompt] = IGNORED
        assert sequences.ids is not None
        return Sequences(_of_length(sequences, ids), sequences.ids, labels, sequences.rows)


def _prompt_length(sequences: Sequences) -> int:
    """Tokens before the first that any row learns, one at least; half of them when all are learned."""
    tokens, labels = sequences.tokens, sequences.labels
    if labels is None:
        return max(1, tokens.shape[1] // 2)
    learned = (labels != IGNORED).any(0).nonzero()
    first = int(learned[0]) if len(learned) else tokens.shape[1]
    return first if first > 1 else max(1, tokens.shape[1] // 2)


def _of_length(sequences: Sequences, ids: Tensor) -> Mapping[str, Any]:
    """The inputs with other token ids; masks and positions grow along."""
    inputs: dict[str, Any] = {}
    for name, value in sequences.inputs.items():
        if name == sequences.ids:
            inputs[name] = ids
        elif not isinstance(value, Tensor):
            inputs[name] = value
        elif value.shape == sequences.tokens.shape and bool((value == 1).all()):
            inputs[name] = torch.ones_like(ids, dtype=value.dtype)
        elif value.shape == sequences.tokens.shape and _counts(value):
            inputs[name] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).contiguous()
        elif value.shape == sequences.tokens.shape and not bool(value.any()):
            inputs[name] = torch.zeros_like(ids, dtype=value.dtype)
        else:
            raise TrainingError(
                f"continuations cannot be drawn: the input {name!r} is neither a mask of ones nor positions.",
                fix="give sequences of one length without padding.",
            )
    return inputs


def _counts(value: Tensor) -> bool:
    return torch.equal(value, torch.arange(value.shape[1], device=value.device).expand_as(value).to(value))
