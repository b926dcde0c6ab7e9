"""Store pruned weights without their zeros, in the smallest form that holds the same values.

    w with zeros                       →  entries + positions
    codes, of which some stand for 0   →  codes of the entries + positions, same scales

Changes no value: the state checks that every new form equals the old one bit for bit. What a form takes is
counted with everything it stores (positions, pointers, padding, scales), and where nothing is smaller than
the dense form, that stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from fxcompress.edits import Edit, Refuse, Repack
from fxcompress.errors import RecipeError
from fxcompress.forms import (
    BitmapIndex,
    CsrIndex,
    NmIndex,
    QuantizedWeight,
    SparseQuantizedWeight,
    SparseWeight,
    WeightTerm,
)
from fxcompress.pass_base import BlockContext
from fxcompress.passes._selection import SelectivePass, candidates
from fxcompress.passes._sparse_forms import semi_structured_form, sparse_forms, tiled_form

Form = Literal["auto", "nm", "bitmap", "csr", "semi-structured", "tiled"]
_INDEX = {"nm": NmIndex, "bitmap": BitmapIndex, "csr": CsrIndex}


@dataclass(frozen=True)
class PackSparse(SelectivePass):
    """Choose how pruned weights are stored.

    Args:
        form: ``"auto"``: the smallest of ``"nm"`` (positions within N:M groups), ``"bitmap"`` and ``"csr"``
            (compressed rows), or the dense form if none is smaller. These three by name, or a layout of CUDA
            kernels: ``"semi-structured"`` (2:4 as CUTLASS takes it) and ``"tiled"`` (tiles of 32-bit words,
            the form of Flash-LLM), for 16-bit floats. A form asked for by name is used even if it is larger.
            Default ``"auto"``.
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Raises:
        RecipeError: an option is out of range.

    Example:
        >>> PackSparse(form="bitmap").requires == frozenset({"sparse-weights"})
        True
    """

    form: Form = "auto"

    name: ClassVar[str] = "pack-sparse"
    summary: ClassVar[str] = "Store pruned weights without their zeros; changes no value."
    source: ClassVar[str] = "bitmaps, compressed rows; 2:4 as in CUTLASS; Xia et al., 2024 (Flash-LLM)"
    requires: ClassVar[frozenset[str]] = frozenset({"sparse-weights"})
    provides: ClassVar[frozenset[str]] = frozenset({"packed-sparse"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"packed-sparse"})
    preserves_function: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in get_args(Form):
            raise RecipeError(
                f"{self.name}: form={self.form!r}, expected one of {', '.join(map(repr, get_args(Form)))}."
            )

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield a :class:`Repack` or a :class:`Refuse` for every pruned weight of the block."""
        self.check_patterns(block.program)
        for candidate in candidates(block):
            if candidate.name in block.state.masks:
                yield self._edit(block, candidate.name)

    def _edit(self, block: BlockContext, name: str) -> Edit:
        reason = self.unselected(block.program, name)
        if reason is not None:
            return Refuse(name, reason)
        terms, mask = block.state.form(name).terms, block.state.masks[name]
        if len(terms) > 1 or (terms and not isinstance(terms[0], QuantizedWeight)):
            return Refuse(name, f"no sparse form of {' + '.join(term.describe() for term in terms)}")
        value: Tensor | QuantizedWeight = block.weight(name).detach() if not terms else terms[0]  # type: ignore[assignment]
        dense = value.nbytes
        found = self._find(value, block, name)
        if isinstance(found, str):
            return Refuse(name, f"stored dense: {found}")
        sizes = f"{_bits(found.nbytes, mask.keep)} bits per weight, dense {_bits(dense, mask.keep)}"
        text = f"{found.describe()}: {sizes}"
        if self.form == "auto" and found.nbytes >= dense:
            return Refuse(name, f"stored dense, the smallest sparse form is no smaller ({text})")
        return Repack(name, (found,), text)

    def _find(self, value: Tensor | QuantizedWeight, block: BlockContext, name: str) -> WeightTerm | str:
        """The form asked for, or why there is none."""
        mask = block.state.masks[name]
        if self.form in ("semi-structured", "tiled"):
            if isinstance(value, QuantizedWeight):
                return f"{self.form} forms hold floating-point values"
            make = semi_structured_form if self.form == "semi-structured" else tiled_form
            return make(value, mask)
        forms = list(sparse_forms(value, mask))
        if self.form == "auto":
            return min(forms, key=lambda term: term.nbytes)
        for term in forms:
            assert isinstance(term, SparseWeight | SparseQuantizedWeight)
            if isinstance(term.index, _INDEX[self.form]):
                return term
        return f"{mask.describe()} has no positions smaller than a bitmap"


def _bits(size: int, like: Tensor) -> str:
    return f"{8 * size / like.numel():.3g}"
