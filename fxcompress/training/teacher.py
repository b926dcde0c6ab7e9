"""The teacher of a run: a frozen training graph, asked in every step or once for its likeliest outcomes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxcompress.training.data import TrainingData
from fxcompress.training.graph import TrainingGraph
from fxcompress.training.scores import TeacherScores

__all__ = ["TeacherCache"]


class TeacherCache:
    """The ``k`` likeliest outcomes at every position of every sequence: 8·k bytes per token.

    Args:
        data: The sequences.
        k: Outcomes per token.
        temperature: At which log-probabilities are taken.
        folder: Where they are kept between runs, or None.
        key: Hash of data and teacher; a file of another key is made anew.
    """

    def __init__(
        self,
        data: TrainingData,
        k: int,
        temperature: float,
        folder: str | os.PathLike[str] | None,
        key: str,
    ) -> None:
        self.data, self.k, self.temperature, self.key = data, k, temperature, key
        self._path = None if folder is None else Path(folder) / f"teacher-{key[:16]}.safetensors"
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def fill(self, teacher: TrainingGraph, device: torch.device, write: bool) -> Iterable[int]:
        """Ask the teacher about every sequence, or read what an earlier run asked; yields row after row."""
        if self._path is not None and self._path.is_file():
            with safe_open(self._path, framework="pt") as handle:
                for row in range(len(self.data)):
                    self._known[row] = (
                        handle.get_tensor(f"{row}.values"),
                        handle.get_tensor(f"{row}.indices"),
                    )
                    yield row
            return
        for row in range(len(self.data)):
            sequences = self.data.batch([row], device)
            found = TeacherScores.top(teacher(sequences.inputs).scores, self.k, self.temperature)
            assert found.indices is not None
            self._known[row] = (found.values.cpu(), found.indices.to("cpu", torch.int32))
            yield row
        if self._path is not None and write:
            aside = self._path.with_suffix(f".{os.getpid()}")
            pairs = self._known.items()
            tensors = {
                f"{r}.{n}": t for r, pair in pairs for n, t in zip(("values", "indices"), pair, strict=True)
            }
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
            aside.replace(self._path)

    def scores(self, rows: Sequence[int], length: int, device: torch.device) -> TeacherScores:
        """What is known of the rows, filled up to ``length`` positions."""
        values, indices = zip(*(self._known[row] for row in rows), strict=True)

        def together(parts: Sequence[Tensor]) -> Tensor:
            padded = [torch.nn.functional.pad(p, (0, 0, 0, length - p.shape[1])) for p in parts]
            return torch.cat(padded).to(device)

        return TeacherScores(together(values), together(indices), self.temperature)
