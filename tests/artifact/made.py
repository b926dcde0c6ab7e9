"""A compressed module made by hand, so that artifacts are tested without passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.artifact import Artifact, Identity, write_artifact
from fxcompress.edits import CompressionState, FuseSites, SetActivation, SetTensor, SetTransform, SetWeight
from fxcompress.formats import IntFormat, quantize_to_term
from fxcompress.forms import DynamicPerToken, QuantizedWeight, Scale, StaticPerTensor, WeightLayout

RECIPE = {"name": "by-hand", "passes": [{"quantize-weights": {"bits": 4}}]}
REPORT = {"rows": [{"name": "first.weight", "reason": "naïve"}], "kl": 0.25}


class Small(nn.Module):
    """Embedding tied to a head, an odd-width linear stack, every kind of buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 12)
        self.first = nn.Linear(12, 10)
        self.second = nn.Linear(12, 10, bias=False)
        self.last = nn.Linear(10, 12).to(torch.bfloat16)
        self.head = nn.Linear(12, 19, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("cache", torch.ones(4), persistent=False)
        self.empty = nn.Parameter(torch.zeros(0, 3))


def small(seed: int = 0) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Small()


def term(weight: Tensor, bits: int = 4, group_size: int = 8, *, symmetric: bool = False) -> QuantizedWeight:
    fmt = IntFormat(bits=bits, symmetric=symmetric, group_size=group_size)
    return quantize_to_term(weight, WeightLayout.rows(tuple(weight.shape)), fmt)


def state_of(module: nn.Module) -> CompressionState:
    """Two replaced weights, one activation-only form, a transform with a bias and an edited vector."""
    weights = {name: p.detach() for name, p in module.named_parameters()}
    weights |= dict(module.named_buffers())
    state = CompressionState(weights)
    for name in ("first.weight", "second.weight"):
        state.apply(SetWeight(name, (term(weights[name]),)), "by-hand")
        state.apply(SetActivation(name, DynamicPerToken(8)), "by-hand")
    state.apply(SetWeight("table.weight", (term(weights["table.weight"], 8, 0, symmetric=True),)), "by-hand")
    scale, zero = torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)
    state.apply(SetActivation("last.weight", StaticPerTensor(8, scale, zero)), "by-hand")
    factor = torch.rand(20)[::2]  # strided, and a part of its storage
    state.apply(SetTransform("last.weight", (Scale(factor),), bias=torch.zeros(12)), "by-hand")
    state.apply(SetTensor("first.bias", weights["first.bias"] + 1), "by-hand")
    state.apply(FuseSites(("first.weight", "second.weight")), "by-hand")
    return state


def write(path: Path, module: nn.Module | None = None, **changed: Any) -> Artifact:
    module = module or small()
    given: dict[str, Any] = {
        "recipe": RECIPE,
        "state": state_of(module),
        "report": REPORT,
        "module": module,
        "identity": Identity.of_module(module),
        "aliases": {"head.weight": "table.weight"},
    }
    return write_artifact(path, **(given | changed))
