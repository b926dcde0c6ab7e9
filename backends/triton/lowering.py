"""Lower one block for a CUDA device: generated kernels where there are any, elsewhere the graph as it is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

import fxcompress.backends.triton.operators  # noqa: F401  (registers the operators)
from fxcompress.backends.cpu import attention, cached_attention
from fxcompress.backends.cpu.lowering import LoweringInterpreter
from fxcompress.backends.cpu.planning import PackedInput, Plan
from fxcompress.backends.triton.attend import MOST_ROWS
from fxcompress.backends.triton.cache_form import AttendForm
from fxcompress.backends.triton.devices import Device
from fxcompress.backends.triton.linear_form import DTYPES
from fxcompress.backends.triton.operators import mask_kind
from fxcompress.backends.triton.patterns import Joined, gate_of, join_terms, norm_of
from fxcompress.backends.triton.row_forms import MOST_COLUMNS, QuantizeForm
from fxcompress.backends.triton.selection import Extra, GeneratedWords, call
from fxcompress.backends.triton.singles import DEQUANTIZERS, KINDS, small_float_form
from fxcompress.backends.triton.texts import text_of
from fxcompress.cache_record import from_text

logger = logging.getLogger("fxcompress.backends")
aten = torch.ops.aten
ops = torch.ops.fxcompress


class TritonInterpreter(LoweringInterpreter):
    """Run a block module on kernels for a device. Traced by make_fx.

    Args:
        module: The block.
        plan: Of its products with codes.
        packed: Their packed weights.
        device: What it runs on.
    """

    def __init__(
        self, module: fx.GraphModule, plan: Plan, packed: Mapping[PackedInput, Tensor], device: Device
    ) -> None:
        fx.Interpreter.__init__(self, module, garbage_collect_values=False)
        self.plan, self.packed, self.device = plan, packed, device
        self.results: dict[fx.Node, tuple[Tensor, ...]] = {}
        self.joined = _joined(module.graph, plan)
        self.inner = {node for found in self.joined.values() for node in found.inner}
        self.caches, skipped = _caches(module.graph)
        self.inner |= skipped

    def run_node(self, n: fx.Node) -> Any:
        """Kernels where there are any, the original op for others."""
        if n in self.inner:
            return None
        if n in self.joined:
            return self._sum_of_terms(n)
        if n in self.plan.members:
            return self._linear(n)
        if n in self.caches:
            return self._attend(n)
        for lower in (self._quantize, self._small_floats, self._single, self._semi_structured):
            found = lower(n)
            if found is not None:
                return found
        if self._reads_no_weight(n):
            return None
        return fx.Interpreter.run_node(self, n)

    def _sum_of_terms(self, node: fx.Node) -> Tensor:
        found = self.joined[node]
        kernel, spec = self.plan.kernels[found.main], self.plan.specs[found.main]
        assert isinstance(kernel, GeneratedWords)
        packed = self._packed(kernel.layout, (self.plan.codes[found.main],))
        x = self._value(cast("fx.Node", found.main.args[0]))
        tensors = {}
        for name, part in found.tensors.items():
            value = self._value(part)
            tensors[name] = value if name == "columns" else value.to(spec.dtype)
        return kernel.run(x, None, packed, spec, self._bias(found.main), Extra(tensors))

    def _attend(self, node: fx.Node) -> Tensor:
        update = self.caches[node]
        memory, length, key, value, _, text, capacity, _ = (self._argument(a) for a in update.args)
        query: Tensor = self._argument(node.args[0])
        mask = self._argument(attention.mask_of(node))
        if mask is not None:
            mask = mask if mask.dtype is torch.bool else mask.to(torch.float32)
            mask = mask if mask.dim() == 4 else mask[None, None]
        scale = attention.scale_of(node, query.shape[3])
        out: Tensor = torch.ops.fxcompress_triton.attend_cached(
            query, key, value, mask, memory, length, capacity, scale, text
        )
        return out

    def _quantize(self, node: fx.Node) -> tuple[Tensor, Tensor] | None:
        """A quantizer per token, with the gate or norm before it where that is all it reads."""
        integers = node.target is ops.quantize_per_token.default
        if not integers and node.target is not ops.quantize_float_per_token.default:
            return None
        source = cast("fx.Node", node.args[0])
        x: Tensor = self.env[source]
        width: Any = x.shape[-1]  # may be symbolic
        dtype = str(x.dtype).removeprefix("torch.")
        if dtype not in DTYPES or not isinstance(width, int) or width > MOST_COLUMNS:
            return None
        codes, bits = ("int8", int(cast("int", node.args[1]))) if integers else (KINDS[node.args[1]], 8)  # type: ignore[index]
        eps, others, kind = 0.0, [], "plain"
        gate, norm = gate_of(source), norm_of(source)
        if gate is not None:
            kind, x, others = "gate", self._value(gate[0]), [self._value(gate[1])]
        elif norm is not None:
            kind, x, eps = norm.kind, self._value(norm.x), norm.eps
            others = [self._value(tensor) for tensor in norm.tensors]
        form = text_of(QuantizeForm(kind, codes, bits, dtype))
        q, scale = torch.ops.fxcompress_triton.quantize(x, others, eps, form)
        return q, scale

    def _small_floats(self, node: fx.Node) -> Tensor | None:
        """``linear(dequantize(x codes), dequantize(weight codes))`` of 8-bit floats."""
        form = small_float_form(node, self.device)
        if form is None:
            return None
        x, weight = cast("tuple[fx.Node, fx.Node]", node.args[:2])
        q, x_scale = (self._value(cast("fx.Node", argument)) for argument in x.args[:2])
        codes, scale = (self._value(cast("fx.Node", argument)) for argument in weight.args[:2])
        named = {"w": codes[0], "scale": scale[0].t(), "x_scale": x_scale}
        bias = self._bias(node)
        if bias is not None:
            named["bias"] = bias
        return call(replace(form, bias=bias is not None), q, named, codes.shape[1])

    def _single(self, node: fx.Node) -> Tensor | None:
        """A product with a weight of another kind."""
        plan = self.plan.singles.get(node)
        if plan is None:
            return None
        x = self._value(cast("fx.Node", node.args[0]))
        return plan.run(x, self._packed(plan.layout, (plan.position,)), self._bias(node))

    def _semi_structured(self, node: fx.Node) -> Tensor | None:
        """2:4 weights in the order of CUTLASS run on torch's own operator."""
        if node.target is not aten.linear.default:
            return None
        weight = cast("fx.Node", node.args[1])
        if weight.target is not ops.semi_structured_dense.default or weight.meta["val"].device.type != "cuda":
            return None
        values, meta = (self._value(cast("fx.Node", argument)) for argument in weight.args[:2])
        x = self._value(cast("fx.Node", node.args[0]))
        rows = x.shape[:-1].numel() if all(isinstance(size, int) for size in x.shape[:-1]) else 0
        if x.dtype != values.dtype or rows == 0 or rows % 8:
            return None
        y: Tensor = aten._sparse_semi_structured_linear(x, values, meta, bias=self._bias(node))
        return y

    def _reads_no_weight(self, node: fx.Node) -> bool:
        """Whether a node only dequantizes what kernels read packed."""
        if node.target not in _DEQUANTIZERS or not node.users:
            return False
        return all(self._inside(user) for user in node.users)

    def _inside(self, user: fx.Node) -> bool:
        if user in self.plan.members or user in self.inner or user in self.plan.singles:
            return True
        return user.target is aten.t.default and bool(user.users) and all(map(self._inside, user.users))


