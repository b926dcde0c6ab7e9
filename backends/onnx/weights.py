"""Layouts of quantized weights in ONNX: blocks for MatMulNBits, codes and scales for DequantizeLinear.

Every layout holds exactly the values of the term it is made from. ONNX knows codes of 2, 4 and 8 bits only,
so other widths travel in the next wider container with explicit zero-points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.formats.packing import unpack_codes
from fxcompress.forms import WeightLayout

__all__ = [
    "Blocks",
    "LinearCodes",
    "Packed",
    "block_size",
    "blocks_of",
    "codes_of",
    "container",
    "signed_matrix",
]

_BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Packed:
    """The tensors and numbers of a ``dequantize_weight`` call.

    Args:
        codes: ``[B, N, packed_width(K, bits)]`` uint8.
        scale: ``[B, N, G]`` or ``[B, 1, 1]``.
        zero: uint8 like ``scale``, or None when symmetric.
        bits, group_size: The format.
        layout: How the parameter is read as ``[B, N, K]``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    layout: WeightLayout

    @property
    def columns(self) -> int:
        """K."""
        return self.layout.matrix_shape[2]

    @property
    def per_row(self) -> bool:
        """Whether one scale serves a whole row (or matrix)."""
        return self.group_size <= 0 or self.group_size >= self.columns

    def unpacked(self) -> Tensor:
        """``[B, N, K]`` uint8 codes."""
        return unpack_codes(self.codes, self.bits, self.columns)

    def row_scales(self) -> tuple[Tensor, Tensor | None]:
        """Scale (float32) and zero-point as ``[B, N, G]``, spread over rows where one serves all."""
        batch, rows, _ = self.layout.matrix_shape
        shape = (batch, rows, self.scale.shape[-1])
        zero = None if self.zero is None else self.zero.expand(shape).contiguous()
        return self.scale.to(torch.float32).expand(shape).contiguous(), zero


@dataclass(frozen=True)
class Blocks:
    """A weight as ``MatMulNBits`` and ``GatherBlockQuantized`` take it.

    Args:
        data: ``[N, blocks, block · bits / 8]`` uint8, lowest bits first.
        scales: ``[N, blocks]`` float32.
        zeros: ``[N, ⌈blocks · bits / 8⌉]`` uint8, or None for the midpoint.
        bits: 2, 4 or 8.
        block: Columns per block.
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block: int


@dataclass(frozen=True)
class LinearCodes:
    """A weight as ``DequantizeLinear`` takes it.

    Args:
        codes: int8 (uint8 when 4-bit with zero-points), one code per element.
        scale: float32: scalar, ``[n]`` along ``axis``, or like ``codes`` with blocks along ``axis``.
        zero: Like ``scale`` with the dtype of ``codes``, or None for zero.
        axis: Dimension of the scales.
        block: Codes per scale along ``axis``; 0 = not in blocks.
        four_bits: Whether the codes fit ONNX's 4-bit types.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    axis: int
    block: int
    four_bits: bool


def container(bits: int) -> int:
    """The narrowest width of ONNX Runtime's kernels that holds codes of ``bits`` bits."""
    return next(width for width in (2, 4, 8) if bits <= width)


def block_size(packed: Packed) -> int | None:
    """Columns per block that the weight's groups can be cut into, or None.

    A group that is no power of two is cut into the largest power of two that divides it; a whole row into the
    size that costs least in padding and repeated scales, of 8-bit codes into one of the two smallest, since
    activations are rounded block by block where the level allows it.
    """
    if packed.layout.batch_dims or packed.layout.matrix_shape[0] != 1:
        return None
    if packed.per_row:
        width = container(packed.bits)
        sizes = _BLOCK_SIZES[1:3] if width == 8 else _BLOCK_SIZES[1:4]  # those with integer kernels

        def cost(block: int) -> int:
            blocks = -(-packed.columns // block)
            return blocks * (block * width + 32)

        return min(sizes, key=cost)
    largest = packed.group_size & -packed.group_size
    return min(largest, _BLOCK_SIZES[-1]) if largest >= _BLOCK_SIZES[0] else None


def blocks_of(packed: Packed, block: int) -> Blocks:
    """Lay a weight out for ``MatMulNBits``."""
    width, columns = container(packed.bits), packed.columns
    codes = packed.unpacked()[0]  # [N, K]
    rows, count = codes.shape[0], -(-columns // block)
    scale, zero = packed.row_scales()
    groups = scale.shape[-1]
    step = count if packed.per_row else packed.group_size // block
    group = (torch.arange(count) // step).clamp(max=groups - 1)
    scales = scale[0][:, group].contiguous()
    fixed = 1 << (packed.bits - 1)
    points = torch.full((rows, count), fixed, dtype=torch.uint8) if zero is None else zero[0][:, group]
    implied = zero is None and packed.bits == width
    padded = points.repeat_interleave(block, 1)
    padded[:, :columns] = codes
    data = _pack(padded, width).reshape(rows, count, block * width // 8)
    return Blocks(data, scales, None if implied else _pack(points, width), width, block)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """``[N, n]`` codes → ``[N, ⌈n · bits / 8⌉]`` bytes, the lowest bits first."""
    if bits == 8:
        return codes.contiguous()
    per_byte = 8 // bits
    short = -codes.shape[1] % per_byte
    parts = torch.nn.functional.pad(codes, (0, short)).unflatten(1, (-1, per_byte))
    packed = torch.zeros(parts.shape[:2], dtype=torch.uint8)
    for index in range(per_byte):
        packed |= parts[..., index] << (bits * index)
    return packed


def signed_matrix(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """``[N, K]`` int8 codes, float32 scales and int8 zero-points ``[N]``; None when scales are grouped.

    Codes of up to 8 bits fit int8 once the midpoint is subtracted.
    """
    if not packed.per_row or packed.layout.matrix_shape[0] != 1:
        return None
    shift = 1 << (packed.bits - 1)
    scale, zero = packed.row_scales()
    codes = (packed.unpacked()[0].to(torch.int16) - shift).to(torch.int8)
    points = None if zero is None else (zero.reshape(-1).to(torch.int16) - shift).to(torch.int8)
    return codes, scale.reshape(-1), points


def codes_of(packed: Packed) -> LinearCodes:
    """Lay a weight of any rank out for ``DequantizeLinear``.

    With one scale per row the codes have the parameter's own shape, so that a convolution reads the result
    directly; else they are ``[B, N, K]`` with blocks along K.
    """
    four, shift = packed.bits <= 4, 1 << (packed.bits - 1)
    codes, layout = packed.unpacked(), packed.layout
    scale, zero = packed.row_scales()

    def stored(value: Tensor) -> Tensor:
        if four and zero is not None:
            return value
        return (value.to(torch.int16) - shift).to(torch.int8)

    points = None if zero is None else stored(zero)
    if packed.per_row and layout.matrix_shape[0] == 1 and layout.row_dims == 1:
        dense = layout.from_matrix(stored(codes)).contiguous()
        flat = None if points is None else points.reshape(-1)
        return LinearCodes(dense, scale.reshape(-1), flat, layout.perm[layout.batch_dims], 0, four)
    block = packed.columns if packed.per_row else packed.group_size
    return LinearCodes(stored(codes), scale, points, 2, block, four)
