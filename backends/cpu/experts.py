"""Products with several matrices at once: experts with rows of their own, batched products.

    grouped_mm(x, transpose(dequantize_weight(codes, …)), ends)  →  fxcompress_cpu::experts(x, packed, ends)

``x: [T, K]`` holds the rows of one expert after those of another. The kernel of a linear layer runs for every
expert that has rows, so that the weights of others are not read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.backends.cpu.codebook import CodebookLinear, codebook_form, codebook_layout, table_group
from fxcompress.backends.cpu.generated import GeneratedLinear, linear_form
from fxcompress.backends.cpu.isa import Isa
from fxcompress.backends.cpu.kernel_types import Kernel, LinearSpec, QuantizedInput
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.cpu.tiled import kernel_group, tiled_layout
from fxcompress.forms import CodebookWeight, QuantizedWeight

aten = torch.ops.aten
_GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback", "transformers::grouped_mm"})
_TRANSPOSES = (aten.transpose.int, aten.mT.default)


class ExpertsLayout(Layout):
    """Every matrix as another layout has it, stacked: each packed tensor gets a dimension E in front.

    Args:
        inner: Of one matrix.
    """

    def __init__(self, inner: Layout) -> None:
        self.inner = inner

    @property
    def name(self) -> str:  # type: ignore[override]
        """See :class:`Layout`."""
        return f"experts-{self.inner.name}"

    def pack(self, terms: Sequence[Any]) -> dict[str, Tensor]:
        """See :meth:`Layout.pack`; one term."""
        (term,) = terms
        packed = [self.inner.pack([matrix]) for matrix in matrices(term)]
        return {name: torch.stack([each[name] for each in packed]) for name in packed[0]}


@functools.cache
def experts_layout(inner: Layout) -> ExpertsLayout:
    """The one layout object around another."""
    return ExpertsLayout(inner)


def matrices(term: QuantizedWeight | CodebookWeight) -> list[Any]:
    """The term's matrices as terms of their own, ``[N, K]``."""
    batch, rows, columns = term.layout.matrix_shape
    plain: dict[str, Any] = {"shape": (rows, columns), "perm": (0, 1), "batch_dims": 0, "row_dims": 1}
    parts = {name: tensor for name, tensor in term.tensors().items() if tensor.shape[0] == batch}
    return [
        dataclasses.replace(term, **plain | {name: part[i : i + 1] for name, part in parts.items()})
        for i in range(batch)
    ]


@dataclass(frozen=True)
class ExpertsPlan:
    """How one such product is computed.

    Args:
        layout: Of the packed weight.
        spec: Of one matrix.
        position: Of the codes among the block's inputs.
        number: The operator's ``form``.
        text: What ``explain()`` says.
    """

    layout: ExpertsLayout
    spec: LinearSpec
    position: int
    number: int
    text: str


def weight_of_experts(node: fx.Node, dequantize: Sequence[Any]) -> fx.Node | None:
    """The node that dequantizes the matrices a grouped or batched product multiplies with, or None.

    Args:
        node: Any node.
        dequantize: Operators that dequantize.
    """
    grouped = isinstance(node.target, torch._ops.OpOverload) and node.target.name() in _GROUPED
    if not grouped and node.target is not aten.bmm.default:
        return None
    if grouped and _ends(node) is None:
        return None
    weight, turned = node.args[1], False
    if isinstance(weight, fx.Node) and weight.target in _TRANSPOSES:
        dims = sorted(int(d) % 3 for d in weight.args[1:])  # type: ignore[arg-type]
        turned, weight = dims in ([], [1, 2]), weight.args[0]
        if not turned:
            return None
    if not isinstance(weight, fx.Node) or weight.target not in dequantize:
        return None
    _, _, _, _, _, shape, perm, batch_dims, row_dims, _ = weight.args
    wanted = (0, 1, 2) if turned else (0, 2, 1)  # the operand is [E, K, N], rows of a matrix are outputs
    fits = len(shape) == 3 and tuple(perm) == wanted and (batch_dims, row_dims) == (1, 1)  # type: ignore[arg-type]
    return weight if fits else None


def _ends(node: fx.Node) -> fx.Node | None:
    """Where the rows of every expert end; None when a grouped product is given more than that."""
    given = [*node.args[2:], *node.kwargs.values()]
    (ends, *more) = given or (None,)
    return ends if isinstance(ends, fx.Node) and all(item is None for item in more) else None


def plan_experts(spec: LinearSpec, position: int, isa: Isa) -> tuple[ExpertsPlan | None, str]:
    """The plan for matrices of ``spec``, and what to say of it; None and the reason when no kernel serves."""
    kernel: Kernel = GeneratedLinear(isa) if spec.table is None else CodebookLinear(isa)
    reason = kernel.refuses(spec)
    if reason is not None:
        return None, f"{kernel.name}: {reason.splitlines()[0]}"
    text = f"{kernel.describe(spec)}, only experts with tokens"
    if spec.table is None:
        inner: Layout = tiled_layout(isa)
        number = linear_form(spec).call_number(isa, kernel_group(spec.group_size, spec.columns))
    else:
        inner = codebook_layout(isa)
        number = codebook_form(spec).call_number(isa, table_group(spec.group_size, spec.columns))
    return ExpertsPlan(experts_layout(inner), spec, position, number, text), text


def run_experts(
    plan: ExpertsPlan,
    node: fx.Node,
    x: Tensor,
    quantized: QuantizedInput | None,
    packed: Mapping[str, Tensor],
    argument: Callable[[Any], Any],
) -> Tensor:
    """The product of a planned node.

    Args:
        plan: Its plan.
        node: The node.
        x: Its first operand.
        quantized: The same as it was quantized, or None.
        packed: Packed tensors.
        argument: Gives the value of a node's argument.
    """
    source = x if quantized is None or plan.spec.table is not None else quantized.source
    static = quantized is not None and plan.spec.activation == "static" and plan.spec.table is None
    batched = node.target is aten.bmm.default
    if batched:
        count, rows = source.shape[0], source.shape[1]
        ends = torch.arange(1, count + 1, dtype=torch.int32, device=source.device) * rows
    else:
        ends = argument(_ends(node)).to(torch.int32)
    y: Tensor = torch.ops.fxcompress_cpu.experts(
        source.reshape(-1, plan.spec.columns),
        *(packed["weight"], packed["scale"], packed.get("zero"), packed["total"], ends),
        quantized.scale.to(torch.float32) if static and quantized is not None else None,
        quantized.zero if static and quantized is not None else None,
        plan.number,
    )
    return y.view(*source.shape[:-1], plan.spec.rows) if batched else y
