"""Whether an edit fits the graph: it is for a site, edge or group that exists, and holds finite numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.analysis.site_types import SiteKind
from fxcompress.calibration.plan import Plan
from fxcompress.edit_types import (
    Edit,
    FuseSites,
    KeepUnits,
    RemoveBlock,
    Repack,
    ReviseWeight,
    SetActivation,
    SetEdge,
    SetTransform,
    SetWeight,
    floats_of,
    names_of,
)
from fxcompress.edits import CompressionState
from fxcompress.errors import RecipeError, WeightError
from fxcompress.structure.commit import check_structural

__all__ = ["check_edit"]


def check_edit(edit: Edit, plan: Plan, state: CompressionState, groups: Mapping[str, ChannelGroup]) -> None:
    """What :meth:`CompressionState.apply` cannot know: sites, and numbers inside forms.

    Args:
        edit: Not applied yet.
        plan: Of the program that the state is over.
        state: As it is before the edit.
        groups: The program's channel groups, for a structural edit.

    Raises:
        RecipeError: the edit is for something the graph does not have, or for nothing.
        WeightError: NaN or inf in a form.
    """
    if isinstance(edit, KeepUnits | RemoveBlock):
        check_structural(edit, plan, state, groups)
    elif isinstance(edit, FuseSites):
        sites = [[site for site in plan.uses(name) if site.input is not None] for name in edit.names]
        shared = set.intersection(*({site.input for site in uses} for uses in sites)) if sites else set()
        if len(edit.names) < 2 or not shared:
            raise RecipeError(
                f"{edit.name}: fused with {list(edit.names[1:])}, which do not share its input."
            )
    elif isinstance(edit, SetActivation | SetTransform):
        uses = plan.uses(edit.name)
        looked_up = isinstance(edit, SetTransform) and not edit.transform_out and edit.bias is None
        if not any(site.takes_activation or (looked_up and site.kind is SiteKind.EMBEDDING) for site in uses):
            raise RecipeError(
                f"{edit.name}: {type(edit).__name__} on a weight that multiplies no activation."
            )
    elif isinstance(edit, SetEdge):
        if not any(e.signature == edit.edge.signature and not e.reason for e in plan.edges):
            raise RecipeError(f"{edit.name}: SetEdge on an edge that the graph does not have.")
    elif isinstance(edit, SetWeight | ReviseWeight | Repack) and not edit.terms:
        raise RecipeError(
            f"{edit.name}: {type(edit).__name__} without terms.",
            fix="yield Refuse to leave a weight alone.",
        )
    for key, tensor in floats_of(edit):
        if not bool(torch.isfinite(tensor).all()):
            raise WeightError(f"{names_of(edit)[0]}: NaN or inf in {key} of its new form.")
