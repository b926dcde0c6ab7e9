"""Models of every kind as training graphs, and trained graphs as compressed models again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.accounting import account_for
from fxcompress.artifact import Artifact, build_artifact
from fxcompress.calibration.plan import Plan
from fxcompress.capture import capture_model
from fxcompress.edits import CompressionState, Edit
from fxcompress.errors import TrainingError
from fxcompress.examples import call_arguments, default_example
from fxcompress.forms import SparsityMask
from fxcompress.ghost import ghost_copy
from fxcompress.hf import identity_of
from fxcompress.model import CompressedModel, remove_with, temporary_artifact
from fxcompress.report import Report, WeightRow, describe_form
from fxcompress.structure.record import follow
from fxcompress.training.result import TrainingResult

__all__ = ["Captured", "capture", "longest_sequence"]

_PRUNED = (
    0.1  # share of exact zeros from which a dense matrix counts as pruned; other weights have hardly any
)


@dataclass(frozen=True, eq=False)
class Captured:
    """A model as captured and compressed.

    Args:
        model: What the caller gave.
        module: Its module; parameters that are compressed have no values in it.
        plan: Of its graph.
        state: Its edits.
    """

    model: Any
    module: nn.Module
    plan: Plan
    state: CompressionState

    def finish(self, edits: Sequence[Edit], result: TrainingResult, tokenizer: Any) -> CompressedModel:
        """The model with what was trained, as a new compressed model."""
        state = self.state.copy()
        for edit in edits:
            state.apply(edit, "distill")
        if isinstance(self.model, CompressedModel):
            artifact = _revised(self.model.artifact, state, result)
            tokenizer = tokenizer if tokenizer is not None else self.model.tokenizer
        else:
            artifact = build_artifact(
                recipe={"name": None, "passes": []},
                state=state,
                report=_first_report(self.plan, state, result),
                module=self.module,
                identity=identity_of(self.module),
                aliases=self.plan.program.aliases,
            )
        stored, folder = temporary_artifact(artifact, tokenizer)
        small = CompressedModel(self.module, stored, tokenizer=tokenizer)
        remove_with(small, folder)
        return small


def capture(model: Any, example_inputs: Any | None, *, masks: bool) -> Captured:
    """Capture a module or a compressed model.

    Args:
        model: A module, or a :class:`CompressedModel`.
        example_inputs: One call; default made from the model's configuration.
        masks: Whether zeros of pruned dense matrices become masks, so that they stay.

    Raises:
        TrainingError: it is neither.
        CaptureError: it cannot be captured.
    """
    if isinstance(model, CompressedModel):
        module = ghost_copy(model.model, {}, set(), None)
        forms = dict(model.artifact.forms)
        fused = [tuple(names) for names in model.artifact.fused]
    elif isinstance(model, nn.Module):
        module, forms, fused = model, {}, []
    else:
        raise TrainingError(
            f"found a {type(model).__name__}, expected a module or a compressed model.",
            fix="load it, e.g. with fxcompress.load.",
        )
    example = default_example(module) if example_inputs is None else example_inputs
    args, kwargs = call_arguments(module, example)
    with torch.no_grad():
        plan = Plan(capture_model(module, args, kwargs))
    state = CompressionState(plan.program.weights)
    state.forms, state.fused = forms, fused
    if masks:
        state.masks = _masks(plan, state)
    return Captured(model, module, plan, state)


def longest_sequence(module: nn.Module) -> int | None:
    """Tokens that a model says it can take; None when it says nothing."""
    config: Any = getattr(module, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _masks(plan: Plan, state: CompressionState) -> dict[str, SparsityMask]:
    """Masks of dense matrices with many exact zeros: an artifact stores the zeros and not the mask."""
    found: dict[str, SparsityMask] = {}
    for site in plan.sites:
        if site.name in found or state.is_compressed(site.name):
            continue
        value = state.weight(site.name).detach()
        keep = value != 0
        if value.is_floating_point() and float((~keep).float().mean()) >= _PRUNED:
            layout = site.layout
            found[site.name] = SparsityMask(keep, layout.perm, layout.batch_dims, layout.row_dims)
    return found


def _revised(artifact: Artifact, state: CompressionState, result: TrainingResult) -> Artifact:
    """The artifact with trained forms and tensors."""
    parameters = dict(artifact.parameters)
    for name in state.tensors:
        parameters[name] = dataclasses.replace(parameters[name], edited=True)
    tensors: dict[str, Tensor] = {
        name: state.tensors.get(name, artifact.tensors[name]) for name in artifact.tensors
    }
    changes = [] if artifact.structure is None else list(artifact.structure.changes)
    report = Report.from_dict(artifact.report)
    report.passes.append(_pass_entry(state))
    report.checks.append(_check_entry(result))
    report.rows = tuple(_row(row, state, follow(row.name, changes)) for row in report.rows)
    report.kl = report.relative_error = None  # were those before training
    return dataclasses.replace(
        artifact,
        forms=dict(state.forms),
        tensors=tensors,
        parameters=parameters,
        report=report.to_dict(),
        directory=None,
    )


def _row(row: WeightRow, state: CompressionState, name: str | None) -> WeightRow:
    if name is None or not any(e.pass_name == "distill" for e in state.provenance.get(name, ())):
        return row
    form = state.form(name)
    changes: dict[str, Any] = {"passes": tuple(dict.fromkeys((*row.passes, "distill"))), "error": None}
    if form.terms:
        products = sum(term.multiplications for term in form.terms) if row.products_after else 0
        changes |= {"form": describe_form(form), "bytes_after": form.nbytes, "products_after": products}
    elif row.form == "kept":
        changes["form"] = "edited"
    return dataclasses.replace(row, **changes)


def _pass_entry(state: CompressionState) -> dict[str, Any]:
    kinds = [e.action for entries in state.provenance.values() for e in entries if e.pass_name == "distill"]
    return {"name": "distill", "edits": {k: kinds.count(k) for k in sorted(set(kinds))}, "refused": 0}


def _check_entry(result: TrainingResult) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "check": f"distilled: {result.objective}, {result.steps} steps, {result.tokens} tokens"
    }
    if result.held_out:
        entry["held-out loss before"] = result.held_out[0][1]
        entry["held-out loss"] = min(loss for _, loss in result.held_out)
    return entry


def _first_report(plan: Plan, state: CompressionState, result: TrainingResult) -> dict[str, Any]:
    rows = account_for(plan.program, state, plan.sites, {}, compresses=False)
    report = Report({"name": None, "passes": []}, rows, [_pass_entry(state)], [_check_entry(result)])
    return report.to_dict()
