"""Export a compressed model or program: lower, translate, check in ONNX Runtime, write."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from fxcompress.apply import AppliedGraph, apply_state
from fxcompress.backends.onnx import parity as check
from fxcompress.backends.onnx.example_inputs import standard_trials, tensor_inputs
from fxcompress.backends.onnx.lowering import lower
from fxcompress.backends.onnx.products import FLOAT_ACCURACY, INT8_ACCURACY
from fxcompress.backends.onnx.report import OnnxReport, Parity
from fxcompress.backends.onnx.saving import (
    EXTERNAL_THRESHOLD,
    check_destination,
    publish,
    write_aside,
    write_model,
)
from fxcompress.backends.onnx.translate import OPSETS, Translated, translate
from fxcompress.capture.program import Program
from fxcompress.edits import CompressionState
from fxcompress.errors import BackendError
from fxcompress.form_inputs import form_tensor

__all__ = ["TARGETS", "Options", "export_program"]

logger = logging.getLogger("fxcompress.backends")
TARGETS = ("onnxruntime", "portable")


@dataclass(frozen=True)
class Options:
    """How to export.

    Args:
        opset: Version of the ONNX standard, 21…24. Default 21, the first with 4-bit types and blocks.
        target: ``"onnxruntime"`` (default): also operators of its own. ``"portable"``: the standard's only.
        external_data: True or False: weights in a file of their own (``NAME.onnx.data``) or not; ``"auto"``
            (default): when they exceed ``external_threshold``.
        external_threshold: Bytes. Default just under 2 GiB, the most one file can hold.
        overwrite: Replace an existing file. Default False.
        attention: ``"fused"`` (default): attention over a growing cache as ``GroupQueryAttention``, which
            continues prompts of one sequence at a time. ``"plain"``: as plain operators.
        accuracy_level: Of ``MatMulNBits``: 4 (activations in int8 blocks, fast), 1 (in float), or None
            (default): 4 where that keeps to the limits of :mod:`~fxcompress.backends.onnx.parity`.

    Raises:
        BackendError: a value is not one of these.
    """

    opset: int = 21
    target: str = "onnxruntime"
    external_data: bool | str = "auto"
    external_threshold: int = EXTERNAL_THRESHOLD
    overwrite: bool = False
    attention: str = "fused"
    accuracy_level: int | None = None

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise BackendError(
                f"opset {self.opset} cannot be written.", fix=f"use {OPSETS.start}…{OPSETS.stop - 1}."
            )
        if self.target not in TARGETS:
            raise BackendError(f"target {self.target!r} is unknown.", fix=f"use one of {', '.join(TARGETS)}.")
        if self.attention not in ("fused", "plain"):
            raise BackendError(f"attention={self.attention!r}, expected 'fused' or 'plain'.")
        if self.accuracy_level not in (None, FLOAT_ACCURACY, INT8_ACCURACY):
            raise BackendError(f"accuracy_level={self.accuracy_level!r}, expected 4, 1 or None (measured).")
        if self.accuracy_level == FLOAT_ACCURACY and self.target == "portable":
            raise BackendError(
                "accuracy_level=1: in portable files ONNX Runtime chooses the level, which is 4.",
                fix="use target='onnxruntime'.",
            )
        if self.external_data not in (True, False, "auto"):
            raise BackendError(f"external_data={self.external_data!r}, expected True, False or 'auto'.")


@dataclass(frozen=True)
class Signature:
    """What the outside of the exported model is called.

    Args:
        inputs: Placeholder → name of the ONNX input.
        outputs: Names of the outputs, in order.
        dimensions: ONNX input → names of its dimensions.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    dimensions: Mapping[str, Sequence[str]] = field(default_factory=dict)


