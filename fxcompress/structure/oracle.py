"""The oracle of channel groups: a cut program must compute what the whole one computes with its units masked.

    errors = check_groups(program, groups, program.flatten_inputs((), inputs))

Masking sets the units' slices to zero in every member, and their scores to minus infinity where they
compete; cutting removes them and rewrites the graph. Both run in float64, so that agreement means equality up
to the order of additions. A group that passes for random units is what the analysis claims it is; the
analysis itself is tested against this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.analysis.channel_group import ChannelGroup
from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.capture.precision import double_program, widen
from fxcompress.capture.program import Program
from fxcompress.errors import VerificationError
from fxcompress.structure.cut_program import cut_program
from fxcompress.structure.mask_program import mask_program

__all__ = ["TOLERANCE", "check_group", "check_groups", "check_kept"]

TOLERANCE = 1e-9
"""Largest relative difference, in float64, at which cutting counts as equal to masking."""


def check_group(
    program: Program, groups: ChannelGroups, group: ChannelGroup, units: Tensor, inputs: Sequence[Any]
) -> float:
    """Remove ``units`` of one group and compare with masking them.

    Args:
        program: The program the groups were found in.
        groups: All of its groups.
        group: The one to check.
        units: int64, the units that go; at least one, and not all.
        inputs: Flat inputs of one call, as :meth:`Program.flatten_inputs` returns them.

    Returns:
        The largest relative difference of any output: ``max|cut - masked| / max|masked|``.

    Raises:
        VerificationError: it is above :data:`TOLERANCE`, or an output has another shape.
    """
    stays = torch.ones(group.units, dtype=torch.bool)
    stays[units] = False
    return check_kept(program, groups, {group.name: stays.nonzero().flatten()}, inputs)


def check_groups(
    program: Program,
    groups: ChannelGroups,
    inputs: Sequence[Any],
    *,
    share: float = 0.4,
    seed: int = 0,
    together: bool = True,
) -> dict[str, float]:
    """Check every group of more than one unit with random units, and all groups cut at once.

    Args:
        program: The program the groups were found in.
        groups: All of its groups.
        inputs: Flat inputs of one call.
        share: About the part of the units that goes; at least one goes and one stays.
        seed: Of the choice.
        together: Whether to add the check of all groups at once, under the name ``"all groups"``.

    Returns:
        Largest relative difference by group name.

    Raises:
        VerificationError: a group fails; names it.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, Tensor] = {}
    for group in groups:
        if group.units > 1:
            count = min(max(1, round(share * group.units)), group.units - group.least)
            order = torch.randperm(group.units, generator=generator)
            chosen[group.name] = order[count:].sort().values
    errors = {name: check_kept(program, groups, {name: kept}, inputs) for name, kept in chosen.items()}
    if together and chosen:
        errors["all groups"] = check_kept(program, groups, chosen, inputs)
    return errors


@torch.no_grad()
def check_kept(
    program: Program, groups: ChannelGroups, kept: Mapping[str, Tensor], inputs: Sequence[Any]
) -> float:
    """Compare cutting with masking for given kept units; see :func:`check_group`."""
    wide = pytree.tree_map_only(Tensor, widen, list(inputs))
    masked = double_program(mask_program(program, groups, kept)).run_flat(wide)
    cut = double_program(cut_program(program, groups, kept)).run_flat(wide)
    where = ", ".join(list(kept)[:3]) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
    worst = 0.0
    pairs = zip(pytree.tree_leaves(cut), pytree.tree_leaves(masked), strict=True)
    for index, (one, two) in enumerate(pairs):
        error = _difference(one, two)
        worst = max(worst, error)
        if not error <= TOLERANCE:
            raise VerificationError(
                f"cutting units of {where} changes output {index} by {error:.2e} relative to masking them"
                f" (limit {TOLERANCE:.0e}).",
                fix="leave the group whole and report the model's op to the project.",
            )
    return worst


def _difference(one: Any, two: Any) -> float:
    from fxcompress.verify import relative_difference

    return relative_difference(two, one)
