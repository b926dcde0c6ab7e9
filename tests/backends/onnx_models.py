"""Small models whose exports are quick, and what ONNX Runtime makes of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import fxcompress


class Perceptron(nn.Module):
    """Two linears, the second without a bias; ``[batch, tokens, width]`` → the same."""

    def __init__(self, width: int = 96, hidden: int = 128) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Classifier(nn.Module):
    """A table tied to the head: ``[batch, tokens]`` ids → logits."""

    def __init__(self, width: int = 80, words: int = 50) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.body = Perceptron(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(self.table(ids)))}


class Pictures(nn.Module):
    """Convolutions in a chain, with normalisations and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, groups=2)
        self.third = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = self.third(torch.relu(self.second(x)))
        return self.head(torch.relu(x).mean((2, 3)))


def enlivened(model: nn.Module) -> nn.Module:
    """Statistics and gains of normalisations that are not the identity, a negative gain among them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def compressed(model: nn.Module, recipe: Any, inputs: Any) -> fxcompress.CompressedModel:
    """The model compressed on one batch, without checks and progress."""
    return fxcompress.compress(model, recipe, [inputs], example_inputs=inputs, progress=False, verify="off")


def run(path: Path, **inputs: Tensor) -> list[Tensor]:
    """Outputs of a file for named inputs."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return [torch.from_numpy(np.asarray(array)) for array in found]
