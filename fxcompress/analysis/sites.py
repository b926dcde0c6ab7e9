"""Weight sites: every use of every matrix parameter, classified by the op that consumes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.analysis.weight_uses import WeightUse, weight_uses
from fxcompress.capture.program import Program
from fxcompress.forms import WeightLayout

__all__ = ["Site", "SiteKind", "find_sites", "sites_by_parameter"]

aten = torch.ops.aten

_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_EMBEDDINGS = {aten.embedding.default}
_GROUPED_MATMULS = frozenset(
    {"aten::_grouped_mm", "transformers::grouped_mm_fallback", "transformers::grouped_mm"}
)


def find_sites(program: Program) -> list[Site]:
    """All weight sites of a program, in graph order; uses that only a dense weight serves have kind OTHER."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    sites = [_classify(program, use) for use in weight_uses(program)]
    return sorted(sites, key=lambda site: (order[site.node], order[site.weight]))


def sites_by_parameter(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Group sites by parameter name, graph order kept."""
    grouped: dict[str, list[Site]] = {}
    for site in sites:
        grouped.setdefault(site.name, []).append(site)
    return grouped


def _classify(program: Program, use: WeightUse) -> Site:
    node = use.node
    if node.op == "call_function":
        handler = _handler(node)
        if handler is not None:
            site = handler(program, use)
            if site is not None:
                return site
    return _other(program, use, f"consumed by {_describe(node)}, which only a dense weight serves")


def _handler(node: fx.Node) -> Callable[[Program, WeightUse], Site | None] | None:
    target = node.target
    if target is aten.linear.default:
        return _linear
    if target is aten.addmm.default:
        return _addmm
    if target in (aten.mm.default, aten.matmul.default, aten.bmm.default):
        return _matmul
    if target is aten.baddbmm.default:
        return _baddbmm
    if target is aten.einsum.default:
        return _einsum
    if target in _EMBEDDINGS:
        return _embedding
    if target in _CONVOLUTIONS or target in _TRANSPOSED or target is aten.convolution.default:
        return _convolution
    if isinstance(target, torch._ops.OpOverload) and target.name().split(".")[0] in _GROUPED_MATMULS:
        return _grouped
    return None


def _make(
    program: Program,
    use: WeightUse,
    kind: SiteKind,
    layout: WeightLayout,
    activation: fx.Node | None,
    bias: object = None,
    reason: str = "",
) -> Site:
    bias_node = bias if isinstance(bias, fx.Node) else None
    bias_name = None
    source = bias_node
    while (
        source is not None
        and source.op == "call_function"
        and source.args
        and isinstance(source.args[0], fx.Node)
    ):
        source = source.args[0]
    if source is not None and source.op == "placeholder":
        bias_name = program.weight_of.get(source.name)
    return Site(
        use.name,
        kind,
        use.node,
        use.weight,
        use.value,
        use.chain,
        layout,
        activation,
        bias_name,
        bias_node,
        reason,
    )


def _layout(program: Program, use: WeightUse, rows: Sequence[int], columns: Sequence[int]) -> WeightLayout:
    """Layout from dimensions of ``use.value`` that are rows and columns; everything else is batch."""
    shape = tuple(program.weights[use.name].shape)
    row_dims = [use.dims[d] for d in rows]
    column_dims = [use.dims[d] for d in columns]
    batch = [d for d in range(len(shape)) if d not in row_dims and d not in column_dims]
    return WeightLayout(shape, (*batch, *row_dims, *column_dims), len(batch), len(row_dims))


def _linear(program: Program, use: WeightUse) -> Site | None:
    node = use.node
    if node.args[1] is not use.value or node.args[0] is use.value or len(use.dims) != 2:
        return None
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    kind = SiteKind.EXPERTS if use.selected else SiteKind.LINEAR
    return _make(program, use, kind, _layout(program, use, [0], [1]), _node(node.args[0]), bias)


def _addmm(program: Program, use: WeightUse) -> Site | None:
    node = use.node
    if node.args[2] is not use.value or node.kwargs:
        return None
    return _make(
        program, use, SiteKind.LINEAR, _layout(program, use, [1], [0]), _node(node.args[1]), node.args[0]
    )


def _matmul(program: Program, use: WeightUse) -> Site | None:
    node = use.node
    rank = len(use.dims)
    if node.args[1] is not use.value or node.args[0] is use.value:
        return None
    layout = _layout(program, use, [rank - 1], [rank - 2])
    kind = (
        SiteKind.LINEAR if layout.batch_dims == 0 else SiteKind.EXPERTS if use.selected else SiteKind.BATCHED
    )
    return _make(program, use, kind, layout, _node(node.args[0]))


def _baddbmm(program: Program, use: WeightUse) -> Site | None:
    node = use.node
    if node.args[2] is not use.value or node.kwargs:
        return None
    return _make(
        program, use, SiteKind.BATCHED, _layout(program, use, [2], [1]), _node(node.args[1]), node.args[0]
    )


def _einsum(program: Program, use: WeightUse) -> Site | None:
    equation, operands = str(use.node.args[0]).replace(" ", ""), use.node.args[1]
    if (
        "->" not in equation
        or "." in equation
        or not isinstance(operands, list | tuple)
        or len(operands) != 2
    ):
        return None
    terms, output = equation.split("->")
    subscripts = terms.split(",")
    position = 0 if operands[0] is use.value else 1
    other = operands[1 - position]
    if other is use.value or not isinstance(other, fx.Node):
        return None
    mine, theirs = subscripts[position], subscripts[1 - position]
    rows = [i for i, letter in enumerate(mine) if letter in output and letter not in theirs]
    columns = [i for i, letter in enumerate(mine) if letter in theirs and letter not in output]
    if not rows or not columns:
        return None
    return _make(program, use, SiteKind.EINSUM, _layout(program, use, rows, columns), other)


def _embedding(program: Program, use: WeightUse) -> Site | None:
    node = use.node
    if node.args[0] is not use.value or len(use.dims) != 2:
        return None
    return _make(program, use, SiteKind.EMBEDDING, _layout(program, use, [0], [1]), _node(node.args[1]))


def _convolution(program: Program, use: WeightUse) -> Site | None:
    node = use.node
    if node.args[1] is not use.value or node.args[0] is use.value:
        return None
    transposed = node.target in _TRANSPOSED or (
        node.target is aten.convolution.default and bool(node.args[6])
    )
    rank = len(use.dims)
    rows = [1] if transposed else [0]
    columns = [d for d in range(rank) if d not in rows]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    kind = SiteKind.CONV_TRANSPOSED if transposed else SiteKind.CONV
    return _make(program, use, kind, _layout(program, use, rows, columns), _node(node.args[0]), bias)


def _grouped(program: Program, use: WeightUse) -> Site | None:
    node = use.node
    if len(use.dims) != 3 or len(node.args) < 2 or node.args[1] is not use.value:
        return None
    return _make(program, use, SiteKind.EXPERTS, _layout(program, use, [2], [1]), _node(node.args[0]))


def _other(program: Program, use: WeightUse, reason: str) -> Site:
    layout = WeightLayout.rows(program.weights[use.name].shape)
    return _make(program, use, SiteKind.OTHER, layout, None, reason=reason)


def _node(value: object) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _describe(node: fx.Node) -> str:
    target = node.target
    return target.name() if isinstance(target, torch._ops.OpOverload) else str(target)
