"""What the training tests share: a tiny decoder, its data, and how an applied graph is run."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor

from fxcompress.apply import apply_state
from fxcompress.calibration.plan import Plan
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState
from fxcompress.form_inputs import form_tensor
from fxcompress.manager import run_recipe
from fxcompress.training.data import TrainingData, as_training
from fxcompress.training.graph import TrainingGraph
from fxcompress.training.trainable import What
from tests.engine.models import decoder, tokens


@functools.cache
def plan() -> Plan:
    """The tiny decoder's; read only."""
    return Plan(decoder())


def compressed(*passes: Any) -> CompressionState:
    """The tiny decoder's state after some passes."""
    return _compressed(json.dumps(passes)).copy()


@functools.cache
def _compressed(passes: str) -> CompressionState:
    return run_recipe(decoder(), json.loads(passes), [tokens(4, 12)], verify="off").state


def graph(state: CompressionState, *parts: str, **options: Any) -> TrainingGraph:
    return TrainingGraph(plan(), state, What(parts=parts or ("weights",), **options))


def teacher() -> TrainingGraph:
    return TrainingGraph(plan(), CompressionState(decoder().weights), None)


def rows(count: int = 24, length: int = 12) -> TrainingData:
    return as_training([tokens(1, length, seed=100 + i) for i in range(count)], decoder())


def call(ids: Tensor) -> dict[str, Tensor]:
    return {decoder().inputs[0]: ids}


def run_applied(program: Program, state: CompressionState, ids: Tensor) -> Tensor:
    """What the artifact's reference computes."""
    applied = apply_state(program, state)
    given = []
    for node in applied.module.graph.nodes:
        if node.op == "placeholder":
            name = program.weight_of.get(node.name)
            if node.name in applied.form_inputs:
                given.append(form_tensor(state, applied.form_inputs[node.name]))
            else:
                given.append(ids if name is None else state.weight(name))
    with torch.no_grad():
        scores: Tensor = applied.module(*given)[0]
    return scores


def exported(trained: TrainingGraph, state: CompressionState) -> CompressionState:
    new = state.copy()
    for edit in trained.trainable.edits("trained"):
        new.apply(edit, "distill")
    return new


def disturb(trained: TrainingGraph, size: float = 0.02) -> None:
    """Move every parameter, as training would."""
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)
