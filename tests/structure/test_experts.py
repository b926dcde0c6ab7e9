"""Routed experts: masked ones are never chosen, and cutting them equals that, however tokens are dealt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis.channel_groups import ChannelGroups, find_channel_groups
from fxcompress.calibration import as_calibration
from fxcompress.capture import capture_model
from fxcompress.capture.program import Program
from fxcompress.edits import KeepUnits, Refuse, StructuralEdit
from fxcompress.errors import RecipeError, WeightError
from fxcompress.manager import RunResult, run_recipe
from fxcompress.pass_base import ModelContext
from fxcompress.passes import PruneChannels
from fxcompress.structure.cut_program import cut_program
from fxcompress.structure.mask_program import mask_program
from fxcompress.structure.oracle import check_kept

Route = Callable[["Experts", Tensor], Tensor]
TOKENS, WIDTH, EXPERTS, HIDDEN = 11, 6, 5, 7


class Experts(nn.Module):
    """``route`` deals tokens ``[T, 6]`` to 5 experts by the router's scores."""

    def __init__(self, route: Route, count: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.route, self.count = route, count
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.correction = nn.Parameter(torch.randn(EXPERTS))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Any:
        found = self.route(self, x)
        return self.last(found) if isinstance(found, Tensor) else (self.last(found[0]), found[1])

    def dense(self, x: Tensor, shares: Tensor) -> Tensor:
        """Every expert computes; ``shares: [T, E]``."""
        hidden = torch.einsum("tk,ekn->etn", x, self.up).relu()
        return torch.einsum("etn,enk,te->tk", hidden, self.down, shares)


def softmax_best(m: Experts, x: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.topk(torch.softmax(m.gate(x), -1), m.count)
    return found.values / found.values.sum(-1, keepdim=True), found.indices


def soft(m: Experts, x: Tensor) -> Tensor:
    return m.dense(x, m.gate(x).softmax(-1))


def one_hot(m: Experts, x: Tensor) -> Tensor:
    values, chosen = softmax_best(m, x)
    return m.dense(x, (F.one_hot(chosen, EXPERTS) * values[..., None]).sum(1))


def scattered(m: Experts, x: Tensor) -> Tensor:
    values, chosen = softmax_best(m, x)
    return m.dense(x, torch.zeros_like(m.gate(x)).scatter(1, chosen, values))


def looked_up(m: Experts, x: Tensor) -> Tensor:
    """Matrices and biases of the chosen experts, token by token."""
    values, chosen = softmax_best(m, x)
    flat = chosen.reshape(-1)
    rows = x.repeat_interleave(m.count, 0)[:, None]
    made = torch.bmm(torch.bmm(rows, m.up[flat]).relu(), m.down[flat])[:, 0] + m.bias[flat]
    return (made.view(TOKENS, m.count, WIDTH) * values[..., None]).sum(1)


def corrected(m: Experts, x: Tensor) -> Tensor:
    """The choice is made with a correction for each expert, the shares without."""
    scores = m.gate(x).sigmoid()
    chosen = torch.topk(scores + m.correction, m.count).indices
    shares = scores.gather(1, chosen)
    rows = x[:, None].expand(-1, m.count, -1)[:, :, None]  # [T, k, 1, K]
    made = (rows @ m.up[chosen]).relu() @ m.down[chosen]
    return (made[:, :, 0] * (shares / shares.sum(-1, keepdim=True))[..., None]).sum(1)


def one_group(m: Experts, x: Tensor) -> Tensor:
    """Code for groups of experts, of which there is one."""
    scores = m.gate(x).sigmoid()
    corrected = scores + m.correction
    best = corrected.view(-1, 1, EXPERTS).topk(2).values.sum(-1)  # [T, 1]
    open_ones = torch.zeros_like(best).scatter_(1, best.topk(1).indices, 1)
    open_ones = open_ones[..., None].expand(-1, 1, EXPERTS).reshape(-1, EXPERTS)
    chosen = corrected.masked_fill(~open_ones.bool(), float("-inf")).topk(m.count).indices
    return m.dense(x, (F.one_hot(chosen, EXPERTS) * scores.gather(1, chosen)[..., None]).sum(1))


def one_expert(m: Experts, x: Tensor) -> Tensor:
    logits = m.gate(x)
    share = (logits.amax(-1) - logits.logsumexp(-1)).exp()
    chosen = logits.argmax(-1)
    made = torch.bmm(torch.bmm(x[:, None], m.up[chosen]).relu(), m.down[chosen])[:, 0]
    return made * share[:, None]


def one_after_the_other(m: Experts, x: Tensor) -> Tensor:
    logits = m.gate(x)
    first = logits.max(-1, keepdim=True).indices
    second = logits.scatter(1, first, float("-inf")).max(-1, keepdim=True).indices
    chosen = torch.cat([first, second], 1)
    values = logits.log_softmax(-1).gather(1, chosen).exp()
    return m.dense(x, (F.one_hot(chosen, EXPERTS) * values[..., None]).sum(1))


def sorted_rows(m: Experts, x: Tensor) -> Tensor:
    """Rows in the order of their experts, as a grouped product wants them."""
    values, chosen = softmax_best(m, x)
    order = chosen.reshape(-1).argsort()
    experts, places = chosen.reshape(-1).sort()
    ends = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
    rows = x[places // m.count]
    made = torch.ops.transformers.grouped_mm_fallback(rows, m.up, ends).relu()
    made = torch.ops.transformers.grouped_mm_fallback(made, m.down, ends) + m.bias[experts]
    made = made * values.reshape(-1)[places][:, None]
    return made[order.argsort()].view(TOKENS, m.count, WIDTH).sum(1)


def named(item: object) -> str | None:
    return getattr(item, "__name__", None)


def analysed(route: Route, count: int = 2) -> tuple[Program, ChannelGroups, Tensor]:
    import transformers.integrations.moe  # noqa: F401  (registers the grouped product)

    x = torch.randn(TOKENS, WIDTH)
    program = capture_model(Experts(route, count).eval(), (x,))
    return program, find_channel_groups(program), x


ROUTES = {
    soft: 1,
    one_hot: 2,
    scattered: 2,
    looked_up: 2,
    corrected: 2,
    one_group: 2,
    one_expert: 1,
    one_after_the_other: 2,
    sorted_rows: 2,
}


@pytest.mark.parametrize(("route", "least"), ROUTES.items(), ids=named)
def test_cutting_equals_never_choosing(route: Route, least: int) -> None:
    program, groups, x = analysed(route)
    (group,) = (group for group in groups if group.kind == "experts")
    assert (group.units, group.least) == (EXPERTS, least)
    assert {"up", "down", "gate.weight", "gate.bias"} <= {member.name for member in group.members}
    for kept in ([0, 1], [1, 3], [2, 3, 4], [0, 1, 3, 4]):
        assert check_kept(program, groups, {group.name: torch.tensor(kept)}, [x]) <= 1e-9
    if least == 1:
        assert check_kept(program, groups, {group.name: torch.tensor([4])}, [x]) <= 1e-9


def test_masked_experts_are_not_only_zero() -> None:
    """Zeroing the weights alone is something else: the router would go on choosing what is zero."""
    program, groups, x = analysed(one_hot)
    (group,) = (group for group in groups if group.kind == "experts")
    kept = {group.name: torch.tensor([1, 2])}
    masked = mask_program(program, groups, kept)
    (never,) = masked.run_flat([x])
    (zeroed,) = program.run_flat([x], masked.weights)
    (cut,) = cut_program(program, groups, kept).run_flat([x])
    torch.testing.assert_close(cut, never)
    assert float((zeroed - never).abs().max()) > 1e-2


def test_fewer_than_are_chosen_is_refused() -> None:
    program, groups, _ = analysed(scattered, 3)
    (group,) = (group for group in groups if group.kind == "experts")
    for made in (cut_program, mask_program):
        with pytest.raises(WeightError, match=r"2 of its units would stay, but 3 are chosen at once"):
            made(program, groups, {group.name: torch.tensor([0, 4])})


def told(m: Experts, x: Tensor) -> Any:
    return one_hot(m, x), m.gate(x)


def computed_with(m: Experts, x: Tensor) -> Tensor:
    values, chosen = softmax_best(m, x)
    return m.dense(x, (F.one_hot(chosen, EXPERTS) * values[..., None]).sum(1)) * (chosen.sum(-1) * 2)[:, None]


def told_who(m: Experts, x: Tensor) -> Any:
    return one_hot(m, x), softmax_best(m, x)[1]


def worst(m: Experts, x: Tensor) -> Tensor:
    values, chosen = torch.topk(m.gate(x).softmax(-1), m.count, largest=False)
    return m.dense(x, (F.one_hot(chosen, EXPERTS) * values[..., None]).sum(1))


def normalized(m: Experts, x: Tensor) -> Tensor:
    shares = m.gate(x).sigmoid()
    return m.dense(x, shares / shares.sum(-1, keepdim=True))


def everyone(m: Experts, x: Tensor) -> Tensor:
    values, chosen = torch.topk(m.gate(x).softmax(-1), EXPERTS)
    return m.dense(x, (F.one_hot(chosen, EXPERTS) * values[..., None]).sum(1))


REASONS = {
    told: "it is an output of the model",
    told_who: "computes with the numbers of its units",
    computed_with: "computes with the numbers of its units",
    worst: "works along it",
    normalized: "a masked unit need not be zero",
    everyone: "chooses all 5 of them",
}


@pytest.mark.parametrize(("route", "reason"), REASONS.items(), ids=named)
def test_what_would_notice_is_frozen(route: Route, reason: str) -> None:
    _, groups, _ = analysed(route)
    assert not [group for group in groups if group.kind == "experts"]
    found = [g.frozen for g in groups.frozen for m in g.members if (m.name, m.dim) == ("gate.weight", 0)]
    assert len(found) == 1
    assert reason in found[0]


# --- pruning -----------------------------------------------------------------------------------------------


def prune(route: Route, **options: Any) -> RunResult:
    program, _, x = analysed(route)
    data = as_calibration([(x,), (torch.randn(TOKENS, WIDTH),)], program)
    return run_recipe(program, PruneChannels(**{"granularity": "experts", **options}), data)


@pytest.mark.parametrize("importance", ["l1", "wanda", "flap", "taylor"])
def test_every_criterion_cuts_experts(importance: str) -> None:
    """The proof that the cut equals the mask is part of the run."""
    result = prune(sorted_rows, importance=importance, amount=0.4, scope="global")
    (units,) = result.rounds[0].change.kept.values()
    assert len(units) == 3
    assert result.program.weights["up"].shape == (3, WIDTH, HIDDEN)
    assert result.program.weights["gate.weight"].shape == (3, WIDTH)
    assert result.report.structure is not None
    after, before = (result.report.structure[when]["parameters"] for when in ("after", "before"))
    each = WIDTH + 1 + 2 * WIDTH * HIDDEN + WIDTH  # a row of the router, two matrices, a bias
    assert before - after == 2 * each


def test_experts_and_their_channels_in_two_rounds() -> None:
    result = prune(sorted_rows, granularity=("experts", "channels"), amount=0.4, steps=2, importance="wanda")
    assert len(result.rounds) == 2
    assert result.program.weights["up"].shape == (3, WIDTH, 4)


def test_no_more_can_go_than_the_router_leaves() -> None:
    with pytest.raises(
        RecipeError, match=r"leave 1 of 5 experts.*2 are chosen at once: at most 0.600 can go"
    ):
        prune(one_hot, amount=0.8)
    with pytest.raises(RecipeError, match=r"amount=0.9 of parameters cannot be taken.*at most 0.5"):
        prune(one_hot, amount=0.9, target="parameters")
    with pytest.raises(RecipeError, match="1 of 5 experts would stay, but its router chooses 2"):
        prune_to_one()
    assert [len(units) for units in prune(one_hot, amount=0.6).rounds[0].change.kept.values()] == [2]
    assert [len(u) for u in prune(one_hot, amount=0.6, round_to=3).rounds[0].change.kept.values()] == [3]


def test_experts_whose_rows_cannot_be_told_apart_need_another_criterion() -> None:
    with pytest.raises(
        RecipeError, match=r"none of 1 .*gate.weight: no weight that reads its experts could be"
    ):
        prune(looked_up, amount=0.4, importance="wanda")
    assert [len(u) for u in prune(looked_up, amount=0.4, importance="l2").rounds[0].change.kept.values()] == [
        3
    ]


def prune_to_one() -> None:
    program, groups, x = analysed(one_hot)
    (group,) = (group for group in groups if group.kind == "experts")

    @dataclass(frozen=True)
    class One(PruneChannels):
        def choose(self, model: ModelContext) -> Iterator[StructuralEdit | Refuse]:
            yield KeepUnits(group.name, torch.tensor([2]), "alone")

    run_recipe(program, One(granularity="experts"), as_calibration([(x,)], program))


@pytest.mark.parametrize("option", ["recover", "compensate"])
def test_there_is_nothing_to_refit_for_experts_alone(option: str) -> None:
    with pytest.raises(RecipeError, match=f"{option}=true has nothing to refit"):
        PruneChannels(granularity="experts", importance="flap", **{option: True})
