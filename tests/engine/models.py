"""Small models, programs and passes for the engine's tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxcompress.calibration import CalibrationData, as_calibration
from fxcompress.capture.export import capture_model
from fxcompress.capture.program import Program
from fxcompress.edits import Edit, Refuse, SetTensor, SetWeight
from fxcompress.formats.integer import IntFormat, quantize_to_term
from fxcompress.pass_base import BlockContext, Pass

WIDTH, VOCABULARY, LAYERS = 16, 40, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x.to(torch.float32)))))


class Decoder(nn.Module):
    """Embedding, three equal layers, head: a prologue, three blocks and an epilogue."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1).to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def build(seed: int = 0) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)
    return model.requires_grad_(False)


def tokens(rows: int = 2, length: int = 6, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def capture(seed: int = 0) -> Program:
    """A fresh program; its weights may be edited by the test."""
    return capture_model(build(seed), kwargs={"input_ids": tokens()})


@functools.cache
def decoder() -> Program:
    """The shared program; read only."""
    return capture()


@functools.cache
def masked() -> Program:
    """A program that takes two tensors."""
    ids = tokens()
    return capture_model(build(), kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def calibration(program: Program, batches: int = 3) -> CalibrationData:
    return as_calibration([{"input_ids": tokens(2, 5 + i, seed=i)} for i in range(batches)], program)


def by_hand(
    function: Any, weights: dict[str, Tensor], inputs: dict[str, Tensor], mode: Any = "real"
) -> Program:
    """A program made by ``make_fx`` from ``function(*weights, *inputs)``."""
    module = make_fx(function, pre_dispatch=True, tracing_mode=mode)(*weights.values(), *inputs.values())
    nodes = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    count = len(weights)
    return Program(
        graph_module=module,
        weight_of=dict(zip(nodes[:count], weights, strict=True)),
        weights=dict(weights),
        parameters=frozenset(weights),
        inputs=tuple(nodes[count:]),
    )


@dataclass(frozen=True)
class RoundEverything(Pass):
    """Rounds every matrix to int8; counts how often blocks were solved."""

    name: ClassVar[str] = "round-everything"
    provides: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})
    solved: ClassVar[list[int]] = []
    bits: int = 8

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        self.solved.append(block.index)
        for site in block.sites:
            if not block.state.is_compressed(site.name):
                fmt = IntFormat(bits=self.bits, symmetric=True, group_size=0)
                yield SetWeight(site.name, (quantize_to_term(block.weight(site.name), site.layout, fmt),))


@dataclass(frozen=True)
class ShiftByMean(Pass):
    """Adds noise scaled by the mean input: depends on data, on the order and on the generator."""

    name: ClassVar[str] = "shift-by-mean"
    needs_calibration: ClassVar[bool] = True
    solved: ClassVar[list[int]] = []
    amount: float = 0.01

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        self.solved.append(block.index)
        for site in block.sites:
            if not site.takes_activation:
                yield Refuse(site.name, "not a product")
                continue
            assert site.input is not None
            mean = block.statistics([site])[site.input.name].mean_abs.mean()
            weight = block.weight(site.name)
            noise = torch.randn(weight.shape, generator=block.generator)
            yield SetTensor(site.name, weight + self.amount * mean * noise)


@dataclass(frozen=True)
class ScaleNorm(Pass):
    """Moves a power of two from each norm into the product after it; exact unless ``wrong``."""

    name: ClassVar[str] = "scale-norm"
    preserves_function: ClassVar[bool] = True
    provides: ClassVar[frozenset[str]] = frozenset({"smoothed"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})
    factor: float = 3.0
    wrong: bool = False

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        for site in block.sites:
            if site.name.endswith("up.weight"):
                prefix = site.name.removesuffix("up.weight")
                for vector in ("norm.weight", "norm.bias"):
                    yield SetTensor(prefix + vector, block.weight(prefix + vector).double().div(4.0).float())
                yield SetTensor(site.name, block.weight(site.name) * (4.001 if self.wrong else 4.0))
