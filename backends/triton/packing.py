"""How packed codes lie for the product kernels: words of planes, outputs next to each other.

    chunk of inputs → word (3 for codes of 3 bits) → place (step of them) → output

A word holds codes of inputs that are ``step`` apart: plane p of a chunk is inputs ``p·step … (p+1)·step``,
the operand of one matrix instruction. So a kernel reads every word once, and never moves a code from one lane
to another. Neighbouring planes lie at the same bit of a word's halves: they are decoded together, and
share a scale where groups have at least ``2·step`` inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.cpu.layouts import Layout, codes_matrix
from fxcompress.backends.triton.linear_form import STORED_BITS
from fxcompress.forms import CodebookWeight, FloatWeight, QuantizedWeight

__all__ = ["BytesLayout", "FloatWordsLayout", "WordsLayout", "pack_words", "unpack_words"]

_WORDS = {8: torch.int8, 16: torch.int16, 32: torch.int32}


def planes(bits: int, word: int) -> list[tuple[int, int]]:
    """(word, bit) of every plane of codes of 2, 4 or 8 bits; for 3 bits, of their two lower bits."""
    width = 2 if bits == 3 else bits
    count = word // width  # planes in a word
    total = word if bits == 3 else count
    return [(plane // count, width * (plane % count // 2) + plane % 2 * word // 2) for plane in range(total)]


def high_bit(plane: int, word: int) -> int:
    """Place of the third bit of a plane in the last word: in the same half as the lower bits."""
    which, place = divmod(plane, word // 2)
    return word // 4 * which + place // 2 + word // 2 * (place % 2)


def pack_words(codes: Tensor, bits: int, word: int, step: int) -> Tensor:
    """Words ``[chunks · words · step, N]`` of codes ``[N, K]`` uint8; K is padded with zeros to whole chunks.

    Args:
        codes: Values below ``2**bits``.
        bits: 2, 3, 4 or 8.
        word: 8, 16 or 32.
        step: Inputs per plane.
    """
    rows, columns = codes.shape
    places = planes(bits, word)
    chunk = step * len(places)
    padded = F.pad(codes, (0, -columns % chunk)).to(torch.int64)
    parts = padded.view(rows, -1, len(places), step)  # [N, chunks, planes, step]
    words = torch.zeros(3 if bits == 3 else 1, rows, parts.shape[1], step, dtype=torch.int64)
    for plane, (which, bit) in enumerate(places):
        code = parts[:, :, plane]
        words[which] |= (code & 3 if bits == 3 else code) << bit
        if bits == 3:
            words[2] |= (code >> 2) << high_bit(plane, word)
    wrapped = torch.where(words >= 1 << (word - 1), words - (1 << word), words).to(_WORDS[word])
    return wrapped.permute(2, 0, 3, 1).reshape(-1, rows).contiguous()


def unpack_words(words: Tensor, bits: int, word: int, step: int, columns: int) -> Tensor:
    """Inverse of :func:`pack_words`: codes ``[N, columns]`` uint8."""
    count, rows = 3 if bits == 3 else 1, words.shape[1]
    parts = words.to(torch.int64).view(-1, count, step, rows) & ((1 << word) - 1)
    found = []
    for plane, (which, bit) in enumerate(planes(bits, word)):
        code = parts[:, which] >> bit & (3 if bits == 3 else (1 << bits) - 1)
        if bits == 3:
            code = code | (parts[:, 2] >> high_bit(plane, word) & 1) << 2
        found.append(code)
    whole = torch.stack(found, dim=1)  # [chunks, planes, step, N]
    return whole.permute(3, 0, 1, 2).reshape(rows, -1)[:, :columns].to(torch.uint8)


class WordsLayout(Layout):
    """Words, and scales and zero-points with outputs next to each other.

    ``words: [chunks · words · step, N]`` int8, int16 or int32; ``scale: [G, N]`` in the form's dtype;
    ``zero: [G, N]`` uint8, absent when symmetric; ``table: [2**bits]`` float32 or ``[N, 2**bits]`` bfloat16
    for codes that index a table.

    Args:
        word: Bits of a word.
        step: Inputs per plane.
    """

    def __init__(self, word: int, step: int) -> None:
        self.word, self.step = word, step
        self.name = f"triton-words{word}x{step}"  # type: ignore[misc]

    def pack(self, terms: Sequence[QuantizedWeight | CodebookWeight]) -> dict[str, Tensor]:
        """See :meth:`Layout.pack`."""
        first = terms[0]
        codes = torch.cat([codes_matrix(term) for term in terms])  # type: ignore[arg-type]
        found = {"words": pack_words(codes, STORED_BITS[first.bits], self.word, self.step)}
        if isinstance(first, CodebookWeight):
            tables = [term.table for term in terms if isinstance(term, CodebookWeight)]
            found["table"] = torch.cat([t[0] for t in tables]) if first.per_row else first.table.reshape(-1)
        scales = [_rows(term.scale[0], term) for term in terms if term.scale is not None]
        if scales:
            found["scale"] = torch.cat(scales).t().contiguous()
        zeros = [_rows(t.zero[0], t) for t in terms if isinstance(t, QuantizedWeight) and t.zero is not None]
        if zeros:
            found["zero"] = torch.cat(zeros).t().contiguous()
        return found


class FloatWordsLayout(Layout):
    """Words of 8-bit floats: ``words`` as in :class:`WordsLayout`, ``scale: [1, N]`` float32.

    Args:
        word: Bits of a word.
        step: Inputs per plane.
    """

    def __init__(self, word: int, step: int) -> None:
        self.word, self.step = word, step
        self.name = f"triton-float-words{word}x{step}"  # type: ignore[misc]

    def pack(self, terms: Sequence[FloatWeight]) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`Layout.pack`; scales are per row or matrix."""
        codes = torch.cat([term.codes[0].view(torch.uint8) for term in terms])
        scale = torch.cat([term.scale[0].expand(term.codes.shape[1], -1) for term in terms])
        words = pack_words(codes, 8, self.word, self.step)
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
