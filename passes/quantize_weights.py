"""Round weights to the nearest integer or 8-bit floating-point codes, without data.

    linear(x, w)        →  linear(x, dequantize_weight(codes, scale, zero))
    embedding(w, ids)   →  quantized_embedding(ids, codes, scale) · c
    head(x, w)          →  linear(x · c, dequantize_weight(codes, scale))
    conv, bmm, einsum … →  the same op on the dequantized weight

Tables and heads are rounded as ``w/c``, c being one factor per column (see ``column_scales``).
Keeps: every use of the weight, its shape and dtype. Format: see :mod:`fxcompress.formats.integer`; range
search as in the GPTQ reference code (Frantar et al., 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.analysis.site_types import SiteKind
from fxcompress.edits import Edit, Refuse, SetTransform, SetWeight
from fxcompress.errors import FormatError, RecipeError
from fxcompress.formats import FloatFormat, IntFormat, quantize_to_float_term
from fxcompress.formats.integer import quantize_to_term
from fxcompress.forms import Scale
from fxcompress.pass_base import BlockContext
from fxcompress.passes._factors import has_dense_factors, round_factors
from fxcompress.passes._selection import (
    Candidate,
    Role,
    SelectivePass,
    candidates,
    check_group_size,
    describe,
    fitting_format,
    float_kind,
    not_smaller,
)

# Power of the largest magnitude per column. With 0 the large columns set the scale of every row; with 1 they
# would be rounded as coarsely as all others, and they often meet large activations.
_COLUMN_POWER = 0.75
_GROUP = 64  # inputs per scale below 8 bits; of 32, 64, 128 the largest that still divides most hidden sizes


@dataclass(frozen=True)
class QuantizeWeights(SelectivePass):
    """Round every weight to nearest.

    Args:
        format: ``"int"`` (default), ``"fp8-e4m3"`` or ``"fp8-e5m2"``. Floating-point codes have 8 bits and no
            zero-point; embeddings and heads stay integers, whose rows can be looked up.
        bits: Code width, 2…8. Default 8.
        symmetric: Levels symmetric around zero. Default: True for 8 bits, False below (an asymmetric range
            uses a whole level more, which matters when there are few).
        group_size: Inputs that share a scale; 0 = one scale per row, -1 = per matrix. Default: 0 for 8 bits,
            64 below. Rows shorter than a group get one scale per row. For floating-point codes n > 0 means
            blocks of n outputs × n inputs.
        search: Choose each range by least ``Σ|ŵ − w|^2.4`` instead of covering it. Default False.
        embedding_bits: Width for looked-up tables, and for an output head tied to one: symmetric, per row
            (one scale per token). None leaves them alone. Default 8.
        head_bits: The same for an untied output head: a linear layer with more outputs than inputs whose
            result leads to the model's output only. Default 8.
        column_scales: Divide tables and heads by one factor per column before rounding, and multiply their
            inputs (looked-up rows) with it at run time: ``max|w_j|^0.75``, relative to its geometric mean. A
            few columns of a table are often several times larger than the rest and would set the scale of
            every row. Costs one product per token. Default True.
        only_remaining: Pass over weights that an earlier pass has already compressed. Default False: they are
            an error. The dense factors of low-rank weights are rounded in both cases.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError, FormatError: an option is out of range.

    Example:
        >>> QuantizeWeights(bits=4, group_size=32, exclude=("*.router.*",)).format_of(Role.MATRIX)
        IntFormat(bits=4, symmetric=False, group_size=32)
    """

    format: str = field(default="int", kw_only=True)
    bits: int = 8
    symmetric: bool | None = None
    group_size: int | None = None
    search: bool = False
    embedding_bits: int | None = 8
    head_bits: int | None = 8
    column_scales: bool = True
    only_remaining: bool = False

    name: ClassVar[str] = "quantize-weights"
    summary: ClassVar[str] = "Round weights to integer codes (no data needed)."
    source: ClassVar[str] = (
        "round to nearest; range search of Frantar et al., 2022 (arXiv:2210.17323), reference code"
    )
    provides: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("search", "column_scales", "only_remaining"):
            if not isinstance(getattr(self, option), bool):
                raise RecipeError(f"{self.name}: {option}={getattr(self, option)!r}, expected true or false.")
        if self.symmetric is not None and not isinstance(self.symmetric, bool):
            raise RecipeError(f"{self.name}: symmetric={self.symmetric!r}, expected true, false or null.")
        kind = float_kind(self.name, self.format, self.bits)
        for option, default in (("symmetric", None), ("search", False)):
            if kind is not None and getattr(self, option) != default:
                raise RecipeError(f"{self.name}: {option} does not apply to format={self.format!r}.")
        try:
            for role in Role:
                self.format_of(role)
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}") from None

    def format_of(self, role: Role) -> IntFormat | FloatFormat | None:
        """The number format for weights of this role, or None when they are left alone."""
        if role is not Role.MATRIX:
            bits = self.embedding_bits if role is Role.EMBEDDING else self.head_bits
            return None if bits is None else IntFormat(bits=bits, symmetric=True, group_size=0)
        kind = float_kind(self.name, self.format, self.bits)
        if kind is not None:
            size = 0 if self.group_size is None else self.group_size
            blocks = {0: (1, 0), -1: (0, 0)}.get(size, (size, size))
            return FloatFormat(kind, *blocks)
        eight = self.bits == 8
        symmetric = eight if self.symmetric is None else self.symmetric
        group_size = (0 if eight else _GROUP) if self.group_size is None else self.group_size
        return IntFormat(bits=self.bits, symmetric=symmetric, group_size=group_size)

    def matrix_format(self) -> IntFormat | None:
        """See :meth:`Pass.matrix_format`."""
        fmt = self.format_of(Role.MATRIX)
        return fmt if isinstance(fmt, IntFormat) else None

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetWeight` or a :class:`Refuse` for every weight of the block."""
        self.check_patterns(block.program)
        if block.index == 0 and self.group_size is not None:  # a default adapts, see fitting_format
            check_group_size(self.name, block.program, self.group_size)
        for candidate in candidates(block):
            compressed = block.state.is_compressed(candidate.name)
            if self.only_remaining and compressed and not has_dense_factors(block.state.form(candidate.name)):
                continue
            yield from self._edits(block, candidate)

    def _edits(self, block: BlockContext, candidate: Candidate) -> Iterator[Edit]:
        name, site = candidate.name, candidate.primary
        fmt = self.format_of(candidate.role)
        reason = self.unselected(block.program, name)
        if reason is None and site.kind is SiteKind.OTHER:
            reason = site.reason or "no use of it is a product or a look-up"
        if reason is not None:
            yield Refuse(name, reason)
            return
        form = block.state.form(name)
        if has_dense_factors(form):
            factors = self.format_of(Role.MATRIX)
            assert factors is not None
            yield round_factors(name, form, factors, search=self.search)
            return
        if fmt is None:
            option = "embedding_bits" if candidate.role is Role.EMBEDDING else "head_bits"
            yield Refuse(name, f"{candidate.role.value}, left alone by {option}=None")
            return
        weight = block.weight(name)
        note = ""
        if isinstance(fmt, IntFormat):
            fmt, note = fitting_format(fmt, site.layout.matrix_shape[2])
        too_big = not_smaller(fmt, site, weight.dtype)
        if too_big is not None:
            yield Refuse(name, too_big)
            return
        role = "" if candidate.role is Role.MATRIX else f", {candidate.role.value}"
        if isinstance(fmt, FloatFormat):
            floats = quantize_to_float_term(weight, site.layout, fmt)
            yield SetWeight(name, (floats,), reason=f"{describe(fmt)}{role}")
            return
        factor = self._column_factor(block, candidate, weight)
        if factor is not None:
            yield SetTransform(
                name, transform_in=(Scale(factor),), reason="one factor per column of the table"
            )
            weight = weight.detach() / factor.to(weight.dtype)
            role += ", divided by a factor per column"
        # At 8 bits the full range is the best range: searching would cost most on the largest matrix for
        # nothing.
        term = quantize_to_term(weight, site.layout, fmt, search=self.search and fmt.bits < 8)
        yield SetWeight(name, (term,), reason=f"{describe(fmt)}{note}{role}")

    def _column_factor(self, block: BlockContext, candidate: Candidate, weight: Tensor) -> Tensor | None:
        """``[K]`` float32 for a table or head all of whose uses can take it, else None."""
        layout = candidate.primary.layout
        fits = all(
            site.kind in (SiteKind.EMBEDDING, SiteKind.LINEAR) and site.layout.perm == layout.perm
            for site in candidate.uses
        )
        free = not block.state.form(candidate.name).transform_in
        if not (self.column_scales and candidate.role is not Role.MATRIX and fits and free):
            return None
        return column_factor(layout.to_matrix(weight.detach()))


def column_factor(matrix: Tensor) -> Tensor:
    """Factors of the columns: ``max|w_j|^0.75`` over its geometric mean; 1 for columns of zeros.

    Args:
        matrix: ``[1, N, K]``.

    Returns:
        ``[K]`` float32, within 2^±15, so that divided weights stay in the range of every dtype.
    """
    largest = matrix.abs().amax(dim=(0, 1)).to(torch.float32)  # [K]
    exponent = _COLUMN_POWER * largest.clamp_min(torch.finfo(torch.float32).tiny).log2()
    used = largest > 0
    center = exponent[used].mean() if bool(used.any()) else exponent.new_zeros(())
    return torch.where(used, torch.exp2((exponent - center).clamp(-15, 15)), 1.0)
