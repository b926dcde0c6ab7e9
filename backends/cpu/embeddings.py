"""Look-ups in quantized tables."""

from __future__ import annotations

import abc

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.cpu.generator import DTYPES, KernelForm
from fxcompress.backends.cpu.isa import Isa
from fxcompress.backends.cpu.kernel_types import LinearSpec
from fxcompress.backends.cpu.layouts import INT8_ROWS, Layout
from fxcompress.backends.cpu.native import ensure_kernel
from fxcompress.backends.cpu.tiled import TiledLayout, kernel_group, tiled_layout


class EmbeddingKernel(abc.ABC):
    """One way to look up rows of a quantized table.

    Attributes:
        layout: How it wants the table to lie; a tied product that wants the same shares it.
    """

    layout: Layout

    @abc.abstractmethod
    def refuses(self, spec: LinearSpec) -> str | None:
        """Why the kernel cannot serve a table (``rows`` entries of ``columns``), or None when it can."""

    @abc.abstractmethod
    def run(self, indices: Tensor, packed: dict[str, Tensor], spec: LinearSpec) -> Tensor:
        """Rows ``[..., columns]`` in ``spec.dtype``."""


class GeneratedEmbedding(EmbeddingKernel):
    """Rows decoded from the tiles.

    Args:
        isa: Instruction set to generate for.
    """

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.layout: TiledLayout = tiled_layout(isa)

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`EmbeddingKernel.refuses`."""
        if spec.dtype not in DTYPES:
            return f"the table's dtype is {spec.dtype}"
        return ensure_kernel(self.form(spec), self.isa)

    def run(self, indices: Tensor, packed: dict[str, Tensor], spec: LinearSpec) -> Tensor:
        """See :meth:`EmbeddingKernel.run`."""
        rows: Tensor = torch.ops.fxcompress_cpu.embedding(
            indices,
            packed["weight"],
            packed["scale"],
            packed.get("zero"),
            packed["total"],
            spec.columns,
            self.form(spec).call_number(self.isa, kernel_group(spec.group_size, spec.columns)),
        )
        return rows

    @staticmethod
    def form(spec: LinearSpec) -> KernelForm:
        """The kernel form of a table."""
        dtype = DTYPES[spec.dtype]
        grouped = spec.group_size > 0
        return KernelForm("embedding", spec.bits, not spec.symmetric, grouped, None, 0, dtype, dtype)


class RowsEmbedding(EmbeddingKernel):
    """Rows of the int8 row layout, by ATen."""

    layout = INT8_ROWS

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`EmbeddingKernel.refuses`. Narrow codes would be widened to bytes and kept so."""
        return None if spec.per_row and spec.bits > 4 else "not one scale per row of wide codes"

    def run(self, indices: Tensor, packed: dict[str, Tensor], spec: LinearSpec) -> Tensor:
        """See :meth:`EmbeddingKernel.run`."""
        rows = F.embedding(indices, packed["values"]).float() * packed["scale"][indices].unsqueeze(-1)
        if "offset" in packed:
            rows = rows + packed["offset"][indices].unsqueeze(-1)
        return rows.to(spec.dtype)
