"""Objectives: what they are at known points, expected gradients by enumeration, and how they are named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fxcompress.errors import TrainingError
from fxcompress.training.catalogue import OBJECTIVES, objective_from, register_objective
from fxcompress.training.graph import Outputs
from fxcompress.training.layerwise import AttentionMatch, HiddenMatch, layer_pairs
from fxcompress.training.objective import Objective, Policy, Sequences, Step
from fxcompress.training.objectives import Cakld, Gkd, Kd, MiniLlm, ReverseKd
from fxcompress.training.scores import TeacherScores, cross_entropy, forward_kl, jensen_shannon, reverse_kl
from fxcompress.training.views import view

VOCABULARY, LENGTH = 3, 3


def step_of(scores: Tensor, teacher: Tensor, labels: Tensor, **more: object) -> Step:
    """A step of scores ``[B, T, V]`` that belong to ``labels [B, T]``."""
    mask = labels != -100
    outputs = Outputs(scores)
    return Step(
        outputs,
        Outputs(teacher),
        scores,
        TeacherScores(teacher),
        labels,
        mask,
        Sequences({}, None, None),
        True,
    )


class Table:
    """A language model of one parameter per history: scores of the next token after each prefix."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tables = [
            torch.randn(VOCABULARY**t, VOCABULARY, generator=generator, dtype=torch.float64)
            for t in range(LENGTH)
        ]

    def scores(self, sequences: Tensor) -> Tensor:
        """``[B, T, V]`` for ``sequences [B, T]``."""
        rows = []
        index = torch.zeros(len(sequences), dtype=torch.long)
        for t in range(LENGTH):
            rows.append(self.tables[t][index])
            index = index * VOCABULARY + sequences[:, t]
        return torch.stack(rows, 1)

    def learned(self) -> list[Tensor]:
        for table in self.tables:
            table.requires_grad_(True)
            table.grad = None
        return self.tables


EVERY = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))


def log_likelihood(scores: Tensor) -> Tensor:
    return torch.log_softmax(scores, -1).gather(-1, EVERY.unsqueeze(-1)).squeeze(-1).sum(1)


def expected_gradient(student: Table, teacher: Table, loss: Callable[[Step], Tensor]) -> list[Tensor]:
    """``E_{y~q}[∇ loss(y)]`` over every sequence there is, sampling itself without a gradient."""
    tables = student.learned()
    scores = student.scores(EVERY)
    weights = log_likelihood(scores).exp().detach()
    per_token = loss(step_of(scores, teacher.scores(EVERY), EVERY))
    (per_token.sum(1) * weights).sum().backward()
    return [table.grad.clone() for table in tables]  # type: ignore[union-attr]


def gradient_of_sequence_kl(student: Table, teacher: Table) -> list[Tensor]:
    tables = student.learned()
    q, p = log_likelihood(student.scores(EVERY)), log_likelihood(teacher.scores(EVERY))
    (q.exp() * (q - p)).sum().backward()
    return [table.grad.clone() for table in tables]  # type: ignore[union-attr]


