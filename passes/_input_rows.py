"""The rows that a site multiplies with each of its matrices, as ``(first matrix, [M, T, K])``.

For a linear layer those are simply its tokens. Here are the sites where they are not: convolutions (windows
of the input), batched products and experts (every matrix has rows of its own) and einsums (the contracted
dimensions are anywhere). Columns come in the order of ``site.layout``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.pass_base import BlockContext

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of some matrices of a site.

    Args:
        values: ``[M, T, K]``.
        first: Index of the first of the M matrices; None: the rows meet *every* matrix of the site (M = 1).
    """

    values: Tensor
    first: int | None


def matrix_count(site: Site) -> int:
    """How many independent matrices a site has: entries of its batch, or the groups of a convolution."""
    if site.kind is SiteKind.CONV:
        return int(arguments(site.node)["groups"])
    return site.layout.matrix_shape[0]


def unsupported(site: Site) -> str | None:
    """Why the rows of this site cannot be told apart, or None."""
    if site.kind in (SiteKind.EMBEDDING, SiteKind.OTHER) or site.input is None:
        return site.reason or "it is not multiplied with an activation"
    if site.layout.batch_dims > 1:
        return "its matrices are indexed by more than one dimension"
    if site.kind is SiteKind.EINSUM and _einsum_order(site) is None:
        return f"the einsum {site.node.args[0]!r} is not a plain product"
    return None


def site_rows(block: BlockContext, site: Site) -> Iterator[Rows]:
    """Rows of every calibration batch. The site must be supported, see :func:`unsupported`."""
    offsets = arguments(site.node).get("offs") if site.kind is SiteKind.EXPERTS else None
    if isinstance(offsets, fx.Node):
        ends = block.batches(dataclasses.replace(site, input=offsets))
        for x, bounds in zip(block.batches(site), ends, strict=True):
            yield from _routed(x, bounds)
        return
    expert = _selected(site) if site.kind is SiteKind.EXPERTS else None
    for x in block.batches(site):
        if site.kind is SiteKind.CONV:
            yield Rows(convolution_rows(site, x), 0)
        elif site.kind is SiteKind.CONV_TRANSPOSED:
            yield Rows(transposed_rows(site, x), None)
        elif site.kind is SiteKind.EINSUM:
            yield _einsum_rows(site, x)
        elif site.kind is SiteKind.LINEAR or expert is not None:
            yield Rows(x.reshape(1, -1, x.shape[-1]), expert)
        else:
            yield _batched_rows(x, site.layout.matrix_shape[0])


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an op by name, defaults filled in; empty when the node is no op with a schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    schema = node.target._schema.arguments
    found = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    found.update(zip((argument.name for argument in schema), node.args, strict=False))
    found.update(node.kwargs)
    return found


def _routed(x: Tensor, ends: Tensor) -> Iterator[Rows]:
    """Rows sorted by expert: ``x: [T, K]``, expert e has rows ``ends[e-1]…ends[e]``."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield Rows(x[None, start:end], expert)
        start = max(start, int(end))


def _selected(site: Site) -> int | None:
    """The expert that indexing in front of the op picked, when it is a constant."""
    for node in site.chain:
        index = node.args[2] if node.target is aten.select.int else None
        if isinstance(index, int):
            return index % site.layout.matrix_shape[0]
    return None


def _batched_rows(x: Tensor, matrices: int) -> Rows:
    if x.dim() >= 3 and x.shape[-3] == matrices:
        return Rows(x.movedim(-3, 0).reshape(matrices, -1, x.shape[-1]), 0)
    return Rows(x.reshape(1, -1, x.shape[-1]), None)


def convolution_rows(site: Site, x: Tensor) -> Tensor:
    """Windows of a convolution's input ``[B, I, *S]``: ``[groups, T, I/groups · window]``."""
    given = arguments(site.node)
    kernel = site.layout.permuted_shape[2:]
    dilation = _per_dimension(given["dilation"], len(kernel))
    padding = given["padding"]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _per_dimension(padding, len(kernel))]
    windows = _windows(
        _with_batch(x, kernel), kernel, _per_dimension(given["stride"], len(kernel)), sides, dilation
    )
    groups = int(given["groups"])
    return windows.reshape(len(windows), groups, -1).movedim(1, 0)


