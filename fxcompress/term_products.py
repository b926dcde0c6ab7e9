"""Products with the terms of a form, as nodes of a graph: one per term with factors, one for all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.op_arguments import arguments
from fxcompress.analysis.site_types import Site
from fxcompress.errors import BackendError
from fxcompress.form_inputs import FormInputs, GraphEmit
from fxcompress.forms import WeightTerm

aten = torch.ops.aten


@dataclass(frozen=True)
class TermProducts:
    """Writes products into one graph. Terms come by their place in the form.

    Args:
        inputs: Of the graph.
        dequantized: Node of a term's value → parameter name; filled here.
    """

    inputs: FormInputs
    dequantized: dict[fx.Node, str]

    def linear(
        self,
        site: Site,
        node: fx.Node,
        x: Any,
        bias: fx.Node | None,
        terms: Mapping[int, WeightTerm],
        dtype: torch.dtype,
    ) -> fx.Node:
        """``x·Wᵀ + bias`` before ``node``: ``aten.linear`` with an ``[N, K]`` weight, and the factors."""
        whole = {index: term for index, term in terms.items() if not term.factored}
        y: Any = None
        if whole:
            weight = self.dense(site.name, whole, dtype, node)
            with self.inputs.graph.inserting_before(node):
                if site.layout.perm != (0, 1):
                    weight = self.inputs.graph.call_function(aten.t.default, (weight,))
                y = self.inputs.graph.call_function(
                    aten.linear.default, (x, weight, *(() if bias is None else (bias,)))
                )
        for index, term in terms.items():
            if term.factored:
                emit = self._emit(site.name, index, term, node)
                part = term.multiply(x, bias if y is None else None, dtype, emit)
                y = part if y is None else emit.call(aten.add.Tensor, y, part)
        result: fx.Node = y
        return result

    def convolution(
        self, site: Site, node: fx.Node, terms: Mapping[int, WeightTerm], dtype: torch.dtype
    ) -> fx.Node:
        """The convolution ``node`` with the terms as its kernel."""
        call = arguments(node)
        y: Any = None
        for index, term in terms.items():
            emit = self._emit(site.name, index, term, node)
            given = call if y is None else {**call, "bias": None}
            part = term.convolve(given, node.target, dtype, emit) if term.factored else None
            if part is None:
                weight = self.dense(site.name, {index: term}, dtype, node)
                part = emit.call(node.target, *({**given, "weight": weight}).values())
            y = part if y is None else emit.call(aten.add.Tensor, y, part)
        result: fx.Node = y
        return result

    def dense(
        self, name: str, terms: Mapping[int, WeightTerm], dtype: torch.dtype, before: fx.Node
    ) -> fx.Node:
        """The weight itself, computed right before its use so that it lives no longer than needed."""
        total: fx.Node | None = None
        for index, term in terms.items():
            part: fx.Node = term.emit(dtype, self._emit(name, index, term, before))
            self.dequantized[part] = name
            with self.inputs.graph.inserting_before(before):
                total = (
                    part if total is None else self.inputs.graph.call_function(aten.add.Tensor, (total, part))
                )
        if total is None:
            raise BackendError(f"{name}: the form has no weight terms.")
        return total

    def _emit(self, name: str, index: int, term: WeightTerm, before: fx.Node) -> GraphEmit:
        return GraphEmit(self.inputs, name, f"terms.{index}", term, before)
