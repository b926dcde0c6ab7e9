"""Remove blocks from a program: their outputs become their inputs, and their parameters go."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxcompress.analysis.blocks import Block
from fxcompress.analysis.bypass import Bypass, find_bypass
from fxcompress.capture.program import Program
from fxcompress.structure.entries import Entry, entries_of, renumbered

__all__ = ["Removal", "block_of", "find_removal", "remove_blocks"]


@dataclass(frozen=True, eq=False)
class Removal:
    """What taking a block out means.

    Args:
        index: The block's place among the blocks of the program.
        bypass: What takes the place of its values.
        entries: The list entries its parameters are.
    """

    index: int
    bypass: Bypass
    entries: tuple[Entry, ...]


def find_removal(program: Program, blocks: Sequence[Block], index: int) -> Removal | str:
    """How to take a block out, or why it cannot be."""
    bypass = find_bypass(program, blocks, index)
    if isinstance(bypass, str):
        return bypass
    used = {program.weight_of[node.name] for node in program.placeholders() if _is_used_weight(program, node)}
    entries = entries_of(bypass.owned, used - set(bypass.owned))
    return entries if isinstance(entries, str) else Removal(index, bypass, tuple(entries))


def block_of(program: Program, blocks: Sequence[Block], name: str) -> int | None:
    """Index of the block that holds every use of the parameter ``name``; None when there is none such."""
    users = {user for node in program.weight_node(name) for user in node.users}
    return next((block.index for block in blocks if users and users <= set(block.nodes)), None)


def remove_blocks(program: Program, removals: Sequence[Removal]) -> Program:
    """A copy of the program without some blocks; parameters of later list entries are renamed."""
    node_map: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, node_map))
    for old, twin in node_map.items():
        twin.meta = copy.copy(old.meta)
    resolved: dict[fx.Node, fx.Node] = {}
    for removal in sorted(removals, key=lambda removal: removal.index):
        for output, instead in removal.bypass.values.items():
            resolved[output] = resolved.get(instead, node_map[instead])
            node_map[output].replace_all_uses_with(resolved[output])
    gone = [entry for removal in removals for entry in removal.entries]
    _drop_unread(program, graph, node_map, gone)
    graph.lint()
    module = fx.GraphModule(program.graph_module, graph)
    names = {name: new for name in program.weights if (new := renumbered(name, gone)) is not None}
    held = {holder.name: holder for holder in program.placeholders()}
    inputs = [held[name] for name in program.inputs]
    return dataclasses.replace(
        program,
        graph_module=module,
        weight_of={
            node_map[holder].name: names[program.weight_of[holder.name]]
            for holder in program.placeholders()
            if program.weight_of.get(holder.name) in names
        },
        inputs=tuple(node_map[holder].name for holder in inputs),
        weights={kept: program.weights[name] for name, kept in names.items()},
        parameters=frozenset(names[name] for name in program.parameters if name in names),
        aliases={
            further: names[name]
            for alias, name in program.aliases.items()
            if name in names and (further := renumbered(alias, gone)) is not None
        },
    )


def _drop_unread(
    program: Program, graph: fx.Graph, node_map: dict[fx.Node, fx.Node], gone: Sequence[Entry]
) -> None:
    """Erase what only the removed blocks computed, and the placeholders of their parameters."""
    for old in reversed(list(node_map)):
        new = node_map[old]
        if new.users or new.op == "output":
            continue
        name = program.weight_of.get(old.name) if old.op == "placeholder" else None
        if (name is not None and renumbered(name, gone) is None) or old.op not in ("placeholder", "output"):
            graph.erase_node(new)


def _is_used_weight(program: Program, node: fx.Node) -> bool:
    return node.name in program.weight_of and bool(node.users)
