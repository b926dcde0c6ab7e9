"""From a lowered graph to an ONNX model in memory."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fxcompress.backends.onnx.fusions import spell_for_fusion
from fxcompress.backends.onnx.rewriting import Lowered
from fxcompress.backends.onnx.translation import DOMAIN, translation_table
from fxcompress.capture.export import user_line
from fxcompress.errors import BackendError

__all__ = ["OPSETS", "Translated", "translate"]

OPSETS = range(21, 25)
"""Versions of the ONNX standard that can be written: 21 brought 4-bit types and scales in blocks."""


class Translated:
    """An ONNX model with the torch graph it was made from.

    Args:
        model: The model.
        program: The decomposed graph; its nodes are named like the model's values.
    """

    def __init__(self, model: ir.Model, program: ExportedProgram) -> None:
        self.model = model
        self.program = program


class _WithConstants(nn.Module):
    """The lowered graph as a module of its inputs alone."""

    def __init__(self, lowered: Lowered) -> None:
        super().__init__()
        self._graph = lowered.module
        self._order: list[tuple[int | None, str]] = []
        tensors = lowered.constants.tensors()
        for node in lowered.module.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in tensors:
                self.register_buffer(node.name, tensors[node.name].detach())
                self._order.append((None, node.name))
            else:
                self._order.append((lowered.inputs.index(node.name), node.name))

    def forward(self, flat: list[Any]) -> Any:
        values = [getattr(self, name) if index is None else flat[index] for index, name in self._order]
        return self._graph(*values)


def translate(
    lowered: Lowered,
    example: Sequence[Any],
    *,
    opset: int,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dimensions: Mapping[str, Sequence[str]],
) -> Translated:
    """Translate with ``torch.onnx`` and our table.

    Args:
        lowered: The graph.
        example: One value per flat input.
        opset: One of :data:`OPSETS`.
        input_names: Names of the tensor inputs, in flat order.
        output_names: Names of the outputs.
        dimensions: Input → names of its dimensions, for those that are dynamic.

    Raises:
        BackendError: an operator has no ONNX form; the message names it and the user's line.
    """
    exported = _export(lowered, example)
    with _quiet():
        try:
            made = torch.onnx.export(
                exported,
                opset_version=opset,
                custom_translation_table=translation_table(),
                verbose=False,
                optimize=False,
            )
        except Exception as error:
            raise BackendError(
                f"the model cannot be written as ONNX: {_reason(error)}",
                fix="rewrite that part with operators that ONNX has, or run the compressed model in PyTorch.",
            ) from error
        assert made is not None
        assert made.exported_program is not None
        model = made.model
        optimizer.optimize(model)
        spell_for_fusion(model)
    _finish(model, lowered, input_names, output_names, dimensions)
    return Translated(model, made.exported_program)


def _export(lowered: Lowered, example: Sequence[Any]) -> ExportedProgram:
    flat = list(example)
    dynamic = [dict.fromkeys(range(v.dim()), Dim.AUTO) if isinstance(v, Tensor) else None for v in flat]
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(
                _WithConstants(lowered), (flat,), dynamic_shapes=(dynamic,), strict=False
            )
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendError(
            f"the compressed graph cannot be exported: {lines[0]} At {user_line(error)}.",
            fix="make that line traceable by torch.export.",
        ) from error
    # With example inputs at hand, torch puts a call that checks all sizes into every copy of the graph, which
    # can be neither decomposed nor written.
    exported.example_inputs = None
    return exported


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own internals, and logs which optional packages it did without."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause in one line, with the line of the user's code the exporter reports."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split()) or type(cause).__name__
    where = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    outside = [f"{name}:{line}" for name, line in where if "site-packages" not in name]
    return f"{text[:400]}." + (f" At {outside[-1]}." if outside else "")


def _finish(
    model: ir.Model,
    lowered: Lowered,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dimensions: Mapping[str, Sequence[str]],
) -> None:
    """Names that users see, 4-bit types, and nothing that depends on this machine or run."""
    graph = model.graph
    if any(node.domain == DOMAIN for node in graph):
        model.opset_imports[DOMAIN] = 1
    names, four_bits = lowered.constants.names(), lowered.constants.four_bits()
    for placeholder in four_bits:
        _to_four_bits(graph.initializers.get(placeholder))
    for placeholder, name in names.items():
        value = graph.initializers.get(placeholder)
        if value is not None:
            value.name = name
    for value, name in zip(graph.inputs, input_names, strict=True):
        value.name = name
    for index, name in enumerate(output_names):
        graph.outputs[index].name = name
    _name_dimensions(model, dimensions)
    model.producer_name, model.producer_version = "fxcompress", None
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name = "main"
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _to_four_bits(value: ir.Value | None) -> None:
    if value is None:
        return
    assert value.const_value is not None
    codes = value.const_value.numpy()
    signed = codes.dtype == np.int8
    kind = ir.DataType.INT4 if signed else ir.DataType.UINT4
    value.const_value = ir.Tensor(codes.astype(kind.numpy()), dtype=kind, name=value.name)
    value.type = ir.TensorType(kind)


def _name_dimensions(model: ir.Model, dimensions: Mapping[str, Sequence[str]]) -> None:
    """Symbols of the inputs get the given names, all others numbers in order of appearance."""
    known: dict[str, str] = {}
    for value in model.graph.inputs:
        for index, dim in enumerate(value.shape or ()):
            wanted = dimensions.get(value.name or "", ())
            if isinstance(dim, ir.SymbolicDim) and dim.value and re.fullmatch(r"\w+", dim.value):
                name = wanted[index] if index < len(wanted) and wanted[index] else f"{value.name}_{index}"
                known.setdefault(dim.value, name)

    def renamed(match: re.Match[str]) -> str:
        return known.setdefault(match.group(), f"d{len(known)}")

    values = [*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        dims: list[int | str | None] = []
        for dim in value.shape:
            text = dim.value if isinstance(dim, ir.SymbolicDim) else str(dim)
            named = None if text is None else re.sub(r"\b[su]\d+\b", renamed, text)
            dims.append(int(named) if named is not None and named.isdigit() else named)
        value.shape = ir.Shape(dims)
