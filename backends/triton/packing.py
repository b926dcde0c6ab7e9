"""How packed codes lie for the product kernels: so that every thread loads the codes it multiplies.

A tile is 64 outputs by ``LinearForm.depth`` inputs, and its words lie in the order in which the threads of a
program read them:

    output / 8 modulo 4 → output modulo 8 → four threads → (span of inputs) → output / 32

The four threads share a span of inputs: of every 16 inputs a thread holds four, as a matrix instruction wants
its second operand. Of two neighbouring codes one lies in the lower half of a word, one at the same bit of the
upper: a mask and an addition decode both into one register, as two 16-bit floats. Codes of 3 bits have three
tiles, two of their lower bits and one of the third.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.cpu.layouts import Layout, codes_matrix
from fxcompress.backends.triton.linear_form import STORED_BITS, LinearForm
from fxcompress.forms import CodebookWeight, FloatWeight, QuantizedWeight

__all__ = ["BytesLayout", "FloatWordsLayout", "WordsLayout", "pack_words", "unpack_words"]

TILE = 64
"""Outputs of a tile of words."""


def _places(bits: int) -> list[tuple[int, int, int | None]]:
    """(word, bit, bit of the third word or None) of every code of a thread and span, in order."""
    width = 2 if bits == 3 else bits
    found: list[tuple[int, int, int | None]] = []
    for word in range(2 if bits == 3 else 1):
        for shift in range(0, 16, width):
            high = 8 * word + shift // 2 if bits == 3 else None
            found += [(word, shift + up, None if high is None else high + up) for up in (0, 16)]
    return found


def _shape(bits: int) -> tuple[int, int]:
    """Spans of a tile, and steps of 16 inputs of a span."""
    return (1, 8) if bits == 3 else (2, 8 // bits)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Words ``[tiles of outputs, tiles of inputs, words of a tile]`` int32 of codes ``[N, K]`` uint8.

    Outputs are padded with zeros to whole tiles, inputs to a multiple of ``LinearForm.chunk``.

    Args:
        codes: Values below ``2**bits``.
        bits: 2, 3, 4 or 8.
    """
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % LinearForm.chunk, 0, -rows % TILE)).to(torch.int64)
    spans, steps = _shape(bits)
    # [tile, output / 32, output / 8, output, tile, span, step, thread, code of a step]
    parts = padded.view(padded.shape[0] // TILE, 2, 4, 8, -1, spans, steps, 4, 4)
    parts = parts.permute(0, 4, 2, 3, 7, 5, 1, 6, 8).flatten(7)
    words = torch.zeros(3 if bits == 3 else 1, *parts.shape[:-1], dtype=torch.int64, device=codes.device)
    for place, (word, bit, high) in enumerate(_places(bits)):
        code = parts[..., place]
        words[word] |= (code & 3 if bits == 3 else code) << bit
        if high is not None:
            words[2] |= (code >> 2) << high
    wrapped = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return wrapped.permute(1, 2, 0, 3, 4, 5, 6, 7).flatten(2).contiguous()


def unpack_words(words: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Inverse of :func:`pack_words`: codes ``[rows, columns]`` uint8."""
    spans, _ = _shape(bits)
    whole = words.to(torch.int64) & 0xFFFFFFFF
    parts = whole.view(*words.shape[:2], 3 if bits == 3 else 1, 4, 8, 4, spans, 2)
    found = []
    for word, bit, high in _places(bits):
        code = parts[:, :, word] >> bit & (3 if bits == 3 else (1 << bits) - 1)
        found.append(code if high is None else code | (parts[:, :, 2] >> high & 1) << 2)
    # [tile, tile, 4, 8, thread, span, 2, step, code]
    codes: Tensor = torch.stack(found, -1).unflatten(-1, (-1, 4))
    order = codes.permute(0, 6, 2, 3, 1, 5, 7, 4, 8)
    return order.reshape(TILE * words.shape[0], -1)[:rows, :columns].to(torch.uint8)


def shared_table(table: Tensor, bits: int) -> Tensor:
    """A table as kernels read it.

    Args:
        table: ``[2**bits]`` float32.
        bits: Of a code.

    Returns:
        For 4 bits ``[2, 8]`` int32: the lower bytes of all entries, then the upper ones, four to a word, of
        bfloat16 and of float16. Else float16 as it is.
    """
    if bits != 4:
        return table.half()
    kinds = [table.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF for dtype in _KINDS]
    both = torch.stack([torch.cat([kind & 255, kind >> 8]) for kind in kinds]).to(torch.uint8)  # [2, 32]
    words: Tensor = both.contiguous().view(torch.int32)
    return words


_KINDS = (torch.bfloat16, torch.float16)


class WordsLayout(Layout):
    """Words, and scales and zero-points with outputs next to each other.

    ``words`` int32, see :func:`pack_words`; ``scale: [G, N]`` in the form's dtype; ``zero: [G, N]`` uint8,
    absent when symmetric; ``table`` where codes index one, see :func:`shared_table`,
    or ``[N, 2**bits]`` bfloat16.
    """

    name = "triton-words"

    def pack(self, terms: Sequence[QuantizedWeight | CodebookWeight]) -> dict[str, Tensor]:
        """See :meth:`Layout.pack`."""
        first = terms[0]
        codes = torch.cat([codes_matrix(term) for term in terms])  # type: ignore[arg-type]
        found = {"words": pack_words(codes, STORED_BITS[first.bits])}
        if isinstance(first, CodebookWeight):
            tables = [term.table for term in terms if isinstance(term, CodebookWeight)]
            if first.per_row:
                found["table"] = torch.cat([t[0] for t in tables])
            else:
                found["table"] = shared_table(first.table.reshape(-1), first.bits)
        scales = [_rows(term.scale[0], term) for term in terms if term.scale is not None]
        if scales:
            found["scale"] = torch.cat(scales).t().contiguous()
        zeros = [_rows(t.zero[0], t) for t in terms if isinstance(t, QuantizedWeight) and t.zero is not None]
        if zeros:
            found["zero"] = torch.cat(zeros).t().contiguous()
        return found


class FloatWordsLayout(Layout):
    """Words of 8-bit floats: ``words`` as in :class:`WordsLayout`, ``scale: [1, N]`` float32."""

    name = "triton-float-words"

    def pack(self, terms: Sequence[FloatWeight]) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`Layout.pack`; scales are per row or matrix."""
        codes = torch.cat([term.codes[0].view(torch.uint8) for term in terms])
        scale = torch.cat([term.scale[0].expand(term.codes.shape[1], -1) for term in terms])
        words = pack_words(codes, 8)
        return {"words": words, "scale": scale.t().contiguous()}


class BytesLayout(Layout):
    """Row-major int8 codes, for products of bytes: ``values: [N, K]`` less 128, ``scale: [G, N]`` float32.

    Asymmetric codes add ``zero: [G, N]`` int16, the zero-point less 128.
    """

    name = "triton-bytes"

    def pack(self, terms: Sequence[QuantizedWeight]) -> dict[str, Tensor]:
        """See :meth:`Layout.pack`."""
        center = 1 << (terms[0].bits - 1)
        values = torch.cat([codes_matrix(term) for term in terms]).to(torch.int16) - center
        scale = torch.cat([_rows(term.scale[0], term) for term in terms]).float()
        found = {"values": values.to(torch.int8), "scale": scale.t().contiguous()}
        zeros = [_rows(term.zero[0], term) for term in terms if term.zero is not None]
        if zeros:
            found["zero"] = (torch.cat(zeros).to(torch.int16) - center).t().contiguous()
        return found


def _rows(per_group: Tensor, term: QuantizedWeight | CodebookWeight) -> Tensor:
    """``[N, G]``; parameters of a whole matrix are repeated for every row."""
    return per_group.expand(term.layout.matrix_shape[1], -1)
