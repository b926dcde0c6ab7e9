"""Kernels for codes that index a table: weight layout, which uses they serve, the operators they call."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.cpu.codebook_form import ROWS, CodebookForm
from fxcompress.backends.cpu.embeddings import EmbeddingKernel
from fxcompress.backends.cpu.epilogues import Epilogue
from fxcompress.backends.cpu.generated import product_with
from fxcompress.backends.cpu.generator import DTYPES
from fxcompress.backends.cpu.isa import Isa
from fxcompress.backends.cpu.kernel_types import EpilogueKernel, Kernel, LinearSpec, QuantizedInput
from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.cpu.native import ensure_kernel
from fxcompress.formats.packing import unpack_codes
from fxcompress.forms import CodebookWeight

_ALIGNED = 64  # bytes the tables are padded to


class CodebookLayout(Layout):
    """Tables and codes in one buffer, ordered for one instruction set (``templates/codebook_unpack.j2``).

    Packed tensors, for N outputs padded to whole blocks, K inputs and G groups, each padded to whole vectors:
    ``weight``: uint8, tables (float32 once, or bfloat16 per output), then ``[N / 8, chunks, 8·bits·lanes]``
    bits; ``scale: [N / 8, G, 8]``, bfloat16 for groups, else float32 (ones where the form has none);
    ``total: [N]``, zeros, whose size tells the operators N.

    Args:
        isa: The instruction set.
    """

    def __init__(self, isa: Isa) -> None:
        self.isa = isa

    @property
    def name(self) -> str:  # type: ignore[override]
        """See :class:`Layout`."""
        return f"codebook-{self.isa.lanes}"

    def pack(self, terms: Sequence[CodebookWeight]) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`Layout.pack`. Siblings with one table for all rows have the same one."""
        first = terms[0]
        columns = first.layout.matrix_shape[2]
        codes = torch.cat([unpack_codes(term.codes, term.bits, columns)[0] for term in terms])  # [N, K]
        rows = codes.shape[0]
        padding = -rows % self.isa.block
        codes = F.pad(codes, (0, 0, 0, padding))
        tables = torch.cat([term.table[0] for term in terms]) if first.per_row else first.table[0]
        tables = F.pad(tables, (0, 0, 0, padding)) if first.per_row else tables
        head = tables.contiguous().reshape(-1).view(torch.uint8)
        body = pack_columns(codes, first.bits, table_group(first.group_size, columns), self.isa.lanes)
        packed = {"weight": torch.cat([F.pad(head, (0, -len(head) % _ALIGNED)), body.flatten()])}
        scales = [torch.ones(1, rows, 1) if term.scale is None else term.scale for term in terms]
        scale = F.pad(torch.cat([part[0] for part in scales])[:rows], (0, 0, 0, padding))
        packed["scale"] = scale.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()
        packed["total"] = torch.zeros(rows)
        return packed


def table_group(group_size: int, columns: int) -> int:
    """Inputs that share a scale: the group, or the row."""
    return min(group_size, columns) if group_size > 0 else columns


