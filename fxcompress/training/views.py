"""How a model's output is read as scores per position, found by running it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxcompress.training.data import IGNORED, causal_shift
from fxcompress.training.graph import Outputs, TrainingGraph
from fxcompress.training.objective import Sequences, Step
from fxcompress.training.scores import TeacherScores

__all__ = ["is_causal", "view"]

_CAUSAL = 1e-4  # largest relative change of earlier scores when a later token changes, in float32


@torch.no_grad()
def is_causal(graph: TrainingGraph, sequences: Sequences) -> bool:
    """Whether the model predicts the next token: a score per token, and none depends on a later token."""
    if sequences.ids is None:
        return False
    tokens = sequences.tokens
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        return False
    other = torch.where(tokens[:, -1] == tokens[:, 0], tokens[:, -1] - 1, tokens[:, 0]).clamp_min(0)
    changed = torch.cat([tokens[:, :-1], other[:, None]], 1)
    first = graph(sequences.inputs).scores
    if first.dim() != 3 or first.shape[:2] != tokens.shape:
        return False
    second = graph({**sequences.inputs, sequences.ids: changed}).scores
    scale = float(first.abs().max()) or 1.0
    gap = float((first[:, :-1] - second[:, :-1]).abs().max()) / scale
    return gap <= (_CAUSAL if first.element_size() >= 4 else 100 * _CAUSAL)


def view(
    outputs: Outputs,
    teacher: Outputs | None,
    known: TeacherScores | None,
    sequences: Sequences,
    causal: bool,
    module: nn.Module | None,
) -> Step:
    """One forward pass as an objective sees it."""
    scores, labels = outputs.scores, sequences.labels
    if causal and labels is not None:
        scores, labels = causal_shift(scores, labels)
        known = None if known is None else _shifted(known)
        mask = labels != IGNORED
    else:
        scores = _per_position(scores)
        known = (
            None
            if known is None
            else TeacherScores(_per_position(known.values), known.indices, known.temperature)
        )
        fits = labels is not None and labels.numel() == scores.shape[0] * scores.shape[1]
        labels = labels.reshape(scores.shape[:2]) if fits and labels is not None else None
        mask = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
        if labels is not None:
            mask = labels != IGNORED
    return Step(outputs, teacher, scores, known, labels, mask, sequences, causal, module)


def _shifted(known: TeacherScores) -> TeacherScores:
    indices = None if known.indices is None else known.indices[:, :-1]
    return TeacherScores(known.values[:, :-1], indices, known.temperature)


def _per_position(x: Tensor) -> Tensor:
    """``[B, T, C]``: what comes before the last dimension are positions."""
    return x.reshape(x.shape[0], -1, x.shape[-1]) if x.dim() > 1 else x.reshape(x.shape[0], 1, 1)
