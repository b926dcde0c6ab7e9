"""Checks: that a pass kept the function, what a lossy pass cost each site, what the whole run cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.calibration.inputs import CalibrationData
from fxcompress.calibration.signature import CallSignature
from fxcompress.calibration.walk import BlockRunner, Plan, Walk
from fxcompress.edits import (
    CompressionState,
    Edit,
    FuseSites,
    ReviseWeight,
    SetActivation,
    SetMask,
    SetTransform,
    SetWeight,
)
from fxcompress.errors import CalibrationError, VerificationError, WeightError

__all__ = ["TOLERANCE", "EndToEnd", "SiteAudit", "check_weights", "measure_end_to_end", "prove_unchanged"]

TOLERANCE = 1e-9
"""Largest relative difference, in float64, at which a function counts as unchanged."""


def check_weights(plan: Plan) -> None:
    """Refuse weights with NaN or inf before any long work.

    Raises:
        WeightError: naming the first few of them.
    """
    program = plan.program
    bad = []
    for name in sorted(program.parameters & program.weights.keys()):
        tensor = program.weights[name]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad.append(f"{name} ({int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values)")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise WeightError(
            f"NaN or inf in {', '.join(bad[:3])}{more}.", fix="repair or reload the model's weights."
        )


@torch.no_grad()
def prove_unchanged(
    plan: Plan,
    before: CompressionState,
    after: CompressionState,
    edits: Sequence[Edit],
    data: CalibrationData,
    pass_name: str,
) -> dict[str, float | str | bool]:
    """Run the graph before and after a pass in float64, side by side and block by block.

    Values between blocks may differ (a scale moved from one block to the next); the outputs may not.

    Returns:
        The report entry: the largest relative difference of the outputs and of the values between blocks.

    Raises:
        VerificationError: the outputs differ by more than :data:`TOLERANCE`; names the first such block.
    """
    walks = [Walk(plan, data.flat(), double=True) for _ in range(2)]
    suspect, between = "", 0.0
    for block in plan.blocks:
        fused = [edit for edit in edits if isinstance(edit, FuseSites)]
        _prove_fusions(plan, block.index, walks[1], after, fused, pass_name)
        for walk, state in zip(walks, (before, after), strict=True):
            walk.advance(state)
        error = _boundary_error(walks[0], walks[1])
        between = max(between, error)
        if not error <= TOLERANCE and not suspect:
            suspect = block.name
    worst = 0.0
    for old, new in zip(walks[0].outputs(), walks[1].outputs(), strict=True):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            error = relative_difference(a, b)
            worst = max(worst, error)
            if not error <= TOLERANCE:
                raise VerificationError(
                    f"pass {pass_name!r} promised an unchanged function, but output {index} changed by"
                    f" {error:.2e} relative in float64 (limit {TOLERANCE:.0e});"
                    f" the first difference is in {suspect or 'no block'}.",
                    fix="leave the pass out of the recipe and report it to its author.",
                )
    return {
        "pass": pass_name,
        "check": "unchanged in float64",
        "max_relative_error": worst,
        "between_blocks": between,
        "tolerance": TOLERANCE,
        "passed": True,
    }


def _boundary_error(old: Walk, new: Walk) -> float:
    worst = 0.0
    for a, b in zip(old.values, new.values, strict=True):
        worst = max([worst, *(relative_difference(a[node], b[node]) for node in a)])
    return worst


def _prove_fusions(
    plan: Plan, index: int, walk: Walk, state: CompressionState, fused: Sequence[FuseSites], pass_name: str
) -> None:
    """One product with the stacked weights must give the sites' own products."""
    here = {site.name: site for site in plan.block_sites[index] if site.kind is SiteKind.LINEAR}
    for edit in fused:
        if edit.name not in here:
            continue
        sites = [here[name] for name in edit.names]
        node = sites[0].input
        assert node is not None
        runner = walk.runner(state)
        weights = [site.layout.to_matrix(state.effective(site.name).to(torch.float64))[0] for site in sites]
        for values in walk.collect(runner, [node, *(site.weight_value for site in sites)]):
            x: Tensor = values[node]  # [..., K]
            together = x @ torch.cat(weights).T
            parts = together.split([weight.shape[0] for weight in weights], dim=-1)
            for site, weight, part in zip(sites, weights, parts, strict=True):
                if not relative_difference(x @ weight.T, part) <= TOLERANCE:
                    raise VerificationError(
                        f"pass {pass_name!r}: {site.name} cannot be fused with {edit.name}."
                    )


