"""What a pass sees of one block: the block's sites, weights, statistics and raw inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.analysis.edges import Edge
from fxcompress.analysis.site_types import Site
from fxcompress.calibration.function import ProgramBlock
from fxcompress.calibration.statistics import ActivationStatistics, as_tokens
from fxcompress.calibration.walk import BlockRunner, Plan, Walk
from fxcompress.edits import CompressionState, StructuralEdit
from fxcompress.errors import CalibrationError
from fxcompress.forms import Transform
from fxcompress.ops import apply_transforms
from fxcompress.pass_base import Statistics

__all__ = ["Context", "Feed"]


class Feed:
    """Calibration activations for one pass, brought forward only when somebody looks.

    Block ``i`` sees the blocks before it as they were when each of them was finished; the states at those
    moments are kept (they share tensors) until the walk has passed. So a resumed run, a run in which the pass
    looks at every block and one in which it looks at the last block alone all see the same numbers.

    Args:
        make_walk: Starts a walk at the program's inputs, taking the options of :class:`Walk`; None when there
            are no data.
        finished: States in which blocks were left before the pass began.
    """

    def __init__(
        self, make_walk: Callable[..., Walk] | None, finished: Sequence[CompressionState] = ()
    ) -> None:
        self._make_walk = make_walk
        self._walk: Walk | None = None
        self._finished: list[CompressionState | None] = list(finished)

    def finish_block(self, state: CompressionState) -> None:
        """Remember the state in which a block was left."""
        self._finished.append(state.copy())

    def start(self, asked_by: str, **options: bool) -> Walk:
        """A new walk at the program's inputs.

        Args:
            asked_by: For messages.
            options: Of :class:`Walk`.

        Raises:
            CalibrationError: there are no calibration data.
        """
        if self._make_walk is None:
            raise CalibrationError(
                f"{asked_by}: activations were asked for, but there are no calibration data.",
                fix="pass calibration=….",
            )
        return self._make_walk(**options)

    def walk_at(self, index: int, asked_by: str) -> Walk:
        """The walk, at block ``index``.

        Raises:
            CalibrationError: there are no calibration data.
        """
        if self._walk is None:
            self._walk = self.start(asked_by)
        while self._walk.position < index:
            state = self._finished[self._walk.position]
            assert state is not None
            self._finished[self._walk.position] = None
            self._walk.advance(state)
        return self._walk


class Context:
    """The manager's :class:`fxcompress.pass_base.BlockContext`.

    Args:
        plan: The program's plan.
        index: Which block.
        state: The run's state; edits are applied to it while the pass solves.
        feed: Where activations come from.
        pass_name: Who solves, for messages.
        seed: Seed of :attr:`generator`.
        groups: The program's channel groups, for a structural pass.
        decisions: What it decided about this block.
        survey: Gives what the pass found out about the whole model.
    """

    def __init__(
        self,
        plan: Plan,
        index: int,
        state: CompressionState,
        feed: Feed,
        pass_name: str,
        seed: int,
        *,
        groups: Mapping[str, ChannelGroup] | None = None,
        decisions: Sequence[StructuralEdit] = (),
        survey: Callable[[], Any] = lambda: None,
    ) -> None:
        self.program = plan.program
        self.state = state
        self.index = index
        self.name = plan.blocks[index].name
        self.sites: Sequence[Site] = tuple(plan.block_sites[index])
        self.generator = torch.Generator().manual_seed(seed)
        self._plan = plan
        self._feed = feed
        self._survey = survey
        self._where = f"pass {pass_name!r}, {self.name}"
        self._runner: BlockRunner | None = None
        self._known: dict[tuple[str, bool], ActivationStatistics] = {}
        self._known_for: dict[str, tuple[Transform, ...]] = {}
        self.groups: Mapping[str, ChannelGroup] = groups or {}
        self.decisions: Sequence[StructuralEdit] = decisions

    @property
    def survey(self) -> Any:
        """What the pass found out about the whole model before its first block."""
        return self._survey()

    def weight(self, name: str) -> Tensor:
        """Current dense tensor of a parameter; read only."""
        return self.state.weight(name)

    def statistics(self, sites: Sequence[Site], *, gram: bool = False) -> dict[str, Statistics]:
        """Statistics of the inputs of ``sites``, keyed by ``site.input.name``.

        Inputs already measured since the last edit are not measured again. A site's input transforms count:
        what is measured is what its product multiplies.

        Raises:
            CalibrationError: no data, a site without an activation input, NaN/inf in one, or sites with the
                same input and different transforms.
        """
        first = {self._input(site).name: site for site in reversed(sites)}
        for site in sites:
            self._check_transforms(site, first[self._input(site).name])
        for name, site in first.items():
            transforms = self.state.form(site.name).transform_in
            if self._known_for.get(name, transforms) != transforms:
                for gram_too in (False, True):
                    self._known.pop((name, gram_too), None)
            self._known_for[name] = transforms
        missing = {name: site for name, site in first.items() if not self._have(name, gram)}
        if missing:
            found = {
                name: ActivationStatistics(f"{site.name} (input {name})", gram=gram)
                for name, site in missing.items()
            }
            nodes = [self._input(site) for site in missing.values()]
            walk, runner = self._ready()
            for values in walk.collect(runner, nodes):
                for (name, site), node in zip(missing.items(), nodes, strict=True):
                    x = apply_transforms(values[node], self.state.form(site.name).transform_in)
                    found[name].update(as_tokens(site, x))
            self._known.update({(name, gram): statistics for name, statistics in found.items()})
        return {
            name: cast(Statistics, self._known.get((name, True)) or self._known[name, gram]) for name in first
        }

    def batches(self, site: Site) -> Iterator[Tensor]:
        """The input of one site after its input transforms, batch by batch.

        Raises:
            CalibrationError: no data, or the site has no activation input.
        """
        name = self._input(site).name
        for values in self.inputs([site]):
            yield values[name]

    def inputs(self, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
        """The inputs of several sites after their input transforms, by ``site.input.name``, batch by batch.

        Raises:
            CalibrationError: no data, a site has no activation input, or sites with the same input have
                different transforms.
        """
        first = {self._input(site): site for site in reversed(sites)}
        for site in sites:
            self._check_transforms(site, first[self._input(site)])
        transforms = {node: self.state.form(site.name).transform_in for node, site in first.items()}
        walk, runner = self._ready()
        for values in walk.collect(runner, list(first)):
            yield {node.name: apply_transforms(values[node], transforms[node]) for node in first}

    @property
    def edges(self) -> Sequence[Edge]:
        """The activation edges whose op lies in this block."""
        return [edge for edge in self._plan.edges if self._plan.block_of.get(edge.node) == self.index]

    def edge_statistics(self, edges: Sequence[Edge]) -> dict[Edge, Statistics]:
        """Statistics of the values on ``edges``, all dimensions but the last being tokens.

        Raises:
            CalibrationError: no data, or NaN/inf in a value.
        """
        found = {edge: ActivationStatistics(f"{edge.anchor} ({edge.argument})") for edge in edges}
        walk, runner = self._ready()
        for values in walk.collect(runner, [edge.value for edge in edges]):
            for edge, statistics in found.items():
                x = values[edge.value]
                statistics.update(x.reshape(-1, x.shape[-1]))
        return {edge: cast(Statistics, statistics) for edge, statistics in found.items()}

    def values(self, nodes: Sequence[torch.fx.Node]) -> Iterator[dict[torch.fx.Node, Any]]:
        """Values of nodes of this block, or that it reads, batch by batch.

        Raises:
            CalibrationError: no data, or a node's value is not alive in this block.
        """
        walk, runner = self._ready()
        mine = [node for node in nodes if self._plan.block_of.get(node) == self.index]
        for index, found in enumerate(walk.collect(runner, mine)):
            alive = walk.inputs[index] | walk.values[index] | found
            missing = [node.name for node in nodes if node not in alive]
            if missing:
                raise CalibrationError(f"{self._where}: {missing[0]} has no value here.")
            yield {node: alive[node] for node in nodes}

    def function(self) -> ProgramBlock:
        """The block as a differentiable function.

        Raises:
            CalibrationError: there are no calibration data.
        """
        return ProgramBlock(self._plan, self._feed.walk_at(self.index, self._where), self.state, self._where)

    def edited(self, names: Sequence[str]) -> None:
        """Called by the manager after each edit: what was measured no longer holds."""
        self._known.clear()
        self._known_for.clear()
        if self._runner is not None:
            self._runner.forget(names)

    def _check_transforms(self, site: Site, other: Site) -> None:
        mine, theirs = (self.state.form(one.name).transform_in for one in (site, other))
        same = len(mine) == len(theirs) and all(a.same_as(b) for a, b in zip(mine, theirs, strict=True))
        if not same:
            raise CalibrationError(
                f"{self._where}: {site.name} and {other.name} share an input but transform it differently.",
                fix="ask for the statistics of each by itself.",
            )

    def _have(self, name: str, gram: bool) -> bool:
        return (name, True) in self._known or (name, gram) in self._known

    def _input(self, site: Site) -> torch.fx.Node:
        if site.input is None:
            raise CalibrationError(f"{self._where}: {site.name} has no activation input ({site.kind.value}).")
        if self._plan.block_of.get(site.node) != self.index:
            raise CalibrationError(f"{self._where}: {site.name} is not a site of this block.")
        return site.input

    def _ready(self) -> tuple[Walk, BlockRunner]:
        walk = self._feed.walk_at(self.index, self._where)
        if self._runner is None:
            self._runner = walk.runner(self.state)
        return walk, self._runner
