"""Replace weights by indices into a table of values: fixed for normal distributions, or learned per row.

    linear(x, w)  →  linear(x, dequantize_codebook(codes, table, scale))

Fixed tables: Dettmers et al., 2023 (QLoRA, arXiv:2305.14314). Learned tables: Kim et al., 2023 (SqueezeLLM,
arXiv:2306.07629), without its sparse part, and with the second moment of a weight's input in the place of the
gradient's. Keeps: every use of the weight, its shape and dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.edits import Edit, Refuse, SetWeight
from fxcompress.errors import FormatError, RecipeError
from fxcompress.formats.codebook import (
    FIXED_TABLES,
    CodebookFormat,
    encode_codebook,
    fixed_table,
    largest_magnitudes,
    representable,
)
from fxcompress.formats.integer import spread
from fxcompress.formats.packing import pack_codes
from fxcompress.forms import CodebookWeight, DoubleQuantizedCodebook, WeightTerm
from fxcompress.pass_base import BlockContext
from fxcompress.passes._input_rows import matrix_count, site_rows, unsupported
from fxcompress.passes._kmeans import weighted_kmeans
from fxcompress.passes._selection import (
    Candidate,
    Role,
    SelectivePass,
    candidates,
    check_group_size,
    not_smaller,
)

_GROUP = 64  # QLoRA, section 3


@dataclass(frozen=True)
class QuantizeCodebook(SelectivePass):
    """Choose every weight from a table of ``2**bits`` values.

    Embeddings and output heads are left to a later ``quantize-weights`` with ``only_remaining``, unless
    ``heads`` is true.

    Args:
        table: ``"nf4"`` (default), ``"fp4"``: fixed tables of 16 values; ``"kmeans"``: learned from the
            weights.
        bits: Width of a code, 2…8; fixed tables have 4. Default 4.
        group_size: Inputs that share a scale, their largest magnitude; 0 = one scale per row. Default: 64 for
            fixed tables (QLoRA); learned ones hold weights as they are, without scales.
        per_row: A learned table for every row (SqueezeLLM), else one per matrix. Default True.
        weighting: How much errors count when a table is learned. ``"none"`` (default): all alike.
            ``"second-moment"``: the mean square of the input that the weight is multiplied with, the diagonal
            of the Hessian of the layer's output error; needs calibration data.
        iterations: Most steps of k-means. Default 50 (SqueezeLLM's code).
        heads: Also take embeddings, and output heads. Default False.
        double_quant: Quantize the scales of groups to 8 bits as well (QLoRA). Default False.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError, FormatError: an option is out of range.
        CalibrationError: the calibration data gave NaN or inf.

    Example:
        >>> QuantizeCodebook(table="kmeans", bits=3).format(columns=512)
        CodebookFormat(bits=3, group_size=None, per_row=True)
    """

    table: Literal["nf4", "fp4", "kmeans"] = "nf4"
    bits: int = 4
    group_size: int | None = None
    per_row: bool = True
    weighting: Literal["none", "second-moment"] = "none"
    iterations: int = 50
    heads: bool = False
    double_quant: bool = False

    name: ClassVar[str] = "quantize-codebook"
    summary: ClassVar[str] = "Choose weights from a table of values: NF4, FP4 or learned (k-means)."
    source: ClassVar[str] = (
        "Dettmers et al., 2023 (QLoRA, arXiv:2305.14314); Kim et al., 2023 (SqueezeLLM, arXiv:2306.07629)"
    )
    provides: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"low-rank"})  # factors are rounded to integers or floats

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table not in (*FIXED_TABLES, "kmeans"):
            known = ", ".join(map(repr, (*FIXED_TABLES, "kmeans")))
            raise RecipeError(f"{self.name}: table={self.table!r}, expected one of {known}.")
        if self.weighting not in ("none", "second-moment"):
            raise RecipeError(
                f"{self.name}: weighting={self.weighting!r}, expected 'none' or 'second-moment'."
            )
        for option in ("per_row", "heads", "double_quant"):
            if not isinstance(getattr(self, option), bool):
                raise RecipeError(f"{self.name}: {option}={getattr(self, option)!r}, expected true or false.")
        if type(self.iterations) is not int or self.iterations < 1:
            raise RecipeError(f"{self.name}: iterations={self.iterations!r}, expected a positive integer.")
        try:
            self.format(columns=_GROUP)
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}") from None
        if self.table in FIXED_TABLES:
            for option, default in (("bits", 4), ("weighting", "none"), ("per_row", True)):
                if getattr(self, option) != default:
                    raise RecipeError(
                        f"{self.name}: {option}={getattr(self, option)!r} does not go with table="
                        f"{self.table!r}, whose 16 values are fixed.",
                        fix=f'leave {option} out, or use table="kmeans".',
                    )
        # Only weighted tables need data; an instance may say so, the class cannot.
        object.__setattr__(self, "needs_calibration", self.weighting != "none")

    def format(self, columns: int) -> CodebookFormat:
        """The number format of a weight of ``columns`` inputs: a group longer than these is the row."""
        learned = self.table == "kmeans"
        size = self.group_size
        if size is None and not learned:
            size = _GROUP
        if type(size) is int and size > columns:
            size = 0
        return CodebookFormat(self.bits, size, per_row=learned and self.per_row)

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`SetWeight` or a :class:`Refuse` for every weight of the block."""
        self.check_patterns(block.program)
        if block.index == 0 and self.group_size is not None:
            check_group_size(self.name, block.program, self.group_size)
        chosen = []
        for candidate in candidates(block):
            reason = self._unsuitable(block, candidate)
            if reason is None:
                chosen.append(candidate)
            else:
                yield Refuse(candidate.name, reason)
        if self.weighting != "none":  # all at once: the block runs once
            block.statistics([site for candidate in chosen for site in _linear_uses(candidate)])
        for candidate in chosen:
            yield self._edit(block, candidate)

    def _unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        reason = self.unselected(block.program, candidate.name)
        if reason is not None:
            return reason
        site = candidate.primary
        if site.kind is SiteKind.OTHER:
            return site.reason or "no use of it is a product or a look-up"
        if candidate.role is not Role.MATRIX and not self.heads:
            return f"{candidate.role.value}, left alone by heads=False"
        fmt = self.format(site.layout.matrix_shape[2])
        return not_smaller(fmt, site, block.weight(candidate.name).dtype)

    def _edit(self, block: BlockContext, candidate: Candidate) -> SetWeight:
        site, weight = candidate.primary, block.weight(candidate.name).detach()
        layout = site.layout
        w = layout.to_matrix(weight)  # [B, N, K]
        fmt = self.format(w.shape[2])
        note = ""
        moments = None
        if self.weighting != "none":
            moments = _second_moments(block, candidate)
            note = (
                ", weighted by inputs"
                if moments is not None
                else ", unweighted: no calibration token reaches it"
            )
        scale = None if fmt.group_size is None else largest_magnitudes(w, fmt)
        if self.table in FIXED_TABLES:
            table = fixed_table(self.table).reshape(1, 1, -1).to(w.device)
        else:
            table = self._learned(w, scale, moments, fmt)
        group_size = fmt.group_size or 0
        codes = encode_codebook(w, table, scale, group_size)
        plain = CodebookWeight(
            bits=fmt.bits,
            group_size=group_size,
            shape=layout.shape,
            perm=layout.perm,
            batch_dims=layout.batch_dims,
            row_dims=layout.row_dims,
            codes=pack_codes(codes, fmt.bits).contiguous(),
            table=table.contiguous(),
            scale=scale,
        )
        term: WeightTerm = plain
        if self.double_quant and scale is not None and group_size:
            term = DoubleQuantizedCodebook.of(plain, w)
            note += ", 8-bit scales"
        role = "" if candidate.role is Role.MATRIX else f", {candidate.role.value}"
        return SetWeight(candidate.name, (term,), reason=f"{self.table}: {fmt.describe()}{role}{note}")

    def _learned(
        self, w: Tensor, scale: Tensor | None, moments: Tensor | None, fmt: CodebookFormat
    ) -> Tensor:
        """Tables of ``w: [B, N, K]`` from the values of its rows (over their scales)."""
        batch, rows, columns = w.shape
        values = w.reshape(batch * rows, columns).to(torch.float64)
        weights = None
        if moments is not None:  # [M, K]: one row of them for each of M matrices
            weights = moments.repeat_interleave(batch * rows // len(moments), dim=0)
        if scale is not None:
            factor = spread(scale.reshape(batch * rows, -1).to(values.dtype), fmt.group_size or 0, columns)
            values = values / torch.where(factor == 0, torch.ones_like(factor), factor)
            square = factor.square().expand_as(values)
            weights = square if weights is None else weights * square
        if not fmt.per_row:
            values = values.reshape(1, -1)
            weights = None if weights is None else weights.expand(batch * rows, -1).reshape(1, -1)
        table = weighted_kmeans(values, weights, 1 << fmt.bits, self.iterations)
        # A scale is multiplied afterwards, and keeps the product in range.
        dtype = w.dtype if scale is None else torch.float32
        return representable(table, dtype, fmt.table_dtype).reshape(fmt.table_shape(batch, rows))


def _linear_uses(candidate: Candidate) -> list[Site]:
    """Linear uses in this block that read the weight as the primary one does."""
    layout = candidate.primary.layout
    return [site for site in candidate.here if site.kind is SiteKind.LINEAR and site.layout == layout]


def _second_moments(block: BlockContext, candidate: Candidate) -> Tensor | None:
    """``[M, K]``: mean squares of the inputs of M matrices; a matrix that none reaches takes those of all.

    None when no token reaches the weight, or when its inputs cannot be told apart by column.
    """
    linear = _linear_uses(candidate)
    if linear:
        statistics = block.statistics(linear)
        seen = [statistics[site.input.name] for site in linear if site.input is not None]
        seen = [entry for entry in seen if entry.count]
        total = sum(entry.count for entry in seen)
        if not total:
            return None
        return torch.stack([entry.second_moment * (entry.count / total) for entry in seen]).sum(0)[None]
    site = candidate.primary
    if unsupported(site) is not None or site not in candidate.here:
        return None
    sums = torch.zeros(matrix_count(site), site.layout.matrix_shape[2], dtype=torch.float64)
    counts = torch.zeros(len(sums), dtype=torch.float64)
    for rows in site_rows(block, site):
        x = rows.values.detach().double().cpu()  # [M, T, K]
        at = slice(None) if rows.first is None else slice(rows.first, rows.first + len(x))
        sums[at] += x.square().sum(1)
        counts[at] += x.shape[1]
    if not bool(counts.any()):
        return None
    reached = (counts > 0)[:, None]
    return torch.where(reached, sums / counts.clamp_min(1)[:, None], sums.sum(0) / counts.sum())
