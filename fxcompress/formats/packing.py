"""Dense bit packing: codes of 2…8 bits as a little-endian bit stream per row.

Code ``i`` of a row occupies bits ``i·bits … (i+1)·bits − 1``; bit ``j`` lies in byte ``j // 8`` at place
``j % 8``. Hence 8-bit codes are stored as they are, a byte holds two 4-bit codes (the even one in the low
nibble) or four 2-bit codes, and eight codes of any width fill exactly ``bits`` bytes. Unused bits of a row's
last byte are zero.

Only tensor operations with static slices are used, so that both directions trace and compile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import FormatError

__all__ = ["pack_codes", "packed_width", "unpack_codes"]


def packed_width(columns: int, bits: int) -> int:
    """Bytes of one packed row: ``ceil(columns · bits / 8)``.

    Example:
        >>> packed_width(5, bits=3)
        2
    """
    return (columns * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: ``[..., K]`` uint8, every value below ``2**bits``; higher bits are dropped.
        bits: Width of one code, 2…8.

    Returns:
        ``[..., packed_width(K, bits)]`` uint8.

    Raises:
        FormatError: ``codes`` is not uint8, or ``bits`` is outside 2…8.

    Example:
        >>> pack_codes(torch.tensor([1, 2, 3], dtype=torch.uint8), bits=4).tolist()
        [33, 3]
    """
    _check(codes, bits, "pack_codes")
    if bits == 8:
        return codes
    columns = codes.shape[-1]
    count, width = _period(bits)  # `count` codes fill `width` bytes
    codes = F.pad(codes & ((1 << bits) - 1), (0, -columns % count)).unflatten(-1, (-1, count))
    packed = []
    for byte in range(width):
        parts = [
            _place(codes[..., i], i * bits - 8 * byte)
            for i in range(count)
            if i * bits < 8 * (byte + 1) and (i + 1) * bits > 8 * byte
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total | part
        packed.append(total)
    return torch.stack(packed, dim=-1).flatten(-2)[..., : packed_width(columns, bits)].contiguous()


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack_codes`.

    Args:
        packed: ``[..., packed_width(columns, bits)]`` uint8.
        bits: Width of one code, 2…8.
        columns: Number of codes per row, K.

    Returns:
        ``[..., columns]`` uint8; ``packed`` itself when ``bits`` is 8.

    Raises:
        FormatError: ``packed`` is not uint8 or not of that width, or ``bits`` is outside 2…8.

    Example:
        >>> unpack_codes(torch.tensor([33, 3], dtype=torch.uint8), bits=4, columns=3).tolist()
        [1, 2, 3]
    """
    _check(packed, bits, "unpack_codes")
    if packed.shape[-1] != packed_width(columns, bits):
        raise FormatError(
            f"unpack_codes: rows have {packed.shape[-1]} bytes, {columns} codes of {bits} bits need"
            f" {packed_width(columns, bits)}."
        )
    if bits == 8:
        return packed
    count, width = _period(bits)
    if width > 1:
        packed = F.pad(packed, (0, -packed.shape[-1] % width))
    packed = packed.unflatten(-1, (-1, width))
    mask = (1 << bits) - 1
    codes = []
    for i in range(count):
        byte, shift = divmod(i * bits, 8)
        code = packed[..., byte] >> shift if shift else packed[..., byte]
        if shift + bits > 8:  # the upper bits lie in the next byte
            code = code | (packed[..., byte + 1] << (8 - shift))
        codes.append(code & mask)
    unpacked = torch.stack(codes, dim=-1).flatten(-2)
    return unpacked if unpacked.shape[-1] == columns else unpacked[..., :columns]


def _period(bits: int) -> tuple[int, int]:
    """Smallest (codes, bytes) that end on a common boundary."""
    return {2: (4, 1), 4: (2, 1), 6: (4, 3)}.get(bits, (8, bits))


def _place(code: Tensor, shift: int) -> Tensor:
    """``code << shift`` within one byte; masked first, so that no result depends on how a shift overflows."""
    if shift < 0:
        return code >> -shift
    return (code & ((1 << (8 - shift)) - 1)) << shift if shift else code


def _check(tensor: Tensor, bits: int, where: str) -> None:
    if not 2 <= bits <= 8:
        raise FormatError(f"{where}: bits={bits}, expected 2…8.")
    if tensor.dtype != torch.uint8:
        raise FormatError(f"{where}: dtype {tensor.dtype}, expected torch.uint8.")