def transposed_rows(site: Site, x: Tensor) -> Tensor:
    """What a transposed convolution multiplies for each output position: ``[1, T, I · window]``.

    It equals a plain convolution, with the kernel reversed, of the input spread ``stride`` apart. Its groups
    read separate input channels for separate outputs that share their rows, so every group has rows of its
    own, zero outside the group.
    """
    given = arguments(site.node)
    kernel = site.layout.permuted_shape[2:]
    rank = len(kernel)
    stride, dilation = _per_dimension(given["stride"], rank), _per_dimension(given["dilation"], rank)
    padding, extra = _per_dimension(given["padding"], rank), _per_dimension(given["output_padding"], rank)
    x = _with_batch(x, kernel)
    size = [(s - 1) * step + 1 for s, step in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *size)
    spread[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = x
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    sides = [(r, r + e) for r, e in zip(reach, extra, strict=True)]
    windows = _windows(spread, kernel, [1] * rank, sides, dilation)  # [T, I, *kernel]
    windows = windows.flip(tuple(range(2, 2 + rank)))
    groups = int(given["groups"])
    parts = windows.reshape(len(windows), groups, -1)  # [T, groups, I/groups · window]
    if groups == 1:
        return parts.movedim(1, 0)
    own = torch.eye(groups, dtype=x.dtype, device=x.device)
    return torch.einsum("tgk,gh->gthk", parts, own).reshape(1, groups * len(windows), -1)


def _windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    sides: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """``[B, C, *S]`` → ``[B · positions, C, *kernel]``."""
    rank = len(kernel)
    x = F.pad(x, [side for pair in reversed(sides) for side in pair])
    for d in range(rank):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
    positions = list(range(2, 2 + rank))  # x: [B, C, *positions, *kernel]
    x = x.permute(0, *positions, 1, *range(2 + rank, 2 + 2 * rank))
    return x.reshape(-1, x.shape[1 + rank], *kernel)


def _with_batch(x: Tensor, kernel: Sequence[int]) -> Tensor:
    return x.unsqueeze(0) if x.dim() == len(kernel) + 1 else x


def _per_dimension(value: int | Sequence[int], rank: int) -> list[int]:
    given = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (given * rank if len(given) == 1 else given)]


def _einsum_order(site: Site) -> tuple[list[str], str, str, str] | None:
    """``(activation's subscripts, batch, free, contracted)``, or None when it is no plain product."""
    equation, operands = site.node.args[0], site.node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list | tuple) or len(operands) != 2:
        return None
    terms, output = equation.replace(" ", "").split("->")
    subscripts = terms.split(",")
    position = list(operands).index(site.weight_value)
    mine, theirs = subscripts[position], subscripts[1 - position]
    contracted = "".join(letter for letter in mine if letter in theirs and letter not in output)
    batch = "".join(letter for letter in mine if letter in theirs and letter in output)
    free = "".join(letter for letter in theirs if letter not in mine)
    repeated = any(len(set(part)) != len(part) for part in subscripts)
    if repeated or len(batch) != site.layout.batch_dims or any(letter not in output for letter in free):
        return None
    return list(theirs), batch, free, contracted


def _einsum_rows(site: Site, x: Tensor) -> Rows:
    order = _einsum_order(site)
    assert order is not None  # see unsupported()
    letters, batch, free, contracted = order
    x = x.permute([letters.index(letter) for letter in batch + free + contracted])
    matrices = math.prod(x.shape[: len(batch)])
    columns = math.prod(x.shape[len(batch) + len(free) :])
    return Rows(x.reshape(matrices, -1, columns), 0 if batch else None)