def export_program(
    program: Program,
    state: CompressionState,
    path: str | Path,
    example: Sequence[Any],
    *,
    trials: Sequence[tuple[str, Sequence[Any]]] | None = None,
    signature: Signature | None = None,
    options: Options | None = None,
    beside: Callable[[Path], None] | None = None,
) -> OnnxReport:
    """Export a captured program with its compressed forms, and check the result in ONNX Runtime.

    Args:
        program: The graph.
        state: The forms of its weights.
        path: The ``.onnx`` file to write.
        example: One value per flat input of the program.
        trials: Flat inputs to check the result on, each with a name. Default: the example, random values,
            other sizes.
        signature: Names; by default those of the program's inputs, ``output_0`` … for the outputs.
        options: See :class:`Options`.
        beside: Writes further files into the folder it is given; they are published with the model.

    Returns:
        What was written and how it compares.

    Raises:
        ArtifactError: the file cannot be written.
        BackendError: something has no ONNX form, or ONNX Runtime computes something else.
    """
    options, destination = options or Options(), Path(path)
    check_destination(destination, overwrite=options.overwrite)
    with torch.no_grad(), write_aside(destination) as folder:
        reference = apply_state(program, state)
        signature = _complete(program, reference, signature or Signature(), example)
        fused = options.attention == "fused" and options.target != "portable"
        calls = trials or standard_trials(program, example)
        lowered = lower(
            apply_state(program, state),
            state,
            portable=options.target == "portable",
            calls=[dict(zip(program.inputs, flat, strict=True)) for _, flat in calls] if fused else (),
        )
        translated = translate(
            lowered,
            example,
            opset=options.opset,
            input_names=[signature.inputs[name] for name in tensor_inputs(program, example)],
            output_names=signature.outputs,
            dimensions=signature.dimensions,
        )
        checker = _Checker(program, state, reference, translated, signature, options)
        report = checker.accept(folder / destination.name, calls)
        if beside is not None:
            beside(folder)
        files = publish(folder, destination, overwrite=options.overwrite)
    return OnnxReport(
        path=destination,
        bytes=sum(file.stat().st_size for file in files),
        opset=options.opset,
        target=options.target,
        accuracy_levels=report.levels,
        parity=tuple(report.parity),
        kernels=report.kernels,
        representation=lowered.representation,
        files=tuple(files),
    )


def _complete(
    program: Program, reference: AppliedGraph, given: Signature, example: Sequence[Any]
) -> Signature:
    inputs = {name: given.inputs.get(name, name) for name in tensor_inputs(program, example)}
    results = reference.module.graph.output_node().args[0]
    count = len(results) if isinstance(results, list | tuple) else 1
    outputs = list(given.outputs) or [f"output_{index}" for index in range(count)]
    return Signature(inputs, outputs, given.dimensions)


def width_of(node: ir.Node) -> int:
    """Bits of the codes of a ``MatMulNBits``."""
    return int(node.attributes["bits"].value)


def _accuracy_levels(widths: set[int]) -> list[dict[int, int]]:
    """Levels by width of the codes, fastest first.

    In float, ONNX Runtime has no kernel for a few rows of 8-bit codes: it decodes the whole weight in every
    call, tens of times slower. Of a model with narrower codes, too, these stay at int8 the longest.
    """
    found = [dict.fromkeys(widths, INT8_ACCURACY)]
    if 8 in widths and len(widths) > 1:
        found.append({width: INT8_ACCURACY if width == 8 else FLOAT_ACCURACY for width in widths})
    if widths:
        found.append(dict.fromkeys(widths, FLOAT_ACCURACY))
    return found


def _warn_of_slow_kernels(levels: Mapping[int, int]) -> None:
    if levels.get(8) == FLOAT_ACCURACY:
        logger.warning(
            "8-bit codes are multiplied at MatMulNBits accuracy level 1, where ONNX Runtime decodes the whole"
            " weight in every call; with accuracy_level=4 single tokens are many times faster."
        )


@dataclass
class _Found:
    levels: dict[int, int]
    parity: list[Parity]
    kernels: dict[str, int]


