"""The account of a run: one row for every parameter of the model, and what its structure lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fxcompress.analysis.site_types import Site
from fxcompress.calibration.plan import Plan
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState
from fxcompress.errors import CoverageError
from fxcompress.report import WeightRow, describe_form
from fxcompress.structure.cost import cost_of
from fxcompress.structure.record import Change, follow

__all__ = ["account_for", "account_for_structure"]


def account_for(
    program: Program,
    state: CompressionState,
    sites: Sequence[Site],
    errors: Mapping[str, float],
    *,
    compresses: bool,
    zeros: Mapping[str, int] | None = None,
    original: Program | None = None,
    original_sites: Sequence[Site] | None = None,
    changes: Sequence[Change] = (),
) -> tuple[WeightRow, ...]:
    """One row for every parameter of the original model.

    Args:
        program: The program, cut if the run cut it.
        state: The finished state.
        sites: All weight sites.
        errors: Measured error by parameter.
        compresses: Whether some pass of the recipe compresses weights, so that each weight needs a reason.
        zeros: Exact zeros of pruned parameters.
        original: The program before any cut. Default: ``program``.
        original_sites: Its weight sites. Default: ``sites``.
        changes: What was cut in between.

    Raises:
        CoverageError: weights that no pass changed and none gave a reason for.
    """
    original = original or program
    used = {site.name for site in sites}
    multiplied = {site.name for site in sites if site.takes_activation}
    first = sites if original_sites is None else original_sites
    multiplied_before = {site.name for site in first if site.takes_activation}
    rows, unaccounted = [], []
    for first_name, before in original.weights.items():
        if first_name not in original.parameters:
            continue
        name = follow(first_name, changes)
        products_before = before.numel() if first_name in multiplied_before else 0
        if name is None or name not in program.weights:
            rows.append(_removed_row(first_name, before, products_before))
            continue
        tensor = program.weights[name]
        size = tensor.numel() * tensor.element_size()
        form = state.form(name)
        history = state.provenance.get(name, [])
        changed = tuple(dict.fromkeys(entry.pass_name for entry in history if entry.action != "Refuse"))
        refusals = [entry for entry in history if entry.action == "Refuse"]
        reported = errors.get(name, max((e.error for e in history if e.error is not None), default=None))
        after = form.nbytes + (0 if form.terms else size)
        products = sum(term.multiplications for term in form.terms) if form.terms else tensor.numel()
        text = describe_form(form)
        reason = ""
        if not form.terms:
            reason = _reason(
                tensor.dim(), tensor.is_floating_point(), name in used, refusals, changed, compresses
            )
            if not reason:
                unaccounted.append(name)
        mask = state.masks.get(name)
        if mask is not None and not form.terms:
            text = " + ".join(filter(None, (f"{mask.describe()}, stored dense", text)))
        elif not text:
            edited = name in state.tensors or any(entry.action == "SetTensor" for entry in history)
            text = "edited" if edited else "kept"
        rows.append(
            WeightRow(
                name=first_name,
                shape=tuple(before.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                bytes_before=before.numel() * before.element_size(),
                bytes_after=after,
                form=text,
                passes=changed,
                error=reported,
                reason=reason,
                zeros=(zeros or {}).get(name),
                cut=tuple(tensor.shape) if tensor.shape != before.shape else (),
                products_before=products_before,
                products_after=products if name in multiplied else 0,
            )
        )
    if unaccounted:
        raise CoverageError(
            f"{len(unaccounted)} weights were neither compressed nor refused, the first is {unaccounted[0]}.",
            fix="let a pass of the recipe yield Refuse(name, reason) for what it leaves.",
        )
    return tuple(rows)


def account_for_structure(first: Plan, last: Plan, changes: Sequence[Change]) -> dict[str, Any]:
    """What the cuts took: costs before and after, units kept per group, list entries removed."""
    return {
        "before": cost_of(first.program, first.blocks).to_dict(),
        "after": cost_of(last.program, last.blocks).to_dict(),
        "rounds": [
            {
                "kept": {name: len(units) for name, units in change.kept.items()},
                "removed": [entry.prefix.rstrip(".") for entry in change.removed],
            }
            for change in changes
        ],
    }


def _removed_row(name: str, tensor: Tensor, products: int) -> WeightRow:
    return WeightRow(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        bytes_before=tensor.numel() * tensor.element_size(),
        bytes_after=0,
        form="removed",
        reason="its block was removed",
        products_before=products,
    )


def _reason(
    dims: int, floating: bool, used: bool, refusals: Sequence[Any], changed: Sequence[str], compresses: bool
) -> str:
    """Why a parameter has no weight terms; empty when nobody said."""
    if refusals:
        return "; ".join(dict.fromkeys(f"{entry.pass_name}: {entry.reason}" for entry in refusals))
    if dims < 2:
        return "vector"
    if not floating:
        return "not floating point"
    if not used:
        return "not used by the captured graph"
    if not compresses:
        return (
            f"only changed by {', '.join(changed)}" if changed else "no pass of the recipe compresses weights"
        )
    return ""
