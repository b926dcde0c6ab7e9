"""Whether a shift per channel can move from a norm's bias into the biases of the matrices that read it.

    y = x̂·γ + β,  z = W·y + b   →   y' = x̂·γ + (β − z₀),  z = W·y' + (b + W·z₀)

Fewer ops commute with a shift than with a scale: only those that move elements. ReLU, the gate of a gated
unit and padding do not; attention does only for queries that see a key, which a mask may deny.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxcompress.analysis.op_arguments import aten_names, describe, op_name
from fxcompress.analysis.parameter_views import parameter_view
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.analysis.smoothing_group import GroupKind, ScaledParameter, SmoothingGroup
from fxcompress.capture.program import Program

_MOVES = aten_names(
    """
    to _to_copy type_as clone contiguous detach alias view reshape _unsafe_view view_as reshape_as flatten
    unflatten squeeze unsqueeze transpose t mT permute movedim expand expand_as slice narrow select split
    split_with_sizes chunk unbind index index_select
    """
)
_SHAPE_ONLY = aten_names("sym_size sym_stride sym_numel")


def shift_bias(
    program: Program, sites: Sequence[Site], group: SmoothingGroup
) -> tuple[ScaledParameter | None, str]:
    """The bias that can absorb a shift of the group, or None and the reason.

    Args:
        program: The program.
        sites: All its weight sites.
        group: A group of :func:`fxcompress.analysis.smoothing.find_smoothing_groups`.
    """
    reason = added_bias_refusal(sites, group)
    if reason:
        return None, reason
    if group.kind is not GroupKind.NORM:
        return None, "only the bias of a norm is shifted"
    biases = [parameter for parameter in group.producers if parameter.role == "bias"]
    if len(biases) != 1:
        return None, f"{group.name}: the norm has no bias that could be shifted"
    bias = biases[0]
    held = bias.channels[bias.channels >= 0]
    if bias.multiplier != 1 or bias.offset != 0 or held.numel() != group.channels:
        return None, f"{bias.name} does not hold one value per channel"
    reason = _path_refusal(program, group, bias)
    return (None, reason) if reason else (bias, "")


def added_bias_refusal(sites: Sequence[Site], group: SmoothingGroup) -> str:
    """Why a reader of the group cannot be given another bias; empty when all can."""
    for site in group.sites:
        if site.kind is not SiteKind.LINEAR:
            return f"{site.name}: a {site.kind.value} site cannot be given a bias per matrix"
        if sum(1 for other in sites if other.name == site.name) > 1:
            return f"{site.name} is used at several places, which would share the new bias"
    return ""


def _path_refusal(program: Program, group: SmoothingGroup, bias: ScaledParameter) -> str:
    """Walk from the norm to its readers; empty when nothing but moves lies between."""
    readers = {site.node for site in group.sites}

    def adds(node: fx.Node) -> bool:
        views = (parameter_view(program, source) for source in node.all_input_nodes)
        return any(view is not None and view.name == bias.name for view in views)

    queue = [(user, adds(group.source)) for user in group.source.users]
    seen = {node for node, _ in queue}
    for node, shifted in queue:
        if node in readers:
            if not shifted:
                return f"{describe(node)} reads the value before {bias.name} is added"
            continue
        if op_name(node) in _SHAPE_ONLY:
            continue
        own = op_name(node) == "aten::add" and adds(node)
        if not own and op_name(node) not in _MOVES and "getitem" not in str(node.target):
            return f"{describe(node)} does not commute with a shift per channel"
        new = [user for user in node.users if user not in seen]
        seen.update(new)
        queue += [(user, shifted or own) for user in new]
    return ""
