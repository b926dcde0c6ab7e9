"""Weight layouts of the CPU kernels, built from the neutral form when a model is bound to the machine."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.formats.packing import unpack_codes
from fxcompress.forms import QuantizedWeight

INT4_GROUPS = (32, 64, 128, 256)
_ROW_BLOCK = 64  # rows interleaved by aten::_convert_weight_to_int4pack_for_cpu


class Layout(abc.ABC):
    """How one or several siblings (rows concatenated) lie in memory."""

    name: ClassVar[str]

    @abc.abstractmethod
    def pack(self, terms: Sequence[QuantizedWeight]) -> dict[str, Tensor]:
        """Lay out the terms, rows concatenated in order."""


def codes_matrix(term: QuantizedWeight) -> Tensor:
    """Unpacked codes ``[N, K]`` uint8 of a term with one matrix."""
    _, _, columns = term.layout.matrix_shape
    return unpack_codes(term.codes, term.bits, columns)[0]


def row_parameters(term: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Scale and zero-point as float32 ``[N, G]`` (per-matrix parameters expanded to rows)."""
    _, rows, _ = term.layout.matrix_shape
    scale = term.scale[0].float().expand(rows, -1)
    fixed = float(1 << (term.bits - 1))
    zero = term.zero[0].float().expand(rows, -1) if term.zero is not None else torch.full_like(scale, fixed)
    return scale, zero


class Int8Rows(Layout):
    """Row-major int8 with one scale per row, for 8 bits and fewer.

    ``w = scale · values + offset``: ``values: [N, K]`` int8, ``scale: [N]`` float32, ``offset: [N]`` float32
    (absent when symmetric), ``total: [N]`` int32 the row sums of ``values``, ``ones: [N]`` bfloat16 (ATen's
    weight-only kernel insists on a scale in bfloat16; the exact one is applied outside).
    """

    name = "int8-rows"

    def pack(self, terms: Sequence[QuantizedWeight]) -> dict[str, Tensor]:
        """See :meth:`Layout.pack`."""
        values, scales, offsets = [], [], []
        for term in terms:
            center = 1 << (term.bits - 1)
            scale, zero = row_parameters(term)
            values.append((codes_matrix(term).to(torch.int16) - center).to(torch.int8))
            scales.append(scale[:, 0])
            offsets.append((center - zero[:, 0]) * scale[:, 0])
        packed = {"values": torch.cat(values), "scale": torch.cat(scales)}
        packed["total"] = packed["values"].sum(dim=1, dtype=torch.int32)
        packed["ones"] = torch.ones(len(packed["scale"]), dtype=torch.bfloat16)
        if any(term.zero is not None for term in terms):
            packed["offset"] = torch.cat(offsets)
        return packed


class Int4Blocked(Layout):
    """ATen's int4 CPU layout: 64 rows interleaved per input, two codes per byte, bfloat16 scale and minimum.

    Rows are padded to a multiple of 64 and inputs to a multiple of the group.
    ``w = scale · (code − 8) + zeros`` with ``zeros = scale · (8 − zero)``: exactly zero for symmetric codes.
    ``packed: [ceil64(N), Kp/2]`` uint8, ``parameters: [Kp/group, ceil64(N), 2]`` bfloat16.
    """

    name = "int4-blocked"

    def pack(self, terms: Sequence[QuantizedWeight]) -> dict[str, Tensor]:
        """See :meth:`Layout.pack`."""
        center = 8 - (
            1 << (terms[0].bits - 1)
        )  # narrower codes are shifted so that their middle is 8 as well
        codes = torch.cat([codes_matrix(term) for term in terms]) + center
        scales, zeros = (torch.cat(parts) for parts in zip(*map(row_parameters, terms), strict=True))
        zeros = zeros + center
        rows, columns = codes.shape
        group = kernel_group(terms[0])
        if terms[0].group_size != group:  # one scale per row or matrix: repeat it
            repeats = -(-columns // group)
            scales, zeros = scales.expand(rows, repeats), zeros.expand(rows, repeats)
        pad_rows, pad_columns = -rows % _ROW_BLOCK, -columns % group
        # Padded inputs meet activations of zero, padded rows are cut off: any code would do.
        codes = F.pad(codes, (0, pad_columns, 0, pad_rows), value=0)
        scales, zeros = F.pad(scales, (0, 0, 0, pad_rows)), F.pad(zeros, (0, 0, 0, pad_rows))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        parameters = torch.stack([scales, (8 - zeros) * scales], dim=-1).to(torch.bfloat16)
        return {"packed": packed, "parameters": parameters.transpose(0, 1).contiguous()}


def kernel_group(term: QuantizedWeight) -> int:
    """Group size the int4 kernel runs a term with; 0 when it cannot."""
    if term.group_size > 0:
        return term.group_size if term.group_size in INT4_GROUPS else 0
    return INT4_GROUPS[-1]


def unpack_int4_blocked(packed: Tensor, rows: int) -> Tensor:
    """Codes ``[rows, Kp]`` uint8 from :class:`Int4Blocked`'s ``packed`` (rows: multiple of 64), traceable."""
    columns = packed.shape[1] * 2
    blocks = packed.view(rows // _ROW_BLOCK, columns, _ROW_BLOCK // 2)
    both = torch.stack([blocks & 15, blocks >> 4], dim=1)  # [rows/64, 2, Kp, 32]
    return both.transpose(2, 3).reshape(rows, columns)


def int4_layout_is_known() -> bool:
    """Whether this machine's ATen interleaves rows as :func:`unpack_int4_blocked` expects."""
    codes = (torch.arange(2 * _ROW_BLOCK * 32) * 7 % 16).view(2 * _ROW_BLOCK, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return bool((unpack_int4_blocked(packed, 2 * _ROW_BLOCK) == codes).all())


INT8_ROWS = Int8Rows()
INT4_BLOCKED = Int4Blocked()
