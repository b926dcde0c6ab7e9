"""Objectives on what lies inside: the residual stream and the attention of both models, and TED's filters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fxcompress.analysis.site_types import SiteKind
from fxcompress.errors import TrainingError
from fxcompress.training.graph import Outputs, TrainingGraph
from fxcompress.training.objective import (
    Models,
    Objective,
    Step,
    check_count,
    check_fraction,
    check_positive,
    masked_mean,
)
from fxcompress.training.scores import cross_entropy, forward_kl

__all__ = ["AttentionMatch", "HiddenMatch", "Ted", "layer_pairs"]


def layer_pairs(student: int, teacher: int, layers: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Which layer of the teacher each of the student's is compared with: the same share of the depth.

    Args:
        student: Its number of layers.
        teacher: Its number of layers.
        layers: The student's that are compared, from the end if negative; empty takes all.

    Example:
        >>> layer_pairs(3, 6)
        [(0, 1), (1, 3), (2, 5)]
    """
    if not student or not teacher:
        raise TrainingError("a model without repeated blocks has no layers to compare.")
    chosen = [layer + student if layer < 0 else layer for layer in layers] or list(range(student))
    wrong = [layer for layer in chosen if not 0 <= layer < student]
    if wrong:
        raise TrainingError(f"layer {wrong[0]}: the student has {student} layers.")
    return [(layer, math.ceil((layer + 1) * teacher / student) - 1) for layer in chosen]


def _streams(outputs: Outputs | None) -> tuple[Tensor, ...]:
    if outputs is None:
        raise TrainingError("this objective needs a teacher.")
    return outputs.hidden


class _Projections(nn.Module):
    """One linear map per pair of layers, from one width to another; starts as the identity."""

    def __init__(self, pairs: int, student: int, teacher: int, like: Tensor) -> None:
        super().__init__()
        maps = [nn.Linear(student, teacher, bias=False) for _ in range(pairs)]
        for one in maps:
            nn.init.eye_(one.weight)
        self.maps = nn.ModuleList(maps)
        self.to(like.device, like.dtype if like.element_size() > 2 else torch.float32)

    def forward(self, index: int, x: Tensor) -> Tensor:
        """Map the stream of pair ``index``."""
        one = self.maps[index]
        assert isinstance(one, nn.Linear)
        mapped: Tensor = one(x.to(one.weight.dtype))
        return mapped


@dataclass(frozen=True)
class HiddenMatch(Objective):
    """The residual streams of paired layers agree in direction: ``mean ‖h_T/‖h_T‖ − h_S/‖h_S‖‖²``.

    Where the widths differ the student's stream goes through a linear map of its own, trained along.

    Args:
        blocks: Layers of the student; empty (default) takes all.

    Source: Jiao et al., 2019 (TinyBERT, arXiv:1909.10351); normalised as in Xu et al., 2024 (OneBit,
    arXiv:2402.11295).
    """

    blocks: tuple[int, ...] = ()

    name: ClassVar[str] = "hidden"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "hidden"})

    def layers(self, models: Models, example: Step) -> nn.Module | None:
        """Projections where the widths differ."""
        mine, theirs = example.student.hidden, _streams(example.teacher)
        pairs = layer_pairs(len(mine), len(theirs), self.blocks)
        if mine[0].shape[-1] == theirs[0].shape[-1]:
            return None
        return _Projections(len(pairs), mine[0].shape[-1], theirs[0].shape[-1], mine[0])

    def per_token(self, step: Step) -> Tensor:
        """See the class."""
        mine, theirs = step.student.hidden, _streams(step.teacher)
        losses = []
        for index, (layer, other) in enumerate(layer_pairs(len(mine), len(theirs), self.blocks)):
            x = mine[layer] if step.module is None else step.module(index, mine[layer])
            a, b = _direction(x), _direction(theirs[other]).to(x.device)
            losses.append((a - b).square().sum(-1))
        return step.positions(torch.stack(losses).mean(0))


def _direction(x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    unit: Tensor = wide / wide.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return unit


@dataclass(frozen=True)
class AttentionMatch(Objective):
    """The attention of paired layers agrees: ``KL(teacher ‖ student)`` of every query's weights.

    Weights are taken from queries and keys (the fused attention gives none), with the causal mask of language
    models, and averaged over heads, so that heads that were cut do not matter.

    Args:
        blocks: Attentions of the student; default the last, as in MiniLM.

    Source: Wang et al., 2020 (MiniLM, arXiv:2002.10957).
    """

    blocks: tuple[int, ...] = (-1,)

    name: ClassVar[str] = "attention"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "attention"})

    def per_token(self, step: Step) -> Tensor:
        """See the class."""
        if step.teacher is None:
            raise TrainingError("this objective needs a teacher.")
        mine, theirs = step.student.attention, step.teacher.attention
        losses = [
            forward_kl(_weights(*theirs[other], step.causal), _weights(*mine[layer], step.causal))
            for layer, other in layer_pairs(len(mine), len(theirs), self.blocks)
        ]
        return step.positions(torch.stack(losses).mean(0))