_DEQUANTIZERS = (ops.dequantize_weight.default, ops.dequantize_codebook.default, *DEQUANTIZERS)


def _joined(graph: fx.Graph, plan: Plan) -> dict[fx.Node, Joined]:
    """Sums that one kernel computes: of products that are planned alone, with float activations."""
    found = {}
    for node in graph.nodes:
        joined = join_terms(node)
        if joined is None or joined.main not in plan.kernels or len(plan.groups[joined.main]) > 1:
            continue
        kernel = plan.kernels[joined.main]
        if isinstance(kernel, GeneratedWords) and kernel.form.activation is None:
            found[node] = joined
    return found


def _caches(graph: fx.Graph) -> tuple[dict[fx.Node, fx.Node], set[fx.Node]]:
    """Attention → the update of the packed cache that it alone reads; and the nodes in between."""
    found: dict[fx.Node, fx.Node] = {}
    skipped: set[fx.Node] = set()
    for node in graph.nodes:
        chain = cached_attention.chain(node, ("cpu", "cuda"))
        if chain is None:
            continue
        update, between = chain
        query, key = (cast("fx.Node", n).meta["val"] for n in (node.args[0], update.args[2]))
        mask = attention.mask_of(node)
        constants = cast("list[Any]", update.args[4])
        rows = query.shape[2] * query.shape[1] // key.shape[1] if isinstance(query.shape[2], int) else 0
        dtype = str(query.dtype).removeprefix("torch.")
        if constants or not 0 < rows <= MOST_ROWS:
            logger.info("%s: %s queries per key head; the cache is dequantized", node.name, rows or "many")
            continue
        kind = mask_kind(mask.meta["val"]) if isinstance(mask, fx.Node) else None
        form, problem = AttendForm.of(from_text(str(update.args[5]), []), dtype, kind)
        if form is None:
            logger.info("%s: %s; the cache is dequantized", node.name, problem)
            continue
        found[node] = update
        skipped |= {update, *between}
    return found, skipped
