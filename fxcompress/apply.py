"""Apply edits to a graph: from (Program, CompressionState) to a standard quantize/dequantize graph.

    linear(x, W)  →  linear(dequantize(quantize(T_in(x))), dequantize_weight(codes, scale, zero))

Any consumer works, since the dequantized weight has the parameter's own shape; backends fuse what they know.
Sites of kind LINEAR are brought to one spelling, ``aten.linear`` with an ``[N, K]`` weight, whatever they
were.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import fxcompress.ops  # noqa: F401  (registers the operators)
from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.analysis.sites import find_sites
from fxcompress.capture.program import Program
from fxcompress.compat import fake_mode_of
from fxcompress.edits import CompressionState
from fxcompress.errors import BackendError
from fxcompress.forms import (
    DynamicPerToken,
    QuantizedWeight,
    Scale,
    Shift,
    SiteForm,
    StaticPerTensor,
    Transform,
    WeightTerm,
    same_transform,
)

ops = torch.ops.fxcompress
aten = torch.ops.aten


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a form that a graph takes as input: ``path`` inside the SiteForm of parameter ``name``."""

    name: str
    path: str


@dataclass
class AppliedGraph:
    """A rewritten graph.

    Args:
        module: The graph; placeholders are those of the program (unused weights removed) plus form tensors.
        program: The program it was made from (names and inputs).
        form_inputs: Placeholder name → the form tensor it takes.
        dequantized: ``dequantize_weight``/``quantized_embedding`` node → parameter name.
    """

    module: fx.GraphModule
    program: Program
    form_inputs: dict[str, TensorRef] = field(default_factory=dict)
    dequantized: dict[fx.Node, str] = field(default_factory=dict)


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
    applied = AppliedGraph(module, program)
    rewriter = _Rewriter(applied, state, node_map)
    for site in find_sites(program) if sites is None else sites:
        rewriter.rewrite(site)
    rewriter.finish(program)
    _annotate(graph)
    graph.lint()
    module.recompile()
    return applied


def _annotate(graph: fx.Graph) -> None:
    """Give the inserted nodes the ``meta["val"]`` that every node of a graph has."""
    mode = fake_mode_of([node.meta.get("val") for node in graph.nodes])
    if mode is None:
        return

    def value(node: fx.Node) -> object:
        val = node.meta["val"]
        if isinstance(val, torch.Tensor) and val.device.type == "meta":
            val = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype)
        return val

    with mode, torch.no_grad():
        for node in graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                node.meta["val"] = node.target(*args, **kwargs)