def relative_difference(a: Any, b: Any) -> float:
    """``max|a - b| / max|a|``; infinite when the structures differ; equal inf and NaN patterns are equal."""
    if isinstance(a, tuple | list):
        if not isinstance(b, tuple | list) or len(a) != len(b):
            return float("inf")
        return max((relative_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if not isinstance(a, Tensor):
        return 0.0 if a == b else float("inf")
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(((~torch.isfinite(a)) & ~same).any()) or bool(((~torch.isfinite(b)) & ~same).any()):
        return float("inf")
    zero = torch.zeros((), dtype=a.dtype, device=a.device)
    gap = torch.where(same, zero, a - b).abs().max()
    size = torch.where(torch.isfinite(a), a, zero).abs().max()
    return float(gap / size) if float(size) > 0 else float("inf")


class SiteAudit:
    """Measures what a lossy pass costs each site it touched: ``‖y − ŷ‖ / ‖y‖`` of the site's own output.

    Both sides get the same inputs, those of the compressed model, so an error is the site's alone.

    Args:
        plan: The program's plan.
        data: A small sample.
    """

    def __init__(self, plan: Plan, data: CalibrationData) -> None:
        self.plan = plan
        self._walk = Walk(plan, data.flat())

    def block(
        self, before: CompressionState, after: CompressionState, edits: Sequence[Edit]
    ) -> dict[str, float]:
        """Errors by parameter for the block the audit stands at, then one step on."""
        index = self._walk.position
        lossy = SetWeight | ReviseWeight | SetMask | SetActivation | SetTransform
        touched = {edit.name for edit in edits if isinstance(edit, lossy)}
        sites = [site for site in self.plan.block_sites[index] if site.name in touched]
        errors: dict[str, float] = {}
        if sites:
            runner = self._walk.runner(after)
            revised = {edit.name for edit in edits if isinstance(edit, ReviseWeight)}
            old = BlockRunner(self.plan, index, _densely(before, revised))
            sums: dict[Site, list[float]] = {site: [0.0, 0.0] for site in sites}
            for values in self._walk.collect(runner, runner.inputs_needed(sites)):
                for site, total in sums.items():
                    for slot, amount in enumerate(_squares(old, runner, site, values)):
                        total[slot] += amount
            for site, (gap, size) in sums.items():
                error = (gap / size) ** 0.5 if size > 0 else (0.0 if gap == 0 else float("inf"))
                errors[site.name] = max(error, errors.get(site.name, 0.0))
        self._walk.advance(after)
        return errors


def _densely(state: CompressionState, names: set[str]) -> CompressionState:
    """The state with the dense values of ``names`` in place of the terms that a pass revised."""
    dense = state.copy()
    for name in names:
        dense.tensors[name] = state.dense_target(name)
        dense.forms[name] = dataclasses.replace(state.form(name), terms=())
    return dense


def _squares(old: BlockRunner, new: BlockRunner, site: Site, values: dict[Any, Any]) -> tuple[float, float]:
    """``(Σ(y − ŷ)², Σy²)`` of one site on one batch, in float64."""
    y, z = old.evaluate_site(site, values), new.evaluate_site(site, values)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        return 0.0, 0.0
    wide = y.to(torch.float64)
    return float((z.to(torch.float64) - wide).square().sum()), float(wide.square().sum())


@dataclass(frozen=True)
class EndToEnd:
    """The compressed model against the original on a few sequences.

    Args:
        relative_error: ``‖y − ŷ‖ / ‖y‖`` of the main output.
        kl: Mean Kullback-Leibler divergence per token, in nats, original to compressed; None unless the main
            output are scores over the vocabulary.
        tokens: Tokens it was measured on.
    """

    relative_error: float
    kl: float | None
    tokens: int


@torch.no_grad()
def measure_end_to_end(
    plan: Plan, state: CompressionState, data: CalibrationData, original: Plan | None = None
) -> EndToEnd:
    """Run original and compressed model, one block at a time.

    Args:
        plan: Of the compressed program.
        state: Its edits.
        data: A few batches.
        original: Of the original program. Default: ``plan``.

    Raises:
        CalibrationError: the original model itself gives NaN or inf, or no floating-point output.
        VerificationError: the compressed model gives NaN or inf where the original does not.
    """
    original = original or plan
    walks = []
    for one, used in ((original, CompressionState(original.program.weights)), (plan, state)):
        walks.append(Walk(one, data.flat()))
        for _ in one.blocks:
            walks[-1].advance(used)
    vocabulary = {found.rows for found in CallSignature(plan.program).vocabularies.values()}
    gap = size = divergence = 0.0
    scored = 0
    for old, new in zip(walks[0].outputs(), walks[1].outputs(), strict=True):
        y, z = _main_output(old, vocabulary), _main_output(new, vocabulary)
        _check_finite(y, z)
        gap += float((z - y).square().sum())
        size += float(y.square().sum())
        if y.shape[-1] in vocabulary:
            p, q = torch.log_softmax(y, -1), torch.log_softmax(z, -1)
            divergence += float((p.exp() * (p - q)).sum())
            scored += y[..., 0].numel()
    error = (gap / size) ** 0.5 if size > 0 else (0.0 if gap == 0 else float("inf"))
    return EndToEnd(error, max(divergence / scored, 0.0) if scored else None, data.tokens)


def _main_output(outputs: Sequence[Any], vocabulary: set[int]) -> Tensor:
    """The scores over the vocabulary if there are any, else the first floating-point output; in float64."""
    floating = [out for out in outputs if isinstance(out, Tensor) and out.is_floating_point()]
    if not floating:
        raise CalibrationError(
            "end-to-end check: the model has no floating-point output.", fix='use verify="off".'
        )
    scores = [out for out in floating if out.dim() >= 2 and out.shape[-1] in vocabulary]
    return (scores or floating)[0].to(torch.float64)


def _check_finite(original: Tensor, compressed: Tensor) -> None:
    if not bool(torch.isfinite(original).all()):
        raise CalibrationError(
            "end-to-end check: the uncompressed model gives NaN or inf on these inputs.",
            fix="check the inputs and the model's dtype.",
        )
    if not bool(torch.isfinite(compressed).all()):
        raise VerificationError(
            "end-to-end check: the compressed model gives NaN or inf where the original does not.",
            fix="see the per-site errors, and exclude the sites that fail.",
        )
