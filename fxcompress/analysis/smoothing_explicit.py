"""Groups for what no fold reaches: linear sites whose shared input is divided by an operation of its own.

    z = W·x   →   W·diag(s) · (x/s)

AWQ calls it a scaled activation. It is legal for every linear site, whatever made its input; the price is one
product per token, once for all sites that read the same value.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import fx

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.analysis.smoothing_group import Consumer, GroupKind, SmoothingGroup
from fxcompress.capture.program import Program


def explicit_groups(
    program: Program, sites: Sequence[Site], left: AbstractSet[Site]
) -> tuple[tuple[SmoothingGroup, ...], dict[Site, str]]:
    """Group the sites in ``left`` by the value they read.

    Args:
        program: The program.
        sites: All weight sites of the program, by which other uses of a weight are known.
        left: Sites that no fold covers.

    Returns:
        The groups in graph order, and for every site in ``left`` that is in none the reason.
    """
    uses: dict[str, int] = {}
    for site in sites:
        uses[site.name] = uses.get(site.name, 0) + 1
    families: dict[fx.Node, list[Site]] = {}
    refused: dict[Site, str] = {}
    for site in sites:
        if site not in left:
            continue
        readers = sum(len(node.users) for node in (site.weight, *site.chain)) - len(site.chain)
        bindings = sum(1 for holder in program.weight_node(site.name) if holder.users)
        if site.kind is not SiteKind.LINEAR or site.input is None:
            refused[site] = f"the input of a {site.kind.value} site cannot be given a scale of its own"
        elif uses[site.name] > 1 or readers > 1 or bindings > 1:
            refused[site] = f"{site.name} is used at several places, which would all need the scale"
        else:
            families.setdefault(site.input, []).append(site)
    groups = []
    for value, family in families.items():
        width = family[0].layout.matrix_shape[2]
        columns = torch.arange(width).unsqueeze(0)  # [1, K]
        consumers = tuple(Consumer(site, columns) for site in family)
        groups.append(SmoothingGroup(GroupKind.EXPLICIT, value, width, (), consumers))
    return tuple(groups), refused
