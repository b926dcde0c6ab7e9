"""What is known about a program before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Collection

from torch import fx

from fxcompress.analysis.blocks import Block, find_blocks
from fxcompress.analysis.bypass import find_bypass, owned_weights
from fxcompress.analysis.edges import Edge, find_edges
from fxcompress.analysis.site_types import Site
from fxcompress.analysis.sites import find_sites
from fxcompress.capture.program import Program

__all__ = ["Plan"]


class Plan:
    """What is known about a program before anything runs: its blocks, its sites, which values must be kept.

    Args:
        program: The captured program.

    Attributes:
        blocks: Consecutive segments of the graph.
        sites: Every weight site in graph order.
        block_sites: The sites whose op lies in each block.
        keep: Per block, the values that later blocks or the graph output read; what flows between blocks.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.blocks: list[Block] = find_blocks(program.graph)
        self.sites: list[Site] = find_sites(program)
        self.sites_at: dict[fx.Node, list[Site]] = {}
        for site in self.sites:
            self.sites_at.setdefault(site.node, []).append(site)
        self.block_of = {node: block.index for block in self.blocks for node in block.nodes}
        self.block_sites: list[list[Site]] = [[] for _ in self.blocks]
        for site in self.sites:
            if site.node in self.block_of:
                self.block_sites[self.block_of[site.node]].append(site)
        self.output = next(node for node in program.graph.nodes if node.op == "output")
        self.inputs = {
            node.name: node for node in program.placeholders() if node.name not in program.weight_of
        }
        self.keep = self._keep()

    def _keep(self) -> list[frozenset[fx.Node]]:
        needed = {node for node in self.output.all_input_nodes if node in self.block_of}
        keep: list[frozenset[fx.Node]] = []
        for block in reversed(self.blocks):
            keep.append(frozenset(needed))
            needed |= {node for node in block.inputs if node in self.block_of}
        return [
            frozenset(n for n in nodes if self.block_of[n] <= i) for i, nodes in enumerate(reversed(keep))
        ]

    @functools.cached_property
    def edges(self) -> list[Edge]:
        """Every activation edge in graph order."""
        return find_edges(self.program, self.sites)

    @functools.cached_property
    def edges_at(self) -> dict[fx.Node, list[Edge]]:
        """Edges by their op."""
        found: dict[fx.Node, list[Edge]] = {}
        for edge in self.edges:
            found.setdefault(edge.node, []).append(edge)
        return found

    def bypass(self, index: int, removed: Collection[str]) -> dict[fx.Node, fx.Node] | None:
        """What takes the place of the values of block ``index``; None when it is not removed.

        Args:
            index: The block.
            removed: A parameter of every removed block.
        """
        if not removed or set(removed).isdisjoint(owned_weights(self.program, self.blocks[index])):
            return None
        found = find_bypass(self.program, self.blocks, index)
        assert not isinstance(found, str), found  # structural edits are checked when they are made
        return found.values

    def uses(self, name: str) -> list[Site]:
        """All sites of one parameter."""
        return [site for site in self.sites if site.name == name]