def _weights(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """Log of the attention weights, mean over heads: ``[B, T, S]``; log 1e-12 where there is no attention."""
    scores = (query @ key.transpose(-1, -2)).float() / query.shape[-1] ** 0.5
    if causal and scores.shape[-1] == scores.shape[-2]:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1).mean(1).clamp_min(1e-12).log()


@dataclass(frozen=True)
class Ted(Objective):
    """Layers are compared through filters that keep what the task needs; two stages.

    Before training, a linear filter per layer of each model learns the task: filter, then the teacher's own
    output head, next-token loss, both models frozen. Then the student learns
    ``r·CE + (1 − r)·T²·KL + λ·mean_k ‖f_T(h_T) − f_S(h_S)‖² / width``, the teacher's filters frozen and the
    student's trained along.

    Args:
        blocks: Layers of the student; empty (default) takes all.
        filter_steps: Steps of the first stage. Default 50.
        filter_rate: Its learning rate. Default 1e-3.
        weight: λ. Default 1.
        temperature: Default 2 (the paper).
        hard_ratio: r. Default 0.5.

    Source: Liang et al., 2022, arXiv:2210.01351; the head of a language model takes the place of a task head.
    """

    blocks: tuple[int, ...] = ()
    filter_steps: int = 50
    filter_rate: float = 1e-3
    weight: float = 1.0
    temperature: float = 2.0
    hard_ratio: float = 0.5

    name: ClassVar[str] = "ted"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "hidden", "labels"})

    def __post_init__(self) -> None:
        check_count(self.name, "filter_steps", self.filter_steps)
        for option in ("filter_rate", "weight", "temperature"):
            check_positive(self.name, option, getattr(self, option))
        check_fraction(self.name, "hard_ratio", self.hard_ratio)

    def layers(self, models: Models, example: Step) -> nn.Module:
        """A filter per compared layer of each model."""
        mine, theirs = example.student.hidden, _streams(example.teacher)
        pairs = layer_pairs(len(mine), len(theirs), self.blocks)
        width = theirs[0].shape[-1]
        filters = nn.ModuleDict(
            {
                "student": _Projections(len(pairs), mine[0].shape[-1], width, mine[0]),
                "teacher": _Projections(len(pairs), width, width, theirs[0]),
            }
        )
        filters["teacher"].requires_grad_(False)
        return filters

    def prepare(self, models: Models, steps: Iterable[Step]) -> Objective:
        """The first stage: teach the filters the task."""
        filters, teacher = models.module, models.teacher
        assert isinstance(filters, nn.ModuleDict)
        assert teacher is not None
        head = _head(teacher)
        filters.requires_grad_(True)
        optimizer = torch.optim.AdamW(filters.parameters(), self.filter_rate, weight_decay=0.0)
        for _, step in zip(range(self.filter_steps), steps, strict=False):
            with torch.enable_grad():
                loss = self._task_loss(filters, step, head)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        filters["teacher"].requires_grad_(False)
        return self

    def _task_loss(self, filters: nn.ModuleDict, step: Step, head: Tensor) -> Tensor:
        labels, count = step.targets(), step.mask.sum().clamp_min(1)
        total = torch.zeros((), device=head.device)
        for side, streams in (("student", step.student.hidden), ("teacher", _streams(step.teacher))):
            for index, pair in enumerate(self._pairs(step)):
                x = step.positions(streams[pair[side == "teacher"]].detach())
                scores = filters[side](index, x) @ head.to(x.dtype).T
                total = total + masked_mean(cross_entropy(scores, labels), step.mask, count)
        return total

    def _pairs(self, step: Step) -> list[tuple[int, int]]:
        return layer_pairs(len(step.student.hidden), len(_streams(step.teacher)), self.blocks)

    def per_token(self, step: Step) -> Tensor:
        """The loss of the second stage."""
        filters = step.module
        assert isinstance(filters, nn.ModuleDict)
        soft = self.temperature**2 * forward_kl(*step.teacher_scores().pair(step.scores, self.temperature))
        hard = cross_entropy(step.scores, step.targets())
        gaps = []
        for index, (layer, other) in enumerate(self._pairs(step)):
            mine = filters["student"](index, step.student.hidden[layer])
            theirs = filters["teacher"](index, _streams(step.teacher)[other]).detach()
            gaps.append((mine - theirs).square().mean(-1))
        loss = (1 - self.hard_ratio) * soft + self.hard_ratio * hard
        return loss + self.weight * step.positions(torch.stack(gaps).mean(0))


def _head(model: TrainingGraph) -> Tensor:
    """``[V, D]``: the matrix that makes scores of the last stream.

    Raises:
        TrainingError: the scores come from no matrix of that shape.
    """
    rows = {found.rows for found in model.signature.vocabularies.values()}
    for site in reversed(model.plan.sites):
        _, outputs, _ = site.layout.matrix_shape
        if site.kind is SiteKind.LINEAR and outputs in rows:
            state = model.trainable.state
            return site.layout.to_matrix(state.effective(site.name).detach())[0]
    raise TrainingError(
        "the objective 'ted' needs an output head over the vocabulary, and the teacher has none."
    )
