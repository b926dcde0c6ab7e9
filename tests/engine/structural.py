"""Structural passes for tests: they cut what they are told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from fxcompress.edits import Edit, KeepUnits, Refuse, RemoveBlock, SetTensor, StructuralEdit
from fxcompress.pass_base import BlockContext, ModelContext, StructuralPass
from fxcompress.registry import register_pass


@register_pass
@dataclass(frozen=True)
class KeepFirst(StructuralPass):
    """Keeps the first units of every group of some kinds; the n-th group loses ``fewer · n`` more."""

    keep: float = 0.5
    kinds: tuple[str, ...] = ("channels", "heads", "experts")
    fewer: int = 0
    times: int = 1

    name: ClassVar[str] = "keep-first"
    summary: ClassVar[str] = "keeps the first units"
    chosen: ClassVar[list[int]] = []

    @property
    def rounds(self) -> int:
        return self.times

    def choose(self, model: ModelContext) -> Iterator[StructuralEdit | Refuse]:
        self.chosen.append(model.round)
        groups = [group for group in model.groups.values() if not group.frozen and group.kind in self.kinds]
        for number, group in enumerate(groups):
            count = max(group.least, int(group.units * self.keep) - self.fewer * number)
            if count < group.units:
                yield KeepUnits(group.name, torch.arange(count), "the first ones")


@register_pass
@dataclass(frozen=True)
class DropBlocks(StructuralPass):
    """Removes repeated blocks by their place among those that can be removed."""

    which: tuple[int, ...] = (0,)

    name: ClassVar[str] = "drop-blocks"
    summary: ClassVar[str] = "removes blocks"

    def choose(self, model: ModelContext) -> Iterator[StructuralEdit | Refuse]:
        able = [block for block in model.blocks if not model.cannot_remove(block.index)]
        for place in self.which:
            yield RemoveBlock(able[place].sites[0].name, "told so")


@register_pass
@dataclass(frozen=True)
class Halve(KeepFirst):
    """Keeps the first half, and doubles what reads it: a value edit that must survive the cut."""

    name: ClassVar[str] = "halve-and-double"
    summary: ClassVar[str] = "keeps the first half, doubled"

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        for decision in block.decisions:
            yield decision
            assert isinstance(decision, KeepUnits)
            for member in block.groups[decision.group].consumers():
                yield SetTensor(member.name, 2 * block.weight(member.name), "doubled")