@pytest.mark.parametrize("single_step", [True, False])
def test_minillm_has_the_gradient_of_the_sequences_reverse_kl(single_step: bool) -> None:
    student, teacher = Table(0), Table(1)
    objective = MiniLlm(teacher_share=0.0, single_step=single_step, length_normalization=False)
    found = expected_gradient(student, teacher, objective.per_token)
    for a, b in zip(found, gradient_of_sequence_kl(student, teacher), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_minillm_normalises_rewards_by_their_number_and_weighs_mixed_samples() -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, -100]])
    step = step_of(scores, teacher, labels)
    objective = MiniLlm(teacher_share=0.25)
    log_p, log_q = (torch.log_softmax(x, -1).detach() for x in (teacher, scores))
    rewards = [float(log_p[0, t, y] - log_q[0, t, y]) for t, y in enumerate([1, 2, 3])]
    later = [(rewards[1] + rewards[2]) / 2, rewards[2], 0.0]
    q, p = log_q.exp(), log_p.exp()
    weights = [float(q[0, t, y] / (0.25 * p[0, t, y] + 0.75 * q[0, t, y])) for t, y in enumerate([1, 2, 3])]
    loss = torch.where(step.mask, objective.per_token(step), 0.0).sum()
    loss.backward()
    other = scores.detach().clone().requires_grad_()
    logs = torch.log_softmax(other, -1)
    wanted = sum(reverse_kl(log_p[0, t], logs[0, t]) for t in range(3))
    wanted = wanted - sum(
        w * r * logs[0, t, y] for t, (w, r, y) in enumerate(zip(weights, later, [1, 2, 3], strict=True))
    )
    wanted.backward()  # type: ignore[union-attr]
    assert scores.grad is not None
    assert other.grad is not None
    assert torch.allclose(scores.grad, other.grad, atol=1e-10)


def test_minillm_of_one_token_is_its_exact_term() -> None:
    scores, teacher = torch.randn(2, 1, 4, requires_grad=True), torch.randn(2, 1, 4)
    step = step_of(scores, teacher, torch.tensor([[1], [3]]))
    exact = reverse_kl(*TeacherScores(teacher).pair(scores))
    assert torch.allclose(MiniLlm(teacher_share=0.0).per_token(step), exact, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_on_policy_divergences_take_the_students_text_as_given(beta: float) -> None:
    student, teacher = Table(2), Table(3)
    found = expected_gradient(student, teacher, Gkd(beta=beta).per_token)
    tables = student.learned()
    total = torch.zeros((), dtype=torch.float64)
    for t in range(LENGTH):  # histories of length t, weighed by how often the student writes them
        for index, prefix in enumerate(itertools.product(range(VOCABULARY), repeat=t)):
            chance = torch.ones((), dtype=torch.float64)
            place = 0
            for s, token in enumerate(prefix):
                chance = chance * torch.softmax(student.tables[s][place], -1)[token].detach()
                place = place * VOCABULARY + token
            pair = (torch.log_softmax(m.tables[t][index], -1) for m in (teacher, student))
            total = total + chance * jensen_shannon(*pair, beta)
    total.backward()
    for a, table in zip(found, tables, strict=True):
        assert torch.allclose(a, table.grad, atol=1e-10)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["kd", "reverse-kl", "skew-kl", "gkd", {"cakld": {"gamma": 0.4}}, "minillm"])
def test_equal_models_lose_nothing(name: object) -> None:
    scores = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    step = step_of(scores, scores.detach(), torch.randint(5, (2, 3)))
    loss = objective_from(name).held_out(step)
    loss.sum().backward()
    assert scores.grad is not None
    assert float(loss.detach().abs().max()) < 1e-6
    assert float(scores.grad.abs().max()) < 1e-6


def test_kd_mixes_the_labels_in_and_scales_by_the_temperature() -> None:
    scores, teacher, labels = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    found = Kd(temperature=2.0, hard_ratio=0.3).per_token(step_of(scores, teacher, labels))
    soft = 4 * forward_kl(torch.log_softmax(teacher / 2, -1), torch.log_softmax(scores / 2, -1))
    assert torch.allclose(found, 0.7 * soft + 0.3 * cross_entropy(scores, labels), atol=1e-6)


def test_cakld_goes_from_forward_to_reverse_and_measures_confidence() -> None:
    scores, teacher, labels = torch.randn(2, 3, 5), 3 * torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    labels[0, 0] = -100
    step = step_of(scores, teacher, labels)
    pair = TeacherScores(teacher).pair(scores)
    assert torch.allclose(Cakld(gamma=0.0).per_token(step), forward_kl(*pair))
    assert torch.allclose(Cakld(gamma=1.0).per_token(step), reverse_kl(*pair))
    prepared = Cakld(batches=2).prepare(None, [step, step, step])  # type: ignore[arg-type]
    assert isinstance(prepared, Cakld)
    assert prepared.gamma == pytest.approx(float(torch.softmax(teacher, -1).amax(-1)[labels != -100].mean()))