def pack_columns(codes: Tensor, bits: int, group: int, lanes: int) -> Tensor:
    """Codes ``[N, K]`` uint8, N a multiple of 8, to ``[N / 8, chunks, bits · lanes]`` uint8.

    Every group is padded to whole chunks of ``lanes`` inputs.
    """
    parts = codes.split(group, dim=1)
    codes = torch.cat([F.pad(part, (0, -part.shape[1] % lanes)) for part in parts], dim=1)
    together = codes.unflatten(0, (-1, ROWS)).unflatten(2, (-1, lanes))  # [N / 8, 8, chunks, lanes]
    number = torch.zeros_like(together[:, 0], dtype=torch.int64)  # 8 · bits bits
    for row in range(ROWS):
        number |= together[:, row].to(torch.int64) << (bits * row)
    found, low = [], 0
    for width in (*[32] * (bits // 4), *[16] * (bits // 2 % 2), *[8] * (bits % 2)):
        dtype = {32: torch.int32, 16: torch.int16, 8: torch.uint8}[width]
        value = (number >> low) & ((1 << width) - 1)
        signed = value - ((value >> (width - 1)) << width) if width > 8 else value  # the same bits
        found.append(signed.to(dtype).view(torch.uint8))
        low += width
    return torch.cat(found, dim=-1)


@functools.cache
def codebook_layout(isa: Isa) -> CodebookLayout:
    """The one layout object of an instruction set."""
    return CodebookLayout(isa)


class CodebookLinear(EpilogueKernel):
    """Values selected in registers, few rows at memory speed; many rows from float panels in cache.

    Args:
        isa: Instruction set to generate for.
    """

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.name = f"generated {isa.name}"
        self.layout: CodebookLayout = codebook_layout(isa)

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`Kernel.refuses`. Compiles the kernel: only a kernel that exists is chosen."""
        if spec.dtype not in DTYPES:
            return f"activations are {spec.dtype}"
        return ensure_kernel(codebook_form(spec), self.isa)

    @staticmethod
    def form(spec: LinearSpec) -> CodebookForm:
        """The kernel form of a use."""
        return codebook_form(spec)

    def describe(self, spec: LinearSpec) -> str:
        """See :meth:`Kernel.describe`."""
        return f"{self.name} {codebook_form(spec).title.removeprefix('codebook-linear-')}"

    def layout_with(self, epilogue: Epilogue) -> Layout | None:
        """See :meth:`EpilogueKernel.layout_with`."""
        return None if epilogue.gated else self.layout

    def run_with(
        self,
        epilogue: Epilogue,
        x: Tensor,
        quantized: QuantizedInput | None,
        packed: dict[str, Tensor],
        spec: LinearSpec,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        """See :meth:`EpilogueKernel.run_with`. Codes of a table are multiplied as what they stand for."""
        group = table_group(spec.group_size, spec.columns)
        operands = (
            *(packed["weight"], packed["scale"], None, packed["total"]),
            *(None if bias is None else bias.to(torch.float32), None, None),
            codebook_form(spec).call_number(self.isa, group, epilogue.code),
        )
        return product_with(x, residual, operands)


class CodebookDense(Kernel):
    """Many rows on a machine with bfloat16 products: the weight decoded to bfloat16, then oneDNN.

    Args:
        isa: Instruction set to generate for.
    """

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.name = f"generated {isa.name} table → bfloat16, oneDNN"
        self.layout: CodebookLayout = codebook_layout(isa)

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`Kernel.refuses`."""
        if spec.activation is not None:
            return "activations are quantized"
        if not spec.many_rows:
            return "fewer tokens than the bfloat16 product is good for"
        return ensure_kernel(rows_form(spec, torch.bfloat16), self.isa)

    def product(
        self, x: Tensor, quantized: QuantizedInput | None, packed: dict[str, Tensor], spec: LinearSpec
    ) -> Tensor:
        """See :meth:`Kernel.product`."""
        order = torch.arange(spec.rows, device=x.device)
        weight = look_up(order, packed, spec, torch.bfloat16, self.isa)  # [rows, K]
        product = F.linear(x.reshape(-1, spec.columns).to(torch.bfloat16), weight)
        return product.reshape(*x.shape[:-1], spec.rows).to(spec.dtype)


class CodebookEmbedding(EmbeddingKernel):
    """Rows decoded by index.

    Args:
        isa: Instruction set to generate for.
    """

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.layout: CodebookLayout = codebook_layout(isa)

    def refuses(self, spec: LinearSpec) -> str | None:
        """See :meth:`EmbeddingKernel.refuses`."""
        if spec.table is None:
            return "its codes index no table"
        if spec.dtype not in DTYPES:
            return f"the table's dtype is {spec.dtype}"
        return ensure_kernel(rows_form(spec, spec.dtype), self.isa)

    def run(self, indices: Tensor, packed: dict[str, Tensor], spec: LinearSpec) -> Tensor:
        """See :meth:`EmbeddingKernel.run`."""
        return look_up(indices, packed, spec, spec.dtype, self.isa)


def look_up(
    indices: Tensor, packed: dict[str, Tensor], spec: LinearSpec, dtype: torch.dtype, isa: Isa
) -> Tensor:
    """Rows ``[..., columns]`` of the weight, in ``dtype``."""
    number = rows_form(spec, dtype).call_number(isa, table_group(spec.group_size, spec.columns))
    tensors = packed["weight"], packed["scale"], None, packed["total"]
    rows: Tensor = torch.ops.fxcompress_cpu.embedding(indices, *tensors, spec.columns, number)
    return rows


def codebook_form(spec: LinearSpec) -> CodebookForm:
    """The kernel form of a linear use; activations and result have the dtype of ``spec``."""
    dtype = DTYPES[spec.dtype]
    return CodebookForm("codebook-linear", spec.bits, spec.table == "rows", spec.group_size > 0, dtype, dtype)


def rows_form(spec: LinearSpec, dtype: torch.dtype) -> CodebookForm:
    """The kernel form of rows by index in ``dtype``."""
    name = DTYPES[dtype]
    return CodebookForm("codebook-rows", spec.bits, spec.table == "rows", spec.group_size > 0, name, name)
