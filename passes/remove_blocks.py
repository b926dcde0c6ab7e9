"""Remove whole blocks of a deep model: fewer layers, each as wide as before.

    x → f₁ → f₂ → f₃ → y   →   x → f₁ → f₃ → y

A residual block changes its input a little; where it changes it least, or the model's loss least, it can go.
Unlike cut channels, removed blocks make decoding one token at a time faster on any machine: time goes with
the number of steps, not with their width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.edits import Refuse, RemoveBlock, StructuralEdit
from fxcompress.errors import RecipeError
from fxcompress.pass_base import BlockContext, ModelContext, StructuralPass

__all__ = ["RemoveBlocks", "angle"]

CRITERIA = ("perplexity", "taylor", "angular")


@dataclass(frozen=True)
class RemoveBlocks(StructuralPass):
    """Remove the repeated blocks that matter least.

    Args:
        amount: Share of the repeated blocks to remove, above 0 and below 1; rounded to a number of blocks, at
            least 1. Default 0.2.
        count: Number of blocks to remove, instead of a share. Default None.
        criterion: ``"perplexity"`` (default): the loss of the model without the block, one at a time; for
            models that predict no next token, the relative change of its outputs. ``"taylor"``: ``Σ |w · ḡ|``
            over the block's matrices. ``"angular"``: the mean angle between what enters and what leaves it,
            as a part of π.
        contiguous: (angular) Remove one run of blocks, the one with the least angle between its ends. Default
            False.
        protect_first, protect_last: Number of repeated blocks at either end to keep. Default 0; with
            ``"taylor"`` the paper keeps 4 and 2.
        samples: Calibration batches to use, spread evenly. Default 10; None uses all.
        steps: Rounds; each scores what is left anew. Default 1: all at once, as in the paper.

    Raises:
        RecipeError: an option is out of range; fewer blocks can be removed than asked for.
        CalibrationError: there are no data.

    Example:
        >>> RemoveBlocks(count=2, criterion="angular").needs_calibration
        True
    """

    amount: float = 0.2
    count: int | None = None
    criterion: Literal["perplexity", "taylor", "angular"] = "perplexity"
    contiguous: bool = False
    protect_first: int = 0
    protect_last: int = 0
    samples: int | None = 10
    steps: int = 1

    name: ClassVar[str] = "remove-blocks"
    summary: ClassVar[str] = "Remove the blocks (layers) that matter least."
    source: ClassVar[str] = (
        "Kim et al., 2024 (Shortened LLaMA, arXiv:2402.02834), section 3;"
        " Gromov et al., 2024 (arXiv:2403.17887) for the angle"
    )
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        amount: object = self.amount
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < 1:
            raise RecipeError(f"{self.name}: amount={amount!r}, expected a share above 0 and below 1.")
        if self.criterion not in CRITERIA:
            raise RecipeError(
                f"{self.name}: criterion={self.criterion!r}, expected {', '.join(map(repr, CRITERIA))}."
            )
        contiguous: object = self.contiguous
        if type(contiguous) is not bool or (contiguous and self.criterion != "angular"):
            raise RecipeError(
                f"{self.name}: contiguous={self.contiguous!r} with criterion={self.criterion!r}.",
                fix="use it with criterion='angular'.",
            )
        least = {"count": 1, "samples": 1, "steps": 1, "protect_first": 0, "protect_last": 0}
        for option, low in least.items():
            value = getattr(self, option)
            if value is None and option in ("count", "samples"):
                continue
            if type(value) is not int or value < low:
                raise RecipeError(f"{self.name}: {option}={value!r}, expected an integer, at least {low}.")

    @property
    def rounds(self) -> int:
        """One per step."""
        return self.steps

    def choose(self, model: ModelContext) -> Iterator[StructuralEdit | Refuse]:
        """Score every block that may go; take the lowest."""
        repeated = [block for block in model.blocks if block.name.startswith("block ")]
        end = len(repeated) - self.protect_last
        kept_ends = [*repeated[: self.protect_first], *repeated[max(end, self.protect_first) :]]
        able = []
        for block in repeated:
            reason = "its block is protected" if block in kept_ends else model.cannot_remove(block.index)
            name = own_parameter(block)
            if reason or name is None:
                if name is not None:
                    yield Refuse(name, reason)
            else:
                able.append((block, name))
        count = self._this_round(model)
        if count > len(able) or count >= len(repeated):
            raise RecipeError(
                f"{self.name}: {count} blocks cannot go: the model has {len(repeated)}, of which {len(able)}"
                " may be removed, and one must stay.",
                fix="ask for fewer, or protect fewer.",
            )
        if count == 0:
            return
        scores = self._scores(model, able, count)
        order = sorted(range(len(able)), key=lambda place: (scores[place], place))
        taken = order[:count]
        if self.contiguous:
            taken = list(range(order[0], order[0] + count))
        for place in sorted(taken):
            block, name = able[place]
            yield RemoveBlock(name, f"{block.name}: {self.criterion} {scores[place]:.4g}")

    def _this_round(self, model: ModelContext) -> int:
        """How many blocks go in this round; every round takes an equal part of all that go."""
        before = sum(model.first_cost.repeated)
        total = max(1, round(self.amount * before)) if self.count is None else self.count
        return total * (model.round + 1) // self.steps - total * model.round // self.steps

    def _scores(self, model: ModelContext, able: list[tuple[BlockContext, str]], count: int) -> list[float]:
        """One per block that may go; the lowest go. Of a run of blocks, at its first."""
        whole = model.whole(self.samples)
        if self.criterion == "perplexity":
            losses = whole.without_each([name for _, name in able])
            return [_perplexity(loss) if whole.predicts_tokens else loss for loss in losses]
        if self.criterion == "taylor":
            return self._taylor(model, able)
        streams = whole.streams()
        if not self.contiguous:
            return [_angle_between(streams, block.index, block.index) for block, _ in able]
        places = [block.index for block, _ in able]
        found = []
        for start, first in enumerate(places):
            last = places[start + count - 1] if start + count <= len(places) else -1
            found.append(_angle_between(streams, first, last) if last == first + count - 1 else math.inf)
        if math.isinf(min(found)):
            raise RecipeError(
                f"{self.name}: no run of {count} blocks can be removed.", fix="use contiguous=False."
            )
        return found

    def _taylor(self, model: ModelContext, able: list[tuple[BlockContext, str]]) -> list[float]:
        """``Σ |w · ḡ|`` over the matrices that each block alone uses."""
        owner = {
            name: place
            for place, (block, _) in enumerate(able)
            for name in own_parameters(block)
            if model.program.weights[name].dim() >= 2
        }
        sums: dict[str, Tensor] = {}
        batches: dict[str, int] = {}
        for name, gradient in model.whole(self.samples).gradients(owner):
            g = gradient.float()
            sums[name] = sums[name].add_(g) if name in sums else g.clone()
            batches[name] = batches.get(name, 0) + 1
        scores = [0.0] * len(able)
        for name, total in sums.items():
            change = model.weight(name).double() * total.double() / batches[name]
            scores[owner[name]] += float(change.abs().sum())
        return scores


def own_parameters(block: BlockContext) -> list[str]:
    """Parameters that no other block uses."""
    inside = {site.node for site in block.sites}
    found = []
    for site in block.sites:
        users = {user for node in block.program.weight_node(site.name) for user in node.users}
        if users <= inside | {node for own in block.sites for node in own.chain}:
            found.append(site.name)
    return list(dict.fromkeys(found))


def own_parameter(block: BlockContext) -> str | None:
    """The first parameter that no other block uses: it names the block in edits."""
    return next(iter(own_parameters(block)), None)


def angle(before: Tensor, after: Tensor) -> float:
    """Mean angle between rows of ``[tokens, width]`` as a part of π: 0 parallel, 0.5 orthogonal.

    Example:
        >>> round(angle(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])), 6)
        0.5
    """
    one, two = before.double(), after.double()
    size = one.norm(dim=-1) * two.norm(dim=-1)
    cosine = (one * two).sum(-1) / size.clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.arccos(cosine.clamp(-1, 1)).mean()) / math.pi


def _angle_between(streams: list[tuple[Tensor, Tensor] | None], first: int, last: int) -> float:
    start, end = streams[first], streams[last]
    return math.inf if start is None or end is None else angle(start[0], end[1])


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
