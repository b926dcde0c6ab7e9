"""Kernel form and layout of products with 2:4 weights: entries in pairs, their places in four bits a quad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.cpu.layouts import Layout
from fxcompress.backends.triton.generator import Argument, interpreted
from fxcompress.backends.triton.linear_form import DTYPES
from fxcompress.errors import BackendError
from fxcompress.formats.packing import unpack_codes
from fxcompress.forms import Eager, SparseQuantizedWeight, SparseWeight
from fxcompress.forms.sparse import Within

__all__ = ["PairsLayout", "SparseForm", "pack_pairs"]

_PAIRS = {16: torch.int32, 8: torch.int16, 4: torch.uint8}


@dataclass(frozen=True)
class SparseForm:
    """``y = x·Wᵀ`` where at most two of every four inputs have entries.

    Args:
        bits: 16 (entries of the activations' dtype), or 8 or 4 (codes).
        zero: Whether zero-points are stored; else they are ``2**(bits-1)``.
        group: Inputs that share a scale, a multiple of 128; 0 = a row.
        input: Dtype of activations and result: ``"float16"`` or ``"bfloat16"``.
        bias: Whether a bias is added.

    Raises:
        BackendError: a field is out of range.
    """

    bits: int
    zero: bool
    group: int
    input: str
    bias: bool = False
    family: ClassVar[str] = "sparse"
    entry: ClassVar[str] = "linear_sparse"
    chunk: ClassVar[int] = 128

    def __post_init__(self) -> None:
        dense = self.bits == 16
        good = self.bits in _PAIRS and self.input in DTYPES and self.group >= 0 and self.group % 128 == 0
        if not good or (dense and (self.zero or self.group)):
            raise BackendError(f"{self} is not supported.")

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        codes = "" if self.bits == 16 else f"-w{self.bits}{'z' if self.zero else ''}"
        group = f"g{self.group}" if self.group else ""
        return f"sparse24{codes}{group}-{self.input}{'-bias' if self.bias else ''}"

    def arguments(self) -> list[Argument]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        value = f"*{DTYPES[self.input]}"
        pair = {16: "*i32", 8: "*i16", 4: "*u8"}[self.bits]
        scale = "*bf16" if self.group else "*fp32"
        return [
            Argument("x_ptr", value, "[M, K]"),
            Argument("pairs_ptr", pair, "[chunks · 32, N], two entries of a quad"),
            Argument("places_ptr", "*u8", "[chunks · 16, N], places of the entries of two quads"),
            *([Argument("scale_ptr", scale, "[groups, N]")] if self.bits < 16 else []),
            *([Argument("zero_ptr", "*u8", "[groups, N]")] if self.zero else []),
            *([Argument("bias_ptr", value, "[N]")] if self.bias else []),
            Argument("y_ptr", value, "[M, N]; where SPLITS > 1, parts [SPLITS, M, N] float32"),
            *(Argument(name, "i32", "") for name in ("M", "N", "K", "chunks")),
        ]

    def context(self) -> dict[str, Any]:
        """See :class:`~fxcompress.backends.triton.generator.AnyForm`."""
        wide = interpreted() and self.input == "bfloat16"
        return {"type": f"tl.{self.input}", "operand": ".to(tl.float32)" if wide else ""}


def pack_pairs(entries: Tensor, stored: Tensor, bits: int) -> dict[str, Tensor]:
    """Pairs and places of a 2:4 matrix.

    Args:
        entries: ``[N, K]``: float16 or bfloat16 (``bits`` 16), or codes uint8.
        stored: ``[N, K]`` bool: which entries are; at most two of every four.
        bits: 16, 8 or 4.

    Returns:
        ``pairs: [chunks · 32, N]`` and ``places: [chunks · 16, N]``, see the templates.

    Raises:
        BackendError: more than two entries in a quad.
    """
    pad = (0, -entries.shape[1] % 128)
    raw = entries.view(torch.int16) if bits == 16 else entries
    value = F.pad(raw.to(torch.int64) & ((1 << bits) - 1), pad).unflatten(1, (-1, 4))
    kept = F.pad(stored, pad).unflatten(1, (-1, 4))  # [N, quads, 4]
    if bool((kept.sum(-1) > 2).any()):
        raise BackendError("pack_pairs: a quad has more than two entries.")
    # The kept places first, in order, then others: a pair always has two places p < q.
    order = (~kept).to(torch.int64).argsort(dim=-1, stable=True)[..., :2].sort(dim=-1).values
    found = torch.where(kept.gather(2, order), value.gather(2, order), _empty(bits))
    pairs = found[..., 0] | found[..., 1] << bits
    places = (order[..., 0] | order[..., 1] << 2).unflatten(1, (-1, 2, 16))
    both = places[:, :, 0] | places[:, :, 1] << 4  # [N, chunks, 16]
    limit = 1 << (2 * bits)
    if bits > 4:
        pairs = torch.where(pairs >= limit // 2, pairs - limit, pairs)
    return {
        "pairs": pairs.to(_PAIRS[bits]).t().contiguous(),
        "places": both.to(torch.uint8).flatten(1).t().contiguous(),
    }


class PairsLayout(Layout):
    """Pairs and places, see :func:`pack_pairs`; ``scale`` and ``zero: [G, N]`` of codes.

    Args:
        bits: 16, 8 or 4.
        dtype: Of float entries.
    """

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        self.bits, self.dtype = bits, dtype
        self.name = f"triton-pairs{bits}-{dtype}"  # type: ignore[misc]

    def pack(self, terms: Sequence[SparseWeight | SparseQuantizedWeight]) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`Layout.pack`."""
        (term,) = terms
        slots = term.index.slots(term.layout.matrix_shape, Within(Eager(term), "index"))[0]
        if isinstance(term, SparseWeight):
            dense = term.layout.to_matrix(term.dense(self.dtype))[0].contiguous()
            return pack_pairs(dense, slots >= 0, 16)
        codes = unpack_codes(term.codes, term.bits, term.stored)[slots.clamp_min(0)]
        found = pack_pairs(torch.where(slots >= 0, codes, 0), slots >= 0, self.bits)
        rows = term.layout.matrix_shape[1]
        found["scale"] = term.scale[0].expand(rows, -1).t().contiguous()
        if term.zero is not None:
            found["zero"] = term.zero[0].expand(rows, -1).t().contiguous()
        return found


def _empty(bits: int) -> int:
    """What fills a pair: a float of zero, or the code of zero where that is fixed."""
    return 0 if bits == 16 else 1 << (bits - 1)


def dense_pairs(packed: Sequence[Tensor], bits: int, columns: int) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack_pairs`: entries ``[N, columns]`` as integers, and where a pair has a place."""
    pairs, places = (tensor.t().to(torch.int64) for tensor in packed)
    both = places.unflatten(1, (-1, 16))
    codes = torch.stack([both & 15, both >> 4], dim=2).flatten(1)  # [N, quads]
    at = torch.stack([codes & 3, codes >> 2], dim=-1)
    mask = (1 << bits) - 1
    value = torch.stack([pairs & mask, pairs >> bits & mask], dim=-1)
    empty = torch.zeros(*codes.shape, 4, dtype=torch.int64)
    dense = empty.scatter(2, at, value).flatten(1)[:, :columns]
    return dense, empty.scatter(2, at, 1).flatten(1)[:, :columns].bool()