def test_layers_are_paired_by_depth() -> None:
    assert layer_pairs(2, 6) == [(0, 2), (1, 5)]
    assert layer_pairs(4, 4, (-1,)) == [(3, 3)]
    with pytest.raises(TrainingError, match="layer 7"):
        layer_pairs(4, 4, (7,))


def test_hidden_streams_and_attention_agree_with_themselves_only() -> None:
    hidden = tuple(torch.randn(1, 4, 6) for _ in range(2))
    attention = tuple((torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4, 3)) for _ in range(2))
    scores = torch.randn(1, 4, 5)
    sequences = Sequences({}, None, torch.randint(5, (1, 4)))
    mine = Outputs(scores, hidden, attention)
    other = Outputs(scores, tuple(3 * h for h in hidden), tuple((-q, k) for q, k in attention))
    for objective, scaled in ((HiddenMatch(), 0.0), (AttentionMatch(), None)):
        same = objective.per_token(view(mine, mine, None, sequences, True, None))
        assert same.shape == (1, 3)
        assert float(same.abs().max()) < 1e-6
        found = float(objective.per_token(view(mine, other, None, sequences, True, None)).sum())
        assert found == pytest.approx(scaled, abs=1e-6) if scaled is not None else found > 1e-3


def test_objectives_are_found_by_name_and_added_up() -> None:
    found = objective_from({"kd": {"hard_ratio": 0.5}, "hidden": {"weight": 10.0}})
    assert found.describe() == "kd + 10·hidden"
    assert found.needs == {"teacher", "hidden"}
    assert objective_from([Kd(), {"hidden": {}}]).describe() == "kd + hidden"
    assert all(isinstance(objective_from(name), OBJECTIVES[name]) for name in OBJECTIVES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kdd", "unknown objective 'kdd'"),
        ({"kd": {"temprature": 2}}, "unknown option 'temprature'"),
        ({"kd": {"hard_ratio": 1.5}}, "hard_ratio=1.5"),
        ({"gkd": {"beta": -0.1}}, "beta=-0.1"),
        ({"kd": 3}, "expected a mapping"),
        (3, "found 3"),
        ({"minillm": {"new_tokens": 0}}, "new_tokens=0"),
    ],
)
def test_bad_objectives_are_refused(spec: object, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        objective_from(spec)


def test_anybody_can_add_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.training.catalogue.OBJECTIVES", dict(OBJECTIVES))

    @register_objective
    @dataclass(frozen=True)
    class Squares(Objective):
        power: float = 2.0
        name: ClassVar[str] = "squares"

        def per_token(self, step: Step) -> Tensor:
            return (step.scores - step.teacher_scores().values).abs().pow(self.power).mean(-1)

    made = objective_from({"squares": {"power": 1.0}})
    step = step_of(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.long))
    assert torch.equal(made.per_token(step), torch.ones(1, 2))
    with pytest.raises(TrainingError, match="known already"):
        register_objective(type("Kd2", (Objective,), {"name": "kd", "per_token": None}))


class Fixed(Policy):
    def __init__(self, chance: float) -> None:
        self.value, self.asked = chance, 0

    def chance(self) -> float:
        return self.value

    def sample(self, sequences: Sequences, **options: object) -> Sequences:
        self.asked += 1
        return sequences


def test_the_on_policy_share_decides() -> None:
    given = Sequences({}, None, None)
    for chance, share, asked in ((0.4, 0.5, 1), (0.6, 0.5, 0), (0.0, 0.0, 0), (0.99, 1.0, 1)):
        policy = Fixed(chance)
        ReverseKd(on_policy=share).draw(given, policy)
        assert policy.asked == asked
