"""Run an exported model in ONNX Runtime and compare it with the reference."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from fxcompress.backends.onnx.report import Parity
from fxcompress.errors import BackendError

__all__ = [
    "ASKED",
    "EXACT",
    "NOISE",
    "ROUNDED",
    "Noisy",
    "compare",
    "first_divergence",
    "is_quantizer",
    "kernels_run",
    "open_session",
    "outside",
    "widened",
]

EXACT = (1e-3, 1e-4)
"""Largest relative error and KL of graphs that round no activation: the noise of float32 sums."""

ROUNDED = (0.05, 0.005)
"""The same where activations are rounded to 8 bits: noise moves values across rounding boundaries.

A mean KL of 0.005 nats changes the perplexity by about half a percent at most.
"""

ASKED = (0.3, 0.05)
"""The same for int8 blocks that the caller asked for; what exceeds it is wrong rather than rounded."""

NOISE = 1e-6
"""Relative noise of float32 sums in another order."""
_TIMES = 3
"""How many times as far as by its own noise a model may move."""
_ALONE = 4
"""How many times as far as on average a model may be off on one set of inputs, which may be a few tokens."""


def open_session(
    path: Path, *, profile: Path | None = None, threads: int = 0
) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Args:
        path: The model.
        profile: Prefix of a file that records what runs.
        threads: Within an operator; 0: ONNX Runtime chooses.

    Raises:
        BackendError: ONNX Runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exception classes, one per status code
        raise BackendError(
            f"{path.name}: ONNX Runtime {onnxruntime.__version__} cannot load it:"
            f" {' '.join(str(error).split())}",
            fix="export for target='portable', or upgrade onnxruntime.",
        ) from error


def kernels_run(path: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Operators that ONNX Runtime ran for one call, after its own optimization, with their counts."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, profile=Path(folder) / "run")
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = {
        event["name"]: event["args"]["op_name"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    return dict(sorted(Counter(ran.values()).items()))


def compare(
    inputs: str, reference: Sequence[Tensor], found: Sequence[np.ndarray], names: Sequence[str]
) -> Parity:
    """How far the found outputs are from the reference."""
    worst, relative, kl, top1, positions = 0.0, 0.0, None, None, 1
    for name, expected, array in zip(names, reference, found, strict=True):
        got = torch.from_numpy(np.ascontiguousarray(array))
        if got.shape != expected.shape:
            raise BackendError(
                f"output {name}: ONNX Runtime gives {tuple(got.shape)},"
                f" the reference {tuple(expected.shape)}."
            )
        if not expected.numel():
            continue
        want, have = expected.to(torch.float64), got.to(torch.float64)
        if not torch.equal(want.isfinite(), have.isfinite()):
            relative = worst = float("inf")
            continue
        want, have = want.nan_to_num(0, 0, 0), have.nan_to_num(0, 0, 0)
        difference = (want - have).abs()
        worst = max(worst, float(difference.max()))
        relative = max(relative, float(difference.norm() / want.norm().clamp_min(1e-12)))
        if name == "logits" and want.dim() >= 2:
            p, q = want.log_softmax(-1), have.log_softmax(-1)
            kl = float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0))
            top1 = float((p.argmax(-1) == q.argmax(-1)).double().mean())
            positions = want[..., 0].numel()
    return Parity(inputs, worst, relative, kl, top1, positions)


def outside(found: Sequence[Parity], limits: Sequence[tuple[float, float]]) -> int | None:
    """Which comparison exceeds its ``(relative, kl)``; None when all keep to theirs.

    The KL decides alone where there is one: its mean over all positions, which a few positions alone may
    exceed.
    """
    shares = [
        parity.relative / relative if parity.kl is None else parity.kl / kl
        for parity, (relative, kl) in zip(found, limits, strict=True)
    ]
    bounds = [1 if parity.kl is None else _ALONE for parity in found]
    wrong = [i for i, (share, bound) in enumerate(zip(shares, bounds, strict=True)) if share > bound]
    if wrong:
        return wrong[0]
    weights = [0 if parity.kl is None else parity.positions for parity in found]
    mean = sum(map(math.prod, zip(weights, shares, strict=True))) / max(1, sum(weights))
    return None if mean <= 1 else max(range(len(found)), key=shares.__getitem__)


def widened(limits: tuple[float, float], noise: Parity) -> tuple[float, float]:
    """Limits for a model whose own outputs move by ``noise`` when what it rounds moves by :data:`NOISE`."""
    relative, kl = limits
    own = noise.kl if noise.kl is not None else 0.0
    return max(relative, _TIMES * noise.relative), max(kl, _TIMES * own)


def first_divergence(
    model: ir.Model,
    program: ExportedProgram,
    flat: Sequence[Any],
    feeds: Mapping[str, np.ndarray],
    limit: float,
) -> str:
    """Name the first value that ONNX Runtime computes differently from torch.

    Args:
        model: The exported model, its values named like the nodes of ``program``.
        program: The torch graph it was translated from.
        flat: Inputs of the program.
        feeds: The same by name.
        limit: Relative error that counts as different.
    """
    recorder = _Recorder(program.graph_module)
    recorder.run(*_arguments(program, flat))
    values = {v.name: v for node in model.graph for v in node.outputs if v.name in recorder.values}
    kinds = {v.name: node.op_type for node in model.graph for v in node.outputs}
    names = [name for name in recorder.values if name in values]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.onnx"
        ends = list(model.graph.outputs)
        model.graph.outputs.extend(values[name] for name in names if values[name] not in ends)
        try:
            ir.save(model, path, external_data="all.data")
        finally:
            del model.graph.outputs[len(ends) :]
        session = open_session(path)
        wanted = [name for name in names if name in {o.name for o in session.get_outputs()}]
        found = dict(zip(wanted, session.run(wanted, dict(feeds)), strict=True))
    worst = ("none of the intermediate values", 0.0)
    for name in wanted:
        expected, kind = recorder.values[name].to(torch.float64), kinds[name]
        got = torch.from_numpy(np.ascontiguousarray(found[name])).to(torch.float64)
        if got.shape != expected.shape:
            return f"{name} ({kind}): shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        error = float((got - expected).norm() / expected.norm().clamp_min(1e-12))
        if not error <= limit:
            return f"{name} ({kind}): relative error {error:.2e}"
        worst = max(worst, (f"{name} ({kind})", error), key=lambda pair: pair[1])
    return f"{worst[0]}, with relative error {worst[1]:.2e}, the largest of all"


def is_quantizer(node: fx.Node) -> bool:
    """Whether a node rounds an activation."""
    return str(node.target).startswith("fxcompress.quantize_")


class Noisy(fx.Interpreter):
    """A graph in which everything that is rounded moves a little before.

    Args:
        module: The graph.
        noise: Standard deviation, relative to the root mean square of what is rounded.
    """

    def __init__(self, module: fx.GraphModule, noise: float) -> None:
        super().__init__(module)
        self.noise = noise
        self.generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        """Everything but quantizers as it is."""
        if not is_quantizer(n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x = args[0]
        size = self.noise * x.float().square().mean().sqrt()
        moved = x + (size * torch.randn(x.shape, generator=self.generator)).to(x.dtype)
        return n.target(moved, *args[1:], **kwargs)  # type: ignore[operator]


class _Recorder(fx.Interpreter):
    """Keeps every floating-point result."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor) and result.is_floating_point():
            self.values[n.name] = result
        return result


def _arguments(program: ExportedProgram, flat: Sequence[Any]) -> list[Any]:
    """Inputs of the exported graph in order: its own tensors, then the user's."""
    signature = program.graph_signature
    tensors = {**program.state_dict, **program.constants}
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    user = iter(flat)
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    return [tensors[lifted[name]] if name in lifted else next(user) for name in placeholders]