class _Rewriter:
    def __init__(
        self, applied: AppliedGraph, state: CompressionState, node_map: dict[fx.Node, fx.Node]
    ) -> None:
        self.applied = applied
        self.graph = applied.module.graph
        self.state = state
        self.node_map = node_map
        self.activations: dict[tuple[object, ...], fx.Node] = {}
        self.form_nodes: dict[TensorRef, fx.Node] = {}
        self.transformed: list[tuple[fx.Node, Transform, fx.Node]] = []  # value, transform, result

    def rewrite(self, site: Site) -> None:
        form = self.state.forms.get(site.name)
        if form is None:
            return
        node = self.node_map[site.node]
        if site.takes_activation:
            self._input(site, node, form)
        if form.terms:
            if (
                site.kind is SiteKind.EMBEDDING
                and isinstance(form.terms[0], QuantizedWeight)
                and len(form.terms) == 1
            ):
                self._embedding(site, node, form.terms[0])
            elif site.kind is SiteKind.LINEAR:
                self._linear(site, node, form)
            # every other use reads the dequantized parameter: see finish()
        if form.transform_in and site.kind is SiteKind.EMBEDDING:
            self._looked_up(site, form)
        if form.bias is not None:
            self._bias(site)
        if form.transform_out:
            raise BackendError(f"{site.name}: output transforms are not representable in this version.")

    def finish(self, program: Program) -> None:
        """Give remaining uses of a compressed parameter its dequantized value; drop unread weights."""
        for placeholder in program.placeholders():
            name = program.weight_of.get(placeholder.name)
            if name is None or not self.state.is_compressed(name):
                continue
            node = self.node_map[placeholder]
            for user in list(node.users):
                dense = self._dense(name, self.state.forms[name].terms, program.weights[name].dtype, user)
                user.replace_input_with(node, dense)
        for node in reversed(list(self.graph.nodes)):
            unread = not node.users and node.op != "output"
            is_weight = node.op == "placeholder" and node.name in program.weight_of
            movable = node.op == "call_function" and node.target in _REMOVABLE
            if unread and (is_weight or movable):
                self.graph.erase_node(node)

    def _embedding(self, site: Site, node: fx.Node, term: QuantizedWeight) -> None:
        codes, scale, zero = self._term_inputs(site.name, 0, term)
        columns = term.layout.matrix_shape[2]
        dtype = _value_dtype(site.weight_value)
        if term.layout.perm != (0, 1):
            return  # stored transposed: rows are not contiguous, the generic path serves
        with self.graph.inserting_before(node):
            new = self.graph.call_function(
                ops.quantized_embedding.default,
                (node.args[1], codes, scale, zero, term.bits, term.group_size, columns, dtype),
            )
        self._replace(node, new)
        self.applied.dequantized[new] = site.name

    def _linear(self, site: Site, node: fx.Node, form: SiteForm) -> None:
        if any(term.parameter_shape != site.layout.shape for term in form.terms):
            return
        bias = self.node_map[site.bias_node] if site.bias_node is not None else None
        dtype = _value_dtype(site.weight_value)
        weight = self._dense(site.name, form.terms, dtype, node)
        if site.layout.perm != (0, 1):
            with self.graph.inserting_before(node):
                weight = self.graph.call_function(aten.t.default, (weight,))
        x = node.args[1] if node.target is aten.addmm.default else node.args[0]
        with self.graph.inserting_before(node):
            new = self.graph.call_function(
                aten.linear.default, (x, weight, *(() if bias is None else (bias,)))
            )
        self._replace(node, new)

    def _looked_up(self, site: Site, form: SiteForm) -> None:
        """Apply the transforms of the contracted dimension to looked-up rows, whose last dimension it is."""
        node = self.node_map[site.node]
        users = list(node.users)
        self._redirect(node, users, self._transformed(site, form, node, node.next))

    def _bias(self, site: Site) -> None:
        """Replace a site's bias by that of its form, or add one."""
        node = self.node_map[site.node]
        if site.bias_node is None and site.kind is not SiteKind.LINEAR:
            raise BackendError(
                f"{site.name}: a {site.kind.value} site without a bias cannot be given one in this version."
            )
        bias = self._form_input(TensorRef(site.name, "bias"))
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
        new = self._transformed(site, form, x, node)
        new = self._quantize(site, node, new, form)
        if new is not x:
            node.args = tuple(
                new if argument is x and position == _input_position(node) else argument
                for position, argument in enumerate(node.args)
            )
            if node.target is aten.einsum.default:
                operands = tuple(new if operand is x else operand for operand in node.args[1])  # type: ignore[union-attr]
                node.args = (node.args[0], operands, *node.args[2:])

    def _transformed(self, site: Site, form: SiteForm, x: fx.Node, before: fx.Node) -> fx.Node:
        """``x`` after the input transforms; sites that transform the same value alike share the result."""
        dtype = _value_dtype(site.input if site.input is not None and site.takes_activation else site.node)
        for index, transform in enumerate(form.transform_in):
            known = [
                result
                for source, other, result in self.transformed
                if source is x and same_transform(transform, other)
            ]
            if known:
                x = known[0]
                continue
            if type(transform) not in _TRANSFORMS:
                raise BackendError(
                    f"{site.name}: {transform.kind} transforms are not representable in this version."
                )
            field_name, target = _TRANSFORMS[type(transform)]
            value = self._form_input(TensorRef(site.name, f"transform_in.{index}.{field_name}"))
            with self.graph.inserting_before(before):
                cast = self.graph.call_function(aten.to.dtype, (value, dtype))
                result = self.graph.call_function(target, (x, cast))
            self.transformed.append((x, transform, result))
            x = result
        return x

    def _quantize(self, site: Site, node: fx.Node, x: fx.Node, form: SiteForm) -> fx.Node:
        quantizer = form.activation
        if quantizer is None:
            return x
        dtype = _value_dtype(site.input) if site.input is not None else torch.float32
        if isinstance(quantizer, DynamicPerToken):
            key = ("dynamic", x, quantizer.bits)
            pair = self._shared(key, node, ops.quantize_per_token.default, (x, quantizer.bits))
            q = self._shared((*key, 0), node, operator.getitem, (pair, 0))
            scale = self._shared((*key, 1), node, operator.getitem, (pair, 1))
            return self._shared(
                (*key, "dq"), node, ops.dequantize_activation.default, (q, scale, None, dtype)
            )
        if isinstance(quantizer, StaticPerTensor):
            static = ("static", x, quantizer.bits, float(quantizer.scale), int(quantizer.zero))
            scale = self._form_input(TensorRef(site.name, "activation.scale"))
            zero = self._form_input(TensorRef(site.name, "activation.zero"))
            q = self._shared(static, node, ops.quantize_per_tensor.default, (x, scale, zero, quantizer.bits))
            return self._shared(
                (*static, "dq"), node, ops.dequantize_activation.default, (q, scale, zero, dtype)
            )
        raise BackendError(
            f"{site.name}: activation quantizer {quantizer.kind!r} has no graph representation."
        )

    def _shared(
        self, key: tuple[object, ...], before: fx.Node, target: object, args: tuple[object, ...]
    ) -> fx.Node:
        """Create a node once per key; sites with the same input share their quantizer."""
        if key not in self.activations:
            with self.graph.inserting_before(before):
                self.activations[key] = self.graph.call_function(target, args)  # type: ignore[arg-type]
        return self.activations[key]

    def _dense(self, name: str, terms: Sequence[WeightTerm], dtype: torch.dtype, before: fx.Node) -> fx.Node:
        """The dequantized weight, computed right before its use so that it lives no longer than needed."""
        total: fx.Node | None = None
        for index, term in enumerate(terms):
            if not isinstance(term, QuantizedWeight):
                raise BackendError(f"{name}: weight term {term.kind!r} has no graph representation.")
            codes, scale, zero = self._term_inputs(name, index, term)
            options = (list(term.shape), list(term.perm), term.batch_dims, term.row_dims, dtype)
            with self.graph.inserting_before(before):
                part = self.graph.call_function(
                    ops.dequantize_weight.default, (codes, scale, zero, term.bits, term.group_size, *options)
                )
                self.applied.dequantized[part] = name
                total = part if total is None else self.graph.call_function(aten.add.Tensor, (total, part))
        if total is None:
            raise BackendError(f"{name}: the form has no weight terms.")
        return total

    def _term_inputs(
        self, name: str, index: int, term: QuantizedWeight
    ) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        codes = self._form_input(TensorRef(name, f"terms.{index}.codes"))
        scale = self._form_input(TensorRef(name, f"terms.{index}.scale"))
        zero = self._form_input(TensorRef(name, f"terms.{index}.zero")) if term.zero is not None else None
        return codes, scale, zero

    def _form_input(self, ref: TensorRef) -> fx.Node:
        if ref not in self.form_nodes:
            with self.graph.inserting_before(self._first_node()):
                node = self.graph.placeholder(f"form_{len(self.form_nodes)}")
            node.meta["val"] = form_tensor(self.state, ref).to("meta")
            self.form_nodes[ref] = node
            self.applied.form_inputs[node.name] = ref
        return self.form_nodes[ref]

    def _first_node(self) -> fx.Node:
        first: fx.Node = next(iter(self.graph.nodes))
        return first


# Transform → the field that holds its tensor, and the op that applies it.
_TRANSFORMS: dict[type[Transform], tuple[str, Any]] = {
    Scale: ("factor", aten.mul.Tensor),
    Shift: ("offset", aten.add.Tensor),
}

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


def form_tensor(state: CompressionState, ref: TensorRef) -> torch.Tensor:
    """The tensor a :class:`TensorRef` names."""
    value: object = state.forms[ref.name]
    for step in ref.path.split("."):
        value = value[int(step)] if isinstance(value, tuple) else getattr(value, step)
    if not isinstance(value, torch.Tensor):
        raise BackendError(f"{ref.name}: {ref.path} is no tensor of its form.")
    return value


def _input_position(node: fx.Node) -> int:
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        return 1
    return 1 if node.target is aten.einsum.default else 0


def _value_dtype(node: fx.Node) -> torch.dtype:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else torch.float32
