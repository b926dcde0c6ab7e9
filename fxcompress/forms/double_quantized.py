"""A codebook weight whose scales are quantized again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcompress.errors import FormatError
from fxcompress.formats.codebook import encode_codebook, largest_magnitudes
from fxcompress.formats.packing import pack_codes
from fxcompress.forms.codebook import CodebookWeight
from fxcompress.forms.component import component
from fxcompress.forms.layout import WeightLayout
from fxcompress.forms.terms import WeightTerm, check_tensor

if TYPE_CHECKING:
    from fxcompress.forms.emit import Emit

__all__ = ["DoubleQuantizedCodebook", "round_to_codebook"]

SCALE_BLOCK = 256  # scales that share a step (QLoRA, section 3)
_LARGEST = 448.0  # of float8_e4m3fn


@component("double-quantized-codebook")
@dataclass(frozen=True, eq=False)
class DoubleQuantizedCodebook(WeightTerm):
    """A :class:`CodebookWeight` whose scales are 8-bit floating-point codes: ``scale = mean + step · code``.

    Blocks of 256 scales, in row-major order, share a step. The scale used is that sum in bfloat16, so that a
    weight with plain scales can stand for this one exactly (:meth:`expanded`). With groups of 64, scales take
    about 0.13 bits per weight instead of 0.25.

    Args:
        bits, group_size, shape, perm, batch_dims, row_dims, codes, table: As for :class:`CodebookWeight`.
        scale_codes: ``[B, N, G]`` float8_e4m3fn.
        scale_steps: ``[ceil(B·N·G / 256)]`` float32.
        scale_mean: 0-d float32.

    Raises:
        FormatError: a tensor's shape or dtype does not follow from the other fields.

    Source: Dettmers et al., 2023 (QLoRA, arXiv:2305.14314), section 3.
    """

    bits: int
    group_size: int
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    batch_dims: int
    row_dims: int
    codes: Tensor
    table: Tensor
    scale_codes: Tensor
    scale_steps: Tensor
    scale_mean: Tensor

    def __post_init__(self) -> None:
        what = "DoubleQuantizedCodebook"
        if self.group_size < 1:
            raise FormatError(f"{what}: group_size={self.group_size}, expected groups: a row has few scales.")
        batch, rows, columns = self.layout.matrix_shape
        groups = -(-columns // self.group_size)
        scales = (batch, rows, groups)
        check_tensor("scale_codes", self.scale_codes, scales, torch.float8_e4m3fn, what)
        blocks = (-(-batch * rows * groups // SCALE_BLOCK),)
        check_tensor("scale_steps", self.scale_steps, blocks, torch.float32, what)
        check_tensor("scale_mean", self.scale_mean, (), torch.float32, what)
        self._with_scale(torch.empty(scales, dtype=torch.bfloat16, device="meta"))

    @classmethod
    def of(cls, term: CodebookWeight, w: Tensor | None = None) -> DoubleQuantizedCodebook:
        """Quantize the scales of ``term``.

        Args:
            term: With scales of groups.
            w: ``[B, N, K]``: choose codes for these values and the new scales; None keeps the codes.

        Raises:
            FormatError: the term has no scales of groups.
        """
        if term.scale is None or not term.group_size:
            raise FormatError("DoubleQuantizedCodebook: the weight has no scales of groups to quantize.")
        flat = term.scale.float().reshape(-1)
        mean = flat.mean()
        padded = torch.nn.functional.pad(flat - mean, (0, -flat.numel() % SCALE_BLOCK))
        steps = padded.reshape(-1, SCALE_BLOCK).abs().amax(1) / _LARGEST
        steps = torch.where(steps > 0, steps, torch.ones_like(steps))
        wide = steps.repeat_interleave(SCALE_BLOCK)[: flat.numel()]
        codes = ((flat - mean) / wide).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        rest = (term.bits, term.group_size, term.shape, term.perm, term.batch_dims, term.row_dims)
        scale_codes = codes.reshape(term.scale.shape)
        made = cls(*rest, term.codes, term.table, scale_codes, steps, mean)
        if w is None:
            return made
        chosen = encode_codebook(w, term.table, made.scale(), term.group_size)
        packed = pack_codes(chosen, term.bits).contiguous()
        return cls(*rest, packed, term.table, scale_codes, steps, mean)

    @property
    def layout(self) -> WeightLayout:
        """The parameter's canonical view."""
        return WeightLayout(self.shape, self.perm, self.batch_dims, self.row_dims)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        return self.shape

    def scale(self) -> Tensor:
        """``[B, N, G]`` bfloat16."""
        import fxcompress.ops  # noqa: F401  (registers the operators)

        tensors = (self.scale_codes, self.scale_steps, self.scale_mean)
        value: Tensor = torch.ops.fxcompress.scales_of_codes.default(*tensors)
        return value

    def expanded(self) -> CodebookWeight:
        """The same weight with plain scales."""
        return self._with_scale(self.scale())

    def _with_scale(self, scale: Tensor) -> CodebookWeight:
        rest = (self.bits, self.group_size, self.shape, self.perm, self.batch_dims, self.row_dims)
        return CodebookWeight(*rest, self.codes, self.table, scale)

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """Scales first, then as :class:`CodebookWeight`."""
        return emit.call(
            torch.ops.fxcompress.dequantize_codebook.default,
            *self._tensors(emit),
            *(self.bits, self.group_size, list(self.shape), list(self.perm), self.batch_dims, self.row_dims),
            dtype,
        )

    def emit_rows(self, indices: Any, dtype: torch.dtype, emit: Emit) -> Any:
        """See :meth:`WeightTerm.emit_rows`."""
        if self.perm != (0, 1):
            return None
        target = torch.ops.fxcompress.codebook_embedding.default
        options = (self.bits, self.group_size, self.shape[1], dtype)
        return emit.call(target, indices, *self._tensors(emit), *options)

    def _tensors(self, emit: Emit) -> tuple[Any, Any, Any]:
        parts = (emit.tensor("scale_codes"), emit.tensor("scale_steps"), emit.tensor("scale_mean"))
        scale = emit.call(torch.ops.fxcompress.scales_of_codes.default, *parts)
        return emit.tensor("codes"), emit.tensor("table"), scale

    def describe(self) -> str:
        """E.g. ``"4-bit codes, one table, group 64, 8-bit scales"``."""
        size = f"{self.bits}-bit codes, {'one table' if self.table.shape[-2] == 1 else 'a table per row'}"
        return f"{size}, group {self.group_size}, 8-bit scales"


def round_to_codebook(
    term: CodebookWeight | DoubleQuantizedCodebook, w: Tensor
) -> CodebookWeight | DoubleQuantizedCodebook:
    """Other values in the form of ``term``: its table, new scales and codes.

    Args:
        term: Gives table, groups and kind.
        w: ``[B, N, K]``.
    """
    plain = term.expanded() if isinstance(term, DoubleQuantizedCodebook) else term
    scale = None if plain.scale is None else largest_magnitudes(w, plain.format)
    codes = pack_codes(encode_codebook(w, plain.table, scale, plain.group_size), plain.bits).contiguous()
    rest = (plain.bits, plain.group_size, plain.shape, plain.perm, plain.batch_dims, plain.row_dims)
    made = CodebookWeight(*rest, codes, plain.table, scale)
    return DoubleQuantizedCodebook.of(made, w) if isinstance(term, DoubleQuantizedCodebook) else made
