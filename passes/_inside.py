"""Which nodes of the graph lie in a block."""

from __future__ import annotations

import weakref

from torch import fx

from fxcompress.analysis.blocks import find_blocks
from fxcompress.pass_base import BlockContext


def nodes_inside(block: BlockContext) -> set[fx.Node]:
    """All nodes of the blocks that the block's sites lie in."""
    here = {site.node.name for site in block.sites}
    parts = [part for part in _block_names(block.program.graph) if not part.isdisjoint(here)]
    names = frozenset().union(*parts)
    return {node for node in block.program.graph.nodes if node.name in names}


# By name: nodes would keep their graph alive, and with it the entry.
_KNOWN_BLOCKS: weakref.WeakKeyDictionary[fx.Graph, tuple[frozenset[str], ...]] = weakref.WeakKeyDictionary()


def _block_names(graph: fx.Graph) -> tuple[frozenset[str], ...]:
    """Node names of every block; found once per graph, since every block of it asks."""
    if graph not in _KNOWN_BLOCKS:
        blocks = find_blocks(graph)
        _KNOWN_BLOCKS[graph] = tuple(frozenset(node.name for node in block.nodes) for block in blocks)
    return _KNOWN_BLOCKS[graph]
