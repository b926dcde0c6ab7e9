"""Objectives by name, weighted sums of them, and what a recipe may write for one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxcompress.errors import TrainingError
from fxcompress.registry import close_matches
from fxcompress.training.layerwise import AttentionMatch, HiddenMatch, Ted
from fxcompress.training.objective import Models, Objective, Policy, Sequences, Step
from fxcompress.training.objectives import (
    Cakld,
    CrossEntropy,
    Gkd,
    Kd,
    MiniLlm,
    ReverseKd,
    SkewKd,
    unknown_option,
)

__all__ = ["OBJECTIVES", "Weighted", "objective_from", "register_objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (CrossEntropy, Kd, ReverseKd, SkewKd, Gkd, Cakld, MiniLlm, HiddenMatch, AttentionMatch, Ted)
}


def register_objective(cls: type[Objective]) -> type[Objective]:
    """Make an objective known by its name; a class decorator.

    Raises:
        TrainingError: another objective has the name.
    """
    if OBJECTIVES.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise TrainingError(f"objective {cls.name!r} is known already: {OBJECTIVES[cls.name].__qualname__}.")
    OBJECTIVES[cls.name] = cls
    return cls


@dataclass(frozen=True)
class Weighted(Objective):
    """A weighted sum of objectives; the first one draws the sequences.

    Args:
        parts: Pairs of a weight and an objective.
    """

    parts: tuple[tuple[float, Objective], ...]

    name: ClassVar[str] = "weighted"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """All that the parts need."""
        return frozenset().union(*(part.needs for _, part in self.parts))

    @property
    def on_policy(self) -> float:
        """Of the first part."""
        return self.parts[0][1].on_policy

    def layers(self, models: Models, example: Step) -> nn.Module | None:
        """Those of all parts."""
        made = {str(i): part.layers(models, example) for i, (_, part) in enumerate(self.parts)}
        kept = {key: module for key, module in made.items() if module is not None}
        return nn.ModuleDict(kept) if kept else None

    def prepare(self, models: Models, steps: Any) -> Objective:
        """Prepare every part."""
        parts = []
        for index, (weight, part) in enumerate(self.parts):
            own = dataclasses.replace(models, module=_part(models.module, index))
            mine = (dataclasses.replace(step, module=_part(step.module, index)) for step in steps)
            parts.append((weight, part.prepare(own, mine)))
        return dataclasses.replace(self, parts=tuple(parts))

    def draw(self, sequences: Sequences, policy: Policy) -> Sequences:
        """As the first part does."""
        return self.parts[0][1].draw(sequences, policy)

    def per_token(self, step: Step) -> Tensor:
        """The weighted sum."""
        return self._sum([part.per_token(self._step(step, i)) for i, (_, part) in enumerate(self.parts)])

    def held_out(self, step: Step) -> Tensor:
        """The weighted sum of what the parts are judged by."""
        return self._sum([part.held_out(self._step(step, i)) for i, (_, part) in enumerate(self.parts)])

    def _sum(self, losses: list[Tensor]) -> Tensor:
        weighted = [weight * loss for (weight, _), loss in zip(self.parts, losses, strict=True)]
        return torch.stack(weighted).sum(0)

    def _step(self, step: Step, index: int) -> Step:
        return dataclasses.replace(step, module=_part(step.module, index))

    def describe(self) -> str:
        """E.g. ``"kd + 0.5·hidden"``."""
        return " + ".join(
            part.describe() if weight == 1 else f"{weight:g}·{part.describe()}" for weight, part in self.parts
        )


def _part(module: nn.Module | None, index: int) -> nn.Module | None:
    if isinstance(module, nn.ModuleDict) and str(index) in module:
        return module[str(index)]
    return None


def objective_from(spec: Any) -> Objective:
    """An objective from what a user writes.

    Args:
        spec: An :class:`Objective`; a name; ``{name: {option: value}}``; or a mapping of several names
            (or a list of such) whose options may hold ``weight``: their sum.

    Raises:
        TrainingError: unknown names or options.

    Example:
        >>> objective_from({"kd": {"hard_ratio": 0.5}, "hidden": {"weight": 10.0}}).describe()
        'kd + 10·hidden'
    """
    if isinstance(spec, Objective):
        return spec
    if isinstance(spec, str):
        return _build(spec, {})[1]
    if isinstance(spec, Mapping) and spec:
        parts = [_build(str(name), options) for name, options in spec.items()]
    elif isinstance(spec, Sequence) and spec:
        parts = [(1.0, objective_from(item)) for item in spec]
    else:
        raise TrainingError(
            f"objective: found {spec!r}.", fix="give a name, {name: {option: value}} or an Objective."
        )
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    return Weighted(tuple(parts))


def _build(name: str, options: Any) -> tuple[float, Objective]:
    if name not in OBJECTIVES:
        raise TrainingError(f"unknown objective {name!r}.", fix=close_matches(name, OBJECTIVES))
    cls = OBJECTIVES[name]
    if options is not None and not isinstance(options, Mapping):
        raise TrainingError(f"objective {name!r}: its options are {options!r}, expected a mapping.")
    given = dict(options or {})
    weight = given.pop("weight", 1.0) if "weight" not in _names(cls) else 1.0
    for option in given:
        if option not in _names(cls):
            raise unknown_option(name, str(option), _names(cls))
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return float(weight), cls(**values)


def _names(cls: type[Objective]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]
