"""The weight layout of generated kernels.

Rows are taken in blocks of twice the vector's lanes, inputs in chunks of 16. In a chunk the codes are ordered

    step (4 inputs) → half (lanes outputs) → output → input

so that a vector holds four consecutive inputs of ``lanes`` outputs, which is what byte products want; codes
of fewer than 8 bits are stored as planes of 4, 2 and 1 bits whose bytes combine several such vectors
(``templates/unpack.j2``). Every group is padded to whole chunks. One layout serves decode, prefill, float and
quantized activations, and embedding look-ups.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.cpu.isa import Isa
from fxcompress.backends.cpu.layouts import Layout, codes_matrix, row_parameters
from fxcompress.forms import QuantizedWeight

CHUNK = 16
ROW_GROUP = 32768
"""Inputs summed at once where a row has one scale: 255 · 128 · 32768 still fits 32 bits."""


def kernel_group(group_size: int, columns: int) -> int:
    """Inputs the kernel sums before it scales: the group, or a bounded part of the row."""
    return min(group_size, columns) if group_size > 0 else min(ROW_GROUP, columns)


class TiledLayout(Layout):
    """Bit planes in tiles for one instruction set.

    Packed tensors, for N outputs in B blocks, K inputs in C chunks and G groups:
    ``weight: [B, C, bits, 4·lanes]`` uint8; ``scale: [B, G, 2·lanes]``, bfloat16 for groups (as stored), else
    float32; ``zero``: uint8 like ``scale`` (absent when symmetric); ``total: [N]`` float32, the sum of every
    dequantized row: static activations with a zero-point need it, and its size tells the operators N.

    Args:
        isa: The instruction set.
    """

    def __init__(self, isa: Isa) -> None:
        self.isa = isa

    @property
    def name(self) -> str:  # type: ignore[override]
        """See :class:`Layout`."""
        return f"tiled-{self.isa.lanes}"

    def pack(self, terms: Sequence[QuantizedWeight]) -> dict[str, Tensor]:
        """See :meth:`Layout.pack`."""
        first = terms[0]
        codes = self.arrange(torch.cat([codes_matrix(term) for term in terms]))  # [N, K] uint8
        parameters = (torch.cat(parts) for parts in zip(*map(row_parameters, terms), strict=True))
        scale, zero = map(self.arrange, parameters)
        rows, columns = codes.shape
        group = kernel_group(first.group_size, columns)
        groups = -(-columns // group)
        if first.group_size <= 0:
            scale, zero = scale.expand(rows, groups), zero.expand(rows, groups)
        packed = {"weight": pack_tiles(codes, first.bits, group, self.isa)}
        packed["scale"] = self._per_block(scale.to(torch.bfloat16 if first.group_size > 0 else torch.float32))
        if first.zero is not None:
            packed["zero"] = self._per_block(zero.to(torch.uint8))
        packed["total"] = _row_totals(codes, scale, zero, group)
        return packed

    def arrange(self, rows: Tensor) -> Tensor:
        """Values of every row in the order of the blocks."""
        return rows

    def _per_block(self, values: Tensor) -> Tensor:
        """``[N, G]`` to ``[B, G, block]``."""
        padded = F.pad(values, (0, 0, 0, -values.shape[0] % self.isa.block))
        blocks: Tensor = padded.unflatten(0, (-1, self.isa.block))
        return blocks.transpose(1, 2).contiguous()


class GatedLayout(TiledLayout):
    """Every block holds a vector of gates and the vector of outputs that they multiply.

    The terms' rows, together, are the gates and the others, of equal number: a multiple of ``lanes`` each.

    Args:
        isa: The instruction set.
        gate_last: Whether the gates are the second half of the rows.
    """

    def __init__(self, isa: Isa, gate_last: bool) -> None:
        super().__init__(isa)
        self.gate_last = gate_last

    @property
    def name(self) -> str:  # type: ignore[override]
        """See :class:`Layout`."""
        return f"tiled-{self.isa.lanes}-gate-{'last' if self.gate_last else 'first'}"

    def arrange(self, rows: Tensor) -> Tensor:
        """Values of every row ``[2·I, ...]`` in the order of the blocks."""
        halves = rows.unflatten(0, (2, -1, self.isa.lanes))  # [2, B, lanes, ...]
        gate, other = halves.flip(0) if self.gate_last else halves
        return torch.stack((gate, other), dim=1).flatten(0, 2)


@functools.cache
def gated_layout(isa: Isa, gate_last: bool) -> GatedLayout:
    """The one layout object of an instruction set and order."""
    return GatedLayout(isa, gate_last)


@functools.cache
def tiled_layout(isa: Isa) -> TiledLayout:
    """The one layout object of an instruction set."""
    return TiledLayout(isa)


def pack_tiles(codes: Tensor, bits: int, group: int, isa: Isa) -> Tensor:
    """Codes ``[N, K]`` uint8 to bit planes ``[B, C, bits, 4·lanes]`` uint8; padding is code 0."""
    codes = pad_groups(codes, group)
    codes = F.pad(codes, (0, 0, 0, -codes.shape[0] % isa.block))
    blocks, chunks = codes.shape[0] // isa.block, codes.shape[1] // CHUNK
    # [B, half, lane, C, step, input] → [B, C, vector = step·2 + half, byte = lane·4 + input]
    vectors = codes.view(blocks, 2, isa.lanes, chunks, 4, 4).permute(0, 3, 4, 1, 2, 5)
    vectors = vectors.reshape(blocks, chunks, 8, 4 * isa.lanes)
    if bits == 8:
        return vectors
    planes = []
    low = 0  # lowest bit not stored yet
    for width in (4, 2, 1):
        if not bits - low >= width:
            continue
        count = 8 // width  # vectors that share a byte
        part = ((vectors >> low) & ((1 << width) - 1)).unflatten(2, (-1, count))
        plane = part[:, :, :, 0]
        for index in range(1, count):
            plane = plane | part[:, :, :, index] << (index * width)
        planes.append(plane)
        low += width
    return torch.cat(planes, dim=2)


def pad_groups(codes: Tensor, group: int) -> Tensor:
    """``[N, K]`` with zeros behind every group, up to whole chunks."""
    columns = codes.shape[1]
    if columns % group == 0 and group % CHUNK == 0:
        return codes
    parts = codes.split(group, dim=1)
    return torch.cat([F.pad(part, (0, -part.shape[1] % CHUNK)) for part in parts], dim=1)


def _row_totals(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """Sum of every dequantized row ``[N]``, float32 rounded from float64."""
    total = torch.zeros(codes.shape[0], dtype=torch.float64)
    for index, part in enumerate(codes.split(group, dim=1)):
        difference = part.sum(dim=1, dtype=torch.int64) - zero[:, index].to(torch.int64) * part.shape[1]
        total += difference * scale[:, index].double()
    return total.float()