@dataclass
class _Checker:
    """Compares what ONNX Runtime computes with the reference, and chooses the accuracy level by it."""

    program: Program
    state: CompressionState
    reference: AppliedGraph
    translated: Translated
    signature: Signature
    options: Options

    def accept(self, path: Path, trials: Sequence[tuple[str, Sequence[Any]]]) -> _Found:
        """Write the model to ``path`` at the fastest accuracy level that keeps to the limits.

        Raises:
            BackendError: none does; names the first diverging node.
        """
        expected = [run_applied(self.reference, self.state, flat) for _, flat in trials]
        # Of a portable file the runtime makes MatMulNBits itself, with activations in int8 blocks.
        rounds = self.options.target == "portable" or self.quantizes
        products = [node for node in self.translated.model.graph if node.op_type == "MatMulNBits"]
        asked = self.options.accuracy_level
        widths = {width_of(node) for node in products}
        for levels in [dict.fromkeys(widths, asked)] if asked else _accuracy_levels(widths):
            for node in products:
                level = levels[width_of(node)]
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
            blocks = INT8_ACCURACY in levels.values()
            limits = check.ROUNDED if rounds or blocks else check.EXACT
            if asked and blocks:
                limits = check.ASKED
            self._write(path)
            session = check.open_session(path)
            results = [
                check.compare(name, want, session.run(None, self._feeds(flat)), self.signature.outputs)
                for (name, flat), want in zip(trials, expected, strict=True)
            ]
            allowed = [limits] * len(results)
            if self.quantizes and check.outside(results, allowed) is not None:
                allowed = [
                    check.widened(limits, self._sensitivity(flat, want))
                    for (_, flat), want in zip(trials, expected, strict=True)
                ]
            bad = check.outside(results, allowed)
            if bad is None:
                if asked is None:
                    _warn_of_slow_kernels(levels)
                return _Found(levels, results, check.kernels_run(path, self._feeds(trials[0][1])))
        assert bad is not None
        raise self._diverged(results[bad], trials[bad][1], allowed[bad])

    @property
    def quantizes(self) -> bool:
        """Whether the reference rounds activations."""
        nodes = self.reference.module.graph.nodes
        return any(check.is_quantizer(node) for node in nodes)

    def _sensitivity(self, flat: Sequence[Any], want: Sequence[Tensor]) -> Parity:
        """How far the reference is from itself when what it rounds moves by the noise of float32 sums.

        A value that crosses a rounding boundary moves by a whole step, which moves others across theirs:
        behind many layers two correct evaluations differ as much as the rounding changes the outputs.
        """
        moved = run_applied(self.reference, self.state, flat, noise=check.NOISE)
        outputs = [value.detach().numpy() for value in moved]
        return check.compare("noise", want, outputs, self.signature.outputs)

    def _write(self, path: Path) -> None:
        external = None if self.options.external_data == "auto" else bool(self.options.external_data)
        write_model(self.translated.model, path, external=external, threshold=self.options.external_threshold)

    def _feeds(self, flat: Sequence[Any]) -> dict[str, np.ndarray]:
        known = {value.name for value in self.translated.model.graph.inputs}
        tensors = tensor_inputs(self.program, flat)
        return {
            self.signature.inputs[name]: value.detach().cpu().contiguous().numpy()
            for name, value in tensors.items()
            if self.signature.inputs[name] in known
        }

    def _diverged(self, found: Parity, flat: Sequence[Any], limits: tuple[float, float]) -> BackendError:
        where = check.first_divergence(
            self.translated.model, self.translated.program, flat, self._feeds(flat), limits[0]
        )
        kl = "" if found.kl is None else f", KL {found.kl:.2e}"
        return BackendError(
            f"ONNX Runtime and the reference differ on {found.inputs}:"
            f" relative error {found.relative:.2e}{kl}"
            f" (allowed: {limits[0]:.0e}, KL {limits[1]:.0e}). First diverging node: {where}.",
            fix="report this; until then, target='portable' or another recipe may serve.",
        )


def run_applied(
    applied: AppliedGraph, state: CompressionState, flat: Sequence[Any], *, noise: float = 0.0
) -> list[Tensor]:
    """Run a rewritten graph op by op: the reference.

    Args:
        applied: The graph.
        state: The forms it was made with.
        flat: Its inputs.
        noise: Standard deviation of what is added to everything that is rounded, relative to its root mean
            square.
    """
    inputs = dict(zip(applied.program.inputs, flat, strict=True))
    values: list[Any] = []
    for node in applied.module.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in applied.form_inputs:
            values.append(form_tensor(state, applied.form_inputs[node.name]))
        elif node.name in applied.program.weight_of:
            values.append(applied.program.weights[applied.program.weight_of[node.name]])
        else:
            values.append(inputs[node.name])
    with torch.no_grad():
        found = check.Noisy(applied.module, noise).run(*values) if noise else applied.module(*values)
    return [found] if isinstance(found, Tensor) else list(found)


@contextmanager
def uncompiled(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the modules' own Python be traced instead of what they were compiled to."""
    held = [(module, module._compiled_call_impl) for module in modules]
    try:
        for module, _ in held:
            module._compiled_call_impl = None
        yield
    finally:
        for module, compiled in held:
            module._compiled_call_impl = compiled
