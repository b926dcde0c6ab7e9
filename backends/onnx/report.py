"""What an export wrote, and how closely it computes what the reference computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["OnnxReport", "Parity"]


@dataclass(frozen=True)
class Parity:
    """ONNX Runtime against the reference on one set of inputs.

    Args:
        inputs: Which inputs.
        max_error: Largest absolute difference of any output.
        relative: ‖difference‖ / ‖reference‖, the largest over all outputs.
        kl: Mean KL(reference ‖ ONNX Runtime) per position in nats, for outputs called ``logits``; else None.
        top1: Share of positions with the same most likely token; None without logits.
        positions: How many of them there are; 1 without logits.
    """

    inputs: str
    max_error: float
    relative: float
    kl: float | None
    top1: float | None
    positions: int = 1


@dataclass(frozen=True)
class OnnxReport:
    """The result of an export.

    Args:
        path: The model file.
        bytes: Size of the model and its external data.
        opset: Version of the ONNX standard.
        target: ``"onnxruntime"`` or ``"portable"``.
        accuracy_levels: Of ``MatMulNBits``, by width of the codes: 4 (activations in int8 blocks) or 1 (in
            float).
        parity: One entry per set of inputs.
        kernels: Operator → how many nodes of it ONNX Runtime ran, after its own optimization.
        representation: Compressed parameter → the ONNX operators that compute with it; a factor of one is
            named by the parameter and ``.u`` or ``.v``.
        files: Everything that was written.
    """

    path: Path
    bytes: int
    opset: int
    target: str
    accuracy_levels: Mapping[int, int]
    parity: tuple[Parity, ...]
    kernels: Mapping[str, int]
    representation: Mapping[str, str]
    files: tuple[Path, ...] = field(default=())

    @property
    def accuracy_level(self) -> int | None:
        """The lowest of the levels; None without ``MatMulNBits``."""
        return min(self.accuracy_levels.values(), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = {**dataclasses.asdict(self), "accuracy_level": self.accuracy_level}
        return {**found, "path": str(self.path), "files": [str(file) for file in self.files]}

    def __str__(self) -> str:
        """A few lines for people."""
        levels = [f"{level} for {bits}-bit codes" for bits, level in sorted(self.accuracy_levels.items())]
        level = f", MatMulNBits accuracy level {', '.join(levels)}" if levels else ""
        lines = [f"{self.path}: {self.bytes / 1e6:,.1f} MB, opset {self.opset}, {self.target}{level}"]
        for parity in self.parity:
            kl = "" if parity.kl is None else f", KL {parity.kl:.2e} nats, top-1 {parity.top1:.1%}"
            lines.append(
                f"  {parity.inputs}: max error {parity.max_error:.2e}, relative {parity.relative:.2e}{kl}"
            )
        ran = ", ".join(f"{name} {count}" for name, count in sorted(self.kernels.items()))
        return "\n".join([*lines, f"  kernels: {ran}"])
