"""Apply edits to a graph: from (Program, CompressionState) to a standard quantize/dequantize graph.

    linear(x, W)  →  linear(dequantize(quantize(T_in(x))), dequantize_weight(codes, scale, zero))

Any consumer works, since the dequantized weight has the parameter's own shape; backends fuse what they know.
Sites of kind LINEAR are brought to one spelling, ``aten.linear`` with an ``[N, K]`` weight, whatever they
were.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import fxcompress.ops  # noqa: F401  (registers the operators)
from fxcompress.analysis.edges import find_edges
from fxcompress.analysis.op_arguments import replace_argument
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.analysis.sites import find_sites
from fxcompress.capture.program import Program
from fxcompress.capture.values import infer_values
from fxcompress.edits import CompressionState
from fxcompress.errors import BackendError
from fxcompress.form_inputs import FormInputs, GraphEmit, TensorRef
from fxcompress.forms import (
    FixedOutliers,
    OutlierColumns,
    OutlierSplit,
    QuantizedWeight,
    Scale,
    SiteForm,
    SplitQuantizer,
    WeightTerm,
)
from fxcompress.term_products import TermProducts

logger = logging.getLogger(__name__)
ops = torch.ops.fxcompress
aten = torch.ops.aten


@dataclass
class AppliedGraph:
    """A rewritten graph.

    Args:
        module: The graph; placeholders are those of the program (unused weights removed) plus form tensors.
        program: The program it was made from (names and inputs).
        form_inputs: Placeholder name → the form tensor it takes.
        dequantized: ``dequantize_weight``/``quantized_embedding`` (or alike) node → parameter name.
        node_of: Node of the program → the node that computes its value here.
    """

    module: fx.GraphModule
    program: Program
    form_inputs: dict[str, TensorRef] = field(default_factory=dict)
    dequantized: dict[fx.Node, str] = field(default_factory=dict)
    node_of: dict[fx.Node, fx.Node] = field(default_factory=dict)


def apply_state(
    program: Program, state: CompressionState, sites: Sequence[Site] | None = None
) -> AppliedGraph:
    """Rewrite a copy of the program's graph so that it computes with the state's forms.

    Edited tensors (``state.tensors``) need no rewriting: they are values of unchanged placeholders.
    """
    node_map: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    output = graph.graph_copy(program.graph, node_map)
    graph.output(output)
    for old, new in node_map.items():
        new.meta = copy.copy(old.meta)
    module = fx.GraphModule(program.graph_module, graph)
    applied = AppliedGraph(module, program, node_of=node_map)
    rewriter = _Rewriter(applied, state, node_map)
    for site in find_sites(program) if sites is None else sites:
        rewriter.rewrite(site)
    rewriter.edges(program)
    rewriter.finish(program)
    infer_values(graph)
    graph.lint()
    module.recompile()
    return applied


class _Rewriter:
    def __init__(
        self, applied: AppliedGraph, state: CompressionState, node_map: dict[fx.Node, fx.Node]
    ) -> None:
        self.applied = applied
        self.graph = applied.module.graph
        self.state = state
        self.node_map = node_map
        self.inputs = FormInputs(self.graph, state, applied.form_inputs)
        self.products = TermProducts(self.inputs, applied.dequantized)
        # Nodes that read a weight: for a product whose input is transformed; for a use without an input.
        self.reads_form: set[fx.Node] = set()
        self.reads_parameter: set[fx.Node] = set()

    def rewrite(self, site: Site) -> None:
        form = self.state.forms.get(site.name)
        if form is None:
            return
        node = self.node_map[site.node]
        split = site.kind is SiteKind.LINEAR and self._split(site, node, form)
        if site.takes_activation and not split:
            self._input(site, node, form)
        if form.terms and not split:
            if site.kind is SiteKind.EMBEDDING and len(form.terms) == 1:
                self._embedding(site, node, form.terms[0])
            elif site.kind is SiteKind.LINEAR:
                self._linear(site, node, form)
            elif site.kind is SiteKind.CONV and any(term.factored for term in form.terms):
                terms = dict(enumerate(form.terms))
                dtype = _value_dtype(site.weight_value)
                self._replace(node, self.products.convolution(site, node, terms, dtype))
            # every other use reads the dequantized parameter: see finish()
        if form.transform_in and site.kind is SiteKind.EMBEDDING:
            self._looked_up(site, form)
        elif form.transform_in and form.terms and site.kind is not SiteKind.LINEAR:
            readers = self.reads_form if site.takes_activation else self.reads_parameter
            readers.add(self.node_map[(*site.chain, site.node)[0]])
        if form.bias is not None:
            self._bias(site)
        if form.transform_out:
            raise BackendError(f"{site.name}: output transforms are not representable in this version.")

    def edges(self, program: Program) -> None:
        """Quantize the values on activation edges; their ops are no weight sites and still stand."""
        wanted = {
            held.signature: (name, index, held)
            for name, form in self.state.forms.items()
            if any(name == known for known in program.weight_of.values())
            for index, held in enumerate(form.edges)
        }
        if not wanted:
            return
        for edge in find_edges(program):
            if edge.reason or edge.signature not in wanted:
                continue
            name, index, held = wanted.pop(edge.signature)
            node = self.node_map[edge.node]

            def quantized(x: fx.Node, name: str = name, index: int = index, held: Any = held) -> Any:
                before, value = self.node_map[edge.node], edge.value  # noqa: B023  (called at once)
                emit = GraphEmit(self.inputs, name, f"edges.{index}.quantizer", held.quantizer, before, x)
                return held.quantizer.emit(x, _value_dtype(value), emit)

            node.args, node.kwargs = replace_argument(node, node.args, node.kwargs, edge.argument, quantized)
        for name, _, held in wanted.values():
            logger.warning("%s: this graph has no %s to quantize (%s)", name, held.argument, held.signature)

    def finish(self, program: Program) -> None:
        """Give remaining uses of a compressed parameter its dequantized value; drop unread weights."""
        for placeholder in program.placeholders():
            name = program.weight_of.get(placeholder.name)
            if name is None or not self.state.is_compressed(name):
                continue
            node = self.node_map[placeholder]
            for user in list(node.users):
                form, dtype = self.state.forms[name], program.weights[name].dtype
                dense = self.products.dense(name, dict(enumerate(form.terms)), dtype, user)
                if user in self.reads_parameter:
                    dense = self._without_transforms(name, form, dense, dtype, user)
                user.replace_input_with(node, dense)
        for node in reversed(list(self.graph.nodes)):
            unread = not node.users and node.op != "output"
            is_weight = node.op == "placeholder" and node.name in program.weight_of
            movable = node.op == "call_function" and node.target in _REMOVABLE
            if unread and (is_weight or movable):
                self.graph.erase_node(node)

    def _embedding(self, site: Site, node: fx.Node, term: WeightTerm) -> None:
        dtype = _value_dtype(site.weight_value)
        emit = GraphEmit(self.inputs, site.name, "terms.0", term, node)
        new: fx.Node | None = term.emit_rows(node.args[1], dtype, emit)
        if new is None:
            return  # the generic path serves: the whole table is dequantized
        self._replace(node, new)
        self.applied.dequantized[new] = site.name

    def _linear(self, site: Site, node: fx.Node, form: SiteForm) -> None:
        if any(term.parameter_shape != site.layout.shape for term in form.terms):
            return
        x = node.args[1] if node.target is aten.addmm.default else node.args[0]
        self._replace(node, self._product(site, node, x, dict(enumerate(form.terms))))

    def _product(self, site: Site, node: fx.Node, x: Any, terms: Mapping[int, WeightTerm]) -> fx.Node:
        """``aten.linear`` of ``x`` with the terms and the site's own bias, before ``node``."""
        bias = self.node_map[site.bias_node] if site.bias_node is not None else None
        return self.products.linear(site, node, x, bias, terms, _value_dtype(site.weight_value))

    def _split(self, site: Site, node: fx.Node, form: SiteForm) -> bool:
        """One product per part of a split activation, where the terms allow: integers and outliers apart."""
        quantizer, terms = form.activation, form.terms
        if not isinstance(quantizer, SplitQuantizer) or not terms:
            return False
        main, side = terms[0], terms[1:]
        if not isinstance(main, QuantizedWeight) or main.parameter_shape != site.layout.shape:
            return False
        found_at_run_time = isinstance(quantizer, OutlierSplit) and not side and main.batch_dims == 0
        chosen = (
            isinstance(quantizer, FixedOutliers)
            and len(side) == 1
            and isinstance(side[0], OutlierColumns)
            and torch.equal(side[0].columns, quantizer.columns)
        )
        if not found_at_run_time and not chosen:
            return False
        x, dtype = self._transformed(site, node, form)
        emit = GraphEmit(self.inputs, site.name, "activation", quantizer, node, x)
        coarse, fine = quantizer.split(x, dtype, emit)
        y = self._product(site, node, coarse, {0: main})
        if chosen:
            values = GraphEmit(self.inputs, site.name, "terms.1", side[0], node).tensor("values")
            target: Any = aten.linear.default
            args: tuple[Any, ...] = (fine, values)
        else:
            tensors = GraphEmit(self.inputs, site.name, "terms.0", main, node)
            zero = tensors.tensor("zero") if main.zero is not None else None
            packed = (tensors.tensor("codes"), tensors.tensor("scale"), zero)
            shape = (list(main.shape), list(main.perm))
            target = ops.outlier_product.default
            args = (fine, *packed, main.bits, main.group_size, *shape)
        with self.graph.inserting_before(node):
            beside = self.graph.call_function(target, args)
            new = self.graph.call_function(aten.add.Tensor, (y, beside))
        self._replace(node, new)
        return True

    def _looked_up(self, site: Site, form: SiteForm) -> None:
        """Apply the transforms of the contracted dimension to looked-up rows, whose last dimension it is."""
        node = self.node_map[site.node]
        users = list(node.users)
        new = self._transform(site.name, form, node, _value_dtype(site.node), node.next)
        self._redirect(node, users, new)

    def _bias(self, site: Site) -> None:
        """Replace a site's bias by that of its form, or add one."""
        node = self.node_map[site.node]
        if site.bias_node is None and site.kind is not SiteKind.LINEAR:
            raise BackendError(
                f"{site.name}: a {site.kind.value} site without a bias cannot be given one in this version."
            )
        bias = self.inputs.node(TensorRef(site.name, "bias"))
        with self.graph.inserting_before(node):
            bias = self.graph.call_function(aten.to.dtype, (bias, _value_dtype(site.node)))
        if site.bias_node is not None:
            node.replace_input_with(self.node_map[site.bias_node], bias)
            return

        users = list(node.users)
        with self.graph.inserting_before(node.next):
            new = self.graph.call_function(aten.add.Tensor, (node, bias))
        self._redirect(node, users, new)

    def _redirect(self, node: fx.Node, users: Sequence[fx.Node], new: fx.Node) -> None:
        """Let ``users`` and later rewrites read ``new`` instead of ``node``."""
        for user in users:
            user.replace_input_with(node, new)
        new.meta = dict(node.meta)
        for old, mapped in self.node_map.items():
            if mapped is node:
                self.node_map[old] = new

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        for old, mapped in self.node_map.items():
            if mapped is node:
                self.node_map[old] = new

    def _input(self, site: Site, node: fx.Node, form: SiteForm) -> None:
        """Insert input transforms and the activation quantizer before the site."""
        assert site.input is not None
        x = self.node_map[site.input]
        new, dtype = self._transformed(site, node, form)
        if form.activation is not None:
            emit = GraphEmit(self.inputs, site.name, "activation", form.activation, node, new)
            new = form.activation.emit(new, dtype, emit)
        if new is not x:
            node.args = tuple(
                new if argument is x and position == _input_position(node) else argument
                for position, argument in enumerate(node.args)
            )
            if node.target is aten.einsum.default:
                operands = tuple(new if operand is x else operand for operand in node.args[1])  # type: ignore[union-attr]
                node.args = (node.args[0], operands, *node.args[2:])

    def _transformed(self, site: Site, node: fx.Node, form: SiteForm) -> tuple[Any, torch.dtype]:
        """The site's input after its transforms, and its dtype."""
        assert site.input is not None
        dtype = _value_dtype(site.input)
        return self._transform(site.name, form, self.node_map[site.input], dtype, node), dtype

    def _transform(self, name: str, form: SiteForm, x: Any, dtype: torch.dtype, before: fx.Node) -> Any:
        """``x`` after the input transforms of a form."""
        for index, transform in enumerate(form.transform_in):
            emit = GraphEmit(self.inputs, name, f"transform_in.{index}", transform, before, x)
            x = transform.emit(x, dtype, emit)
        return x

    def _without_transforms(
        self, name: str, form: SiteForm, dense: fx.Node, dtype: torch.dtype, user: fx.Node
    ) -> Any:
        """The parameter's own value, for a use without an input to transform: ``terms · diag(factor)``."""
        layout = getattr(form.terms[0], "layout", None)
        turned = layout is not None and layout.perm == (1, 0)
        scales = all(isinstance(transform, Scale) for transform in form.transform_in)
        plain = turned or (layout is not None and layout.perm == (0, 1))
        if not scales or not plain or user in self.reads_form:
            raise BackendError(
                f"{name}: {user.target} reads the weight in a way that its input transforms"
                f" ({', '.join(t.describe() for t in form.transform_in)}) cannot be undone for.",
                fix="keep this weight out of the pass that transforms its input.",
            )

        def transposed(value: Any) -> Any:
            with self.graph.inserting_before(user):
                return self.graph.call_function(aten.t.default, (value,)) if turned else value

        return transposed(self._transform(name, form, transposed(dense), dtype, user))


_REMOVABLE = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.detach.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.alias.default,
}


def _input_position(node: fx.Node) -> int:
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        return 1
    return 1 if node.target is aten.einsum.default else 0


def _value_dtype(node: fx.Node) -> torch.dtype:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else torch.float32
