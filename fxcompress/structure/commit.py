"""Commit: from masked units and skipped blocks to a smaller program and a state over its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.analysis.blocks import label_blocks
from fxcompress.analysis.channel_group import ChannelGroup, GroupMember
from fxcompress.analysis.channel_groups import ChannelGroups, find_channel_groups
from fxcompress.analysis.site_types import Site
from fxcompress.calibration.inputs import CalibrationData
from fxcompress.calibration.plan import Plan
from fxcompress.calibration.walk import Walk
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState, KeepUnits, RemoveBlock
from fxcompress.errors import RecipeError, VerificationError
from fxcompress.forms import SiteForm
from fxcompress.structure.cut_program import cut_program
from fxcompress.structure.entries import Entry, renumbered
from fxcompress.structure.record import Change
from fxcompress.structure.removal import block_of, find_removal, remove_blocks
from fxcompress.structure.sizes import GroupSizes, sizes_of
from fxcompress.verify import TOLERANCE, relative_difference

__all__ = ["Committed", "check_forms", "check_structural", "commit", "mask", "prove_cut"]


@dataclass(frozen=True, eq=False)
class Committed:
    """The model after a cut.

    Args:
        program: With smaller tensors and fewer blocks.
        state: Over its weights; what passes did so far is remembered.
        change: What was cut.
        cuts: The sizes of every group that was cut, by its name now.
        buffers: Cut buffer → dimension → ``[n]`` positions kept.
    """

    program: Program
    state: CompressionState
    change: Change
    cuts: Mapping[str, GroupSizes]
    buffers: Mapping[str, Mapping[int, Tensor]]


def check_structural(
    edit: KeepUnits | RemoveBlock, plan: Plan, state: CompressionState, groups: Mapping[str, ChannelGroup]
) -> None:
    """Refuse a structural edit that cannot be carried out.

    Raises:
        RecipeError: no such group or block, a frozen one, units that it does not have, or everything cut.
    """
    if isinstance(edit, RemoveBlock):
        index = block_of(plan.program, plan.blocks, edit.name)
        reason = "it is used by no block alone" if index is None else ""
        if index is not None and isinstance(found := find_removal(plan.program, plan.blocks, index), str):
            reason = found
        if reason:
            raise RecipeError(f"{edit.name}: its block cannot be removed: {reason}.")
        taken = {block_of(plan.program, plan.blocks, name) for name in state.removed}
        if index in taken:
            raise RecipeError(f"{edit.name}: its block is removed already.")
        return
    group = groups.get(edit.group)
    if group is None:
        raise RecipeError(f"{edit.group}: the model has no such channel group.")
    if group.frozen:
        raise RecipeError(f"{edit.group}: cannot be cut: {group.frozen}.")
    if edit.group in state.kept:
        raise RecipeError(f"{edit.group}: is cut already.", fix="yield one KeepUnits per group and pass.")
    kept = edit.kept
    if kept.dtype != torch.int64 or kept.dim() != 1:
        raise RecipeError(f"{edit.group}: kept is {kept.dtype} {tuple(kept.shape)}, expected [n] int64.")
    if kept.numel() == 0:
        raise RecipeError(f"{edit.group}: all {group.units} units would be cut.", fix="keep at least one.")
    if kept.numel() < group.least:
        raise RecipeError(
            f"{edit.group}: {kept.numel()} of {group.units} {group.kind} would stay, but its router chooses"
            f" {group.least} at once.",
            fix=f"keep at least {group.least}.",
        )
    ascending = bool((kept[1:] > kept[:-1]).all())
    if not ascending or int(kept[0]) < 0 or int(kept[-1]) >= group.units:
        raise RecipeError(f"{edit.group}: kept must be ascending units of 0…{group.units - 1}.")


def mask(state: CompressionState, group: ChannelGroup, kept: Tensor) -> None:
    """Zero the units of ``group`` that are not ``kept``, and let them lose where they compete."""
    cut = torch.ones(group.units, dtype=torch.bool)
    cut[kept] = False
    for route in group.routes:
        state.closed[route.node] = (route, cut.nonzero().flatten())
    for member in group.members:
        value = state.weight(member.name).clone()
        gone = _gone(member, group.units, kept)
        state.tensors[member.name] = value.index_fill_(member.dim, gone.to(value.device), 0)


def _gone(member: GroupMember, units: int, kept: Tensor) -> Tensor:
    """Positions of the units that are not kept."""
    cut = torch.ones(units, dtype=torch.bool)
    cut[kept] = False
    return member.positions[cut].flatten()


def check_forms(state: CompressionState, pass_name: str) -> None:
    """Refuse to change the structure under forms that hold more than a bias.

    Raises:
        RecipeError: names the first parameter and the pass that gave it such a form.
    """
    for name, form in state.forms.items():
        if not dataclasses.replace(form, bias=None).same_as(SiteForm()) or state.fused:
            done_by = ", ".join(entry.pass_name for entry in state.provenance.get(name, []))
            raise RecipeError(
                f"{pass_name!r} changes the model's structure, but {name} already has a form by {done_by}.",
                fix=f"put {pass_name!r} before it.",
            )


def commit(plan: Plan, state: CompressionState, groups: ChannelGroups) -> Committed:
    """Cut what the state masks, remove the blocks it steps over.

    Args:
        plan: Of the program the state is over.
        state: With structural edits.
        groups: The program's channel groups.
    """
    program = dataclasses.replace(plan.program, weights={**plan.program.weights, **state.tensors})
    blocks = [block_of(program, plan.blocks, name) for name in state.removed]
    removals = []
    for index in blocks:
        assert index is not None
        found = find_removal(program, plan.blocks, index)
        assert not isinstance(found, str)  # check_structural
        removals.append(found)
    removed = tuple(sorted({entry for removal in removals for entry in removal.entries}))
    cut = [(group, state.kept[group.name]) for group in groups if group.name in state.kept]
    if removals:
        program = remove_blocks(program, removals)
        groups = find_channel_groups(program)
        cut = _found_again(cut, groups, removed)
    by_name = {group.name: group for group in groups}
    kept = {group.name: units for group, units in cut}
    uncut = program
    if kept:
        program = cut_program(program, groups, kept)
    label_blocks(program.graph, plan.blocks)
    after = CompressionState(program.weights)
    for name, form in state.forms.items():
        new = renumbered(name, removed)
        if new is not None:
            after.forms[new] = _cut_form(plan.uses(name)[0], form, new, cut)
    for name, entries in state.provenance.items():
        new = renumbered(name, removed)
        if new is not None and new in after.weights:
            after.provenance[new] = list(entries)
    change = Change({name: tuple(units.tolist()) for name, units in kept.items()}, removed)
    sizes = {name: sizes_of(by_name[name], units.numel()) for name, units in kept.items()}
    return Committed(program, after, change, sizes, _cut_buffers(uncut, program, cut))


def _found_again(
    cut: Sequence[tuple[ChannelGroup, Tensor]], groups: ChannelGroups, removed: Sequence[Entry]
) -> list[tuple[ChannelGroup, Tensor]]:
    """The groups to cut as they are without the removed entries; groups that went with them are left out."""
    place = {_where(member, member.name): group for group in groups for member in group.members}
    again: dict[str, tuple[ChannelGroup, Tensor]] = {}
    for group, units in cut:
        keys = [_where(member, renumbered(member.name, removed)) for member in group.members]
        found = next((place[key] for key in keys if key in place), None)
        if found is not None:
            again[found.name] = (found, units)
    return list(again.values())


def _where(member: GroupMember, name: str | None) -> tuple[str | None, int, int, int]:
    """What tells a member from all others, by the name its tensor has now."""
    return (name, member.dim, member.positions.shape[0], int(member.positions[0, 0]))


def _cut_buffers(
    old: Program, new: Program, cut: Sequence[tuple[ChannelGroup, Tensor]]
) -> dict[str, dict[int, Tensor]]:
    """Positions kept of every buffer that was cut."""
    stays: dict[str, dict[int, Tensor]] = {}
    for group, units in cut:
        for member in group.members:
            if member.name not in new.parameters:
                whole = torch.ones(old.weights[member.name].shape[member.dim], dtype=torch.bool)
                mask = stays.setdefault(member.name, {}).setdefault(member.dim, whole)
                mask[_gone(member, group.units, units)] = False
    return {
        name: {dim: mask.nonzero().flatten() for dim, mask in masks.items()} for name, masks in stays.items()
    }


def _cut_form(site: Site, form: SiteForm, name: str, cuts: Sequence[tuple[ChannelGroup, Tensor]]) -> SiteForm:
    """A form whose bias has lost the rows that its weight loses."""
    bias = form.bias
    if bias is None:
        return form
    stays = torch.ones(bias.numel(), dtype=torch.bool)
    for group, units in cuts:
        for member in group.members:
            if (member.name, member.dim) == (name, site.layout.perm[0]):
                stays[_gone(member, group.units, units)] = False
    return dataclasses.replace(form, bias=bias[stays])


@torch.no_grad()
def prove_cut(
    plan: Plan, masked: CompressionState, new: Plan, state: CompressionState, data: CalibrationData, name: str
) -> dict[str, float | str | bool]:
    """Run the masked model and the cut one in float64; their outputs must be the same.

    Returns:
        The report entry.

    Raises:
        VerificationError: the outputs differ by more than :data:`fxcompress.verify.TOLERANCE`.
    """
    outputs = []
    for one, used in ((plan, masked), (new, state)):
        walk = Walk(one, data.flat(), double=True)
        for _ in one.blocks:
            walk.advance(used)
        outputs.append(walk.outputs())
    worst = 0.0
    for old, cut in zip(*outputs, strict=True):
        for index, (a, b) in enumerate(zip(old, cut, strict=True)):
            error = relative_difference(a, b)
            worst = max(worst, error)
            if not error <= TOLERANCE:
                raise VerificationError(
                    f"pass {name!r}: cutting differs from masking: output {index} by {error:.2e} relative in"
                    f" float64 (limit {TOLERANCE:.0e}).",
                    fix="report it: a channel group of this model was found wrongly.",
                )
    return {
        "pass": name,
        "check": "cut equals masked in float64",
        "max_relative_error": worst,
        "tolerance": TOLERANCE,
        "passed": True,
    }
