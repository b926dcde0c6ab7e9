"""Sparse weights on the CPU: how they are held in memory, and which products read them as they are.

    linear(x, row_bitmap_dense(values, bits, offsets))  →  sparse_linear(x, …)                 few rows
                                                        →  linear(x, sparse_expand(…))         many rows

Everything else that is stored sparse is expanded when a model is bound: codes to codes with the zeros in
them, which the integer kernels take, other weights to dense ones. So nothing pays for a form that does not
pay, and :meth:`explain` says which is the case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompress.backends.cpu.generator import DTYPES
from fxcompress.backends.cpu.isa import Isa
from fxcompress.backends.cpu.native import ensure_kernel
from fxcompress.backends.cpu.selection import this_machine
from fxcompress.backends.cpu.sparse_form import SparseForm
from fxcompress.capture.program import Program
from fxcompress.errors import FormatError
from fxcompress.formats.sparse_index import nm_columns
from fxcompress.forms import (
    DenseWeight,
    DoubleQuantizedCodebook,
    SemiStructuredWeight,
    SiteForm,
    SparseQuantizedWeight,
    SparseWeight,
    TiledSparseWeight,
    WeightLayout,
    WeightTerm,
)
from fxcompress.forms.component import component
from fxcompress.forms.emit import Emit
from fxcompress.ops._library import composite
from fxcompress.store import WeightStore

aten = torch.ops.aten
CHUNK = 16  # inputs of a bitmap word
FEW_ROWS = {torch.float32: 32, torch.bfloat16: 8, torch.float16: 32}
"""Activation rows up to which entries are multiplied; more are multiplied with the expanded weight."""

_FLOATS = (SparseWeight, SemiStructuredWeight, TiledSparseWeight)
_SPARSE = (*_FLOATS, SparseQuantizedWeight, DoubleQuantizedCodebook)
"""Terms that run as others than they are stored."""


@composite(
    "row_bitmap_dense(Tensor values, Tensor bits, Tensor offsets, int columns, bool even, bool turned,"
    " ScalarType dtype) -> Tensor"
)
def _row_bitmap_dense(
    values: Tensor,  # [at least nnz + 16]
    bits: Tensor,  # [N, ceil(K / 16)] int16
    offsets: Tensor,  # [N] int64
    columns: int,
    even: bool,
    turned: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight, ``[N, K]``, or ``[K, N]`` if turned."""
    places = torch.arange(CHUNK, device=bits.device)
    mask = ((bits.to(torch.int32).unsqueeze(-1) >> places) & 1).flatten(1)
    slot = offsets[:, None] + mask.cumsum(1) - mask
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    dense = torch.where(mask.bool(), values[slot], zero)[:, :columns].to(dtype)
    return dense.t().contiguous() if turned else dense


@component("row-bitmap-weight")
@dataclass(frozen=True, eq=False)
class RowBitmapWeight(WeightTerm):
    """Entries row after row, a bitmap of 16 inputs a word: what the generated kernel reads. Never stored.

    Args:
        shape: Of the parameter, two dimensions.
        perm: ``(0, 1)`` when it is ``[N, K]``, ``(1, 0)`` when ``[K, N]``.
        values: ``[V]`` floating; at least 16 behind the last entry, which are read and not used.
        bits: ``[N, ceil(K / 16)]`` int16.
        offsets: ``[N]`` int64.
        even: Every word has exactly 8 bits set.
    """

    shape: tuple[int, ...]
    perm: tuple[int, ...]
    values: Tensor
    bits: Tensor
    offsets: Tensor
    even: bool

    @property
    def layout(self) -> WeightLayout:
        """The parameter's canonical view."""
        return WeightLayout(self.shape, self.perm)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter this term stands for."""
        return self.shape

    def emit(self, dtype: torch.dtype, emit: Emit) -> Any:
        """The dense weight."""
        tensors = (emit.tensor("values"), emit.tensor("bits"), emit.tensor("offsets"))
        columns, turned = self.layout.matrix_shape[2], self.perm != (0, 1)
        options = (columns, self.even, turned, dtype)
        return emit.call(torch.ops.fxcompress.row_bitmap_dense.default, *tensors, *options)


def row_bitmap(dense: Tensor, perm: tuple[int, ...]) -> RowBitmapWeight:
    """Lay out a weight of two dimensions.

    Words of at most half their inputs are filled up with zeros when the weight is about half full, so that
    every word has 8 (a 2:4 weight may hold zeros by itself). Else the values are padded to a multiple of 1/64
    of the weight: layers of equal shape and similar density then have equal sizes, and share compiled code.
    """
    matrix = dense if perm == (0, 1) else dense.t()
    keep = F.pad(matrix != 0, (0, -matrix.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    most = int(keep.sum(-1).max()) if keep.numel() else 0
    even = most == CHUNK // 2 and int(keep.sum()) > 0.4 * dense.numel()
    if even:
        keep = torch.zeros_like(keep).scatter(-1, nm_columns(keep.flatten(1), most, CHUNK), True)
    places = torch.arange(CHUNK, dtype=torch.int32)
    bits = (keep.to(torch.int32) << places).sum(-1).to(torch.int16)
    counts = keep.sum((1, 2))
    padded = F.pad(matrix, (0, -matrix.shape[1] % CHUNK))
    values = padded[keep.flatten(1)]
    spare = 0 if even else -values.numel() % max(1, dense.numel() // 64)
    values = F.pad(values, (0, spare + CHUNK))
    return RowBitmapWeight(tuple(dense.shape), perm, values, bits, counts.cumsum(0) - counts, even)


def pays(entries: int, elements: int, *, even: bool) -> bool:
    """Whether the kernel beats a dense product at one row, with weights that come from memory.

    A rule over densities, so that equal machines run equal kernels; ``tests/benchmarks/sparse_kernels.py``
    measures what it rests on. Where every 16 inputs hold 8 entries the kernel need not count them.
    """
    return entries <= (PAYS_EVEN if even else PAYS_BELOW) * elements


PAYS_BELOW = 0.3
"""Greatest share of entries at which the kernel beats a dense product."""
PAYS_EVEN = 0.5
"""The same where every 16 inputs have exactly 8 entries."""


class ExecutableStore(WeightStore):
    """A store whose sparse weights have the forms they are executed in.

    Its state describes these forms by tensors without storage, so that graphs can be rewritten; the tensors
    themselves are made when they are bound, and only those are kept.

    Args:
        source: The store of the forms as they are stored.
    """

    def __init__(self, source: WeightStore) -> None:
        self.source = source
        self.notes: dict[str, str] = {}
        state = source.state.copy()
        state.forms = _Forms(source.state.forms, self)  # type: ignore[assignment]
        super().__init__(state)

    def form(self, name: str) -> SiteForm | None:
        """See :class:`WeightStore`."""
        form = self.source.form(name)
        return form if form is None or not is_sparse(form) else self.running(name, form)

    def running(self, name: str, form: SiteForm) -> SiteForm:
        """The form in which a weight is computed."""
        dtype = self.source.state.weights[name].dtype
        terms = tuple(self._term(name, term, dtype) for term in form.terms)
        return replace(form, terms=terms)

    def _term(self, name: str, term: WeightTerm, dtype: torch.dtype) -> WeightTerm:
        if isinstance(term, DoubleQuantizedCodebook):
            self.notes[name] = f"stored as {term.describe()}, executed with plain scales"
            return term.expanded()
        if isinstance(term, SparseQuantizedWeight):
            self.notes[name] = f"stored as {term.describe()}, executed with its zeros as codes"
            return term.expanded()
        if not isinstance(term, _FLOATS):
            return term
        dense = term.dense(dtype)
        reason = _impossible(term, dense)
        if reason is None:
            laid_out = row_bitmap(dense, term.layout.perm)
            reason = _refuses(laid_out, int(dense.count_nonzero()))
            if reason is None:
                self.notes[name] = f"stored as {term.describe()}"
                return laid_out
        self.notes[name] = f"stored as {term.describe()}, executed dense: {reason}"
        return DenseWeight(dense)


class _Forms(Mapping[str, SiteForm]):
    """Forms of an :class:`ExecutableStore`, their tensors without storage."""

    def __init__(self, stored: Mapping[str, SiteForm], store: ExecutableStore) -> None:
        self._stored, self._store = stored, store
        self._known: dict[str, SiteForm] = {}

    def __getitem__(self, name: str) -> SiteForm:
        form = self._stored[name]
        if not is_sparse(form):
            return form
        if name not in self._known:
            made = self._store.running(name, form)
            self._known[name] = replace(made, terms=tuple(_without_storage(term) for term in made.terms))
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _without_storage(term: WeightTerm) -> WeightTerm:
    tensors = {
        field.name: value.to("meta")
        for field in fields(term)
        if isinstance(value := getattr(term, field.name), Tensor)
    }
    return replace(term, **tensors)


def is_sparse(form: SiteForm) -> bool:
    """Whether a form has a term that runs as another than it is stored: sparse, or with 8-bit scales."""
    return any(isinstance(term, _SPARSE) for term in form.terms)


def executable_store(store: WeightStore) -> WeightStore:
    """``store`` itself, or one that stands before it when it has sparse weights; the same at every call."""
    if isinstance(store, ExecutableStore) or not any(map(is_sparse, store.state.forms.values())):
        return store
    held = store.executable
    if not isinstance(held, ExecutableStore):
        held = store.executable = ExecutableStore(store)
    held.state.weights = store.state.weights
    return held


def noted(store: WeightStore, program: Program, choices: Mapping[str, str]) -> dict[str, str]:
    """Choices of a program's sparse weights, with how each is stored in front."""
    if not isinstance(store, ExecutableStore):
        return {}
    found = {}
    for name in set(program.weight_of.values()) & store.notes.keys():
        note, chosen = store.notes[name], choices.get(name, "")
        found[name] = chosen if chosen.startswith(note) else "; ".join(filter(None, (note, chosen)))
    return found


def _impossible(term: WeightTerm, dense: Tensor) -> str | None:
    """Why no kernel takes a weight, or None."""
    layout: WeightLayout = term.layout  # type: ignore[attr-defined]
    if dense.dim() != 2 or layout.batch_dims:
        return "it is no matrix"
    isa = this_machine().isa
    if dense.dtype not in DTYPES or isa.lanes != CHUNK:
        return f"there is no kernel of sparse {dense.dtype} weights for {isa.name}"
    return None


def _refuses(weight: RowBitmapWeight, entries: int) -> str | None:
    """Why a weight is not multiplied as it is stored, or None.

    The kernel is compiled now, so that only what exists is chosen.
    """
    elements = math.prod(weight.shape)
    if not pays(entries, elements, even=weight.even):
        return f"with {entries / max(1, elements):.0%} entries a dense product is faster"
    reason = ensure_kernel(SparseForm(DTYPES[weight.values.dtype], weight.even), this_machine().isa)
    return None if reason is None else reason.splitlines()[0]


def weight_of(node: fx.Node) -> fx.Node | None:
    """The ``row_bitmap_dense`` node that a linear multiplies with, or None."""
    if node.target is not aten.linear.default:
        return None
    weight = node.args[1]
    if isinstance(weight, fx.Node) and weight.target is aten.t.default:
        weight = weight.args[0]
    found = isinstance(weight, fx.Node) and weight.target is torch.ops.fxcompress.row_bitmap_dense.default
    return weight if found else None  # type: ignore[return-value]


def describe(node: fx.Node) -> str:
    """What computes a linear with a sparse weight."""
    value = node.meta["val"]
    return f"generated sparse, up to {FEW_ROWS[value.dtype]} rows; more: expanded, then dense"


def only_products(node: fx.Node) -> bool:
    """Whether a ``row_bitmap_dense`` node (or its transpose) is read by lowered products only."""
    if node.target is aten.t.default:
        source = node.args[0]
        if (
            not isinstance(source, fx.Node)
            or source.target is not torch.ops.fxcompress.row_bitmap_dense.default
        ):
            return False
    elif node.target is not torch.ops.fxcompress.row_bitmap_dense.default:
        return False
    return bool(node.users) and all(
        weight_of(user) is not None or (user.target is aten.t.default and only_products(user))
        for user in node.users
    )


def lower(node: fx.Node, value_of: Callable[[Any], Any], isa: Isa) -> Tensor | None:
    """The product of a linear with a sparse weight, or None for any other node."""
    weight = weight_of(node)
    if weight is None:
        return None
    x: Tensor = value_of(node.args[0])
    bias: Tensor | None = value_of(node.args[2]) if len(node.args) > 2 else None
    values, bits, offsets = (value_of(argument) for argument in weight.args[:3])
    columns, even = int(weight.args[3]), bool(weight.args[4])  # type: ignore[arg-type]
    if values.dtype != x.dtype:
        raise FormatError(f"sparse product of {x.dtype} activations and {values.dtype} values")
    number = SparseForm(DTYPES[values.dtype], even).number(isa)
    rows = x.shape[:-1].numel() if all(isinstance(size, int) for size in x.shape[:-1]) else None
    if rows is not None and rows <= FEW_ROWS[values.dtype]:
        wide = None if bias is None else bias.to(torch.float32)
        y: Tensor = torch.ops.fxcompress_cpu.sparse_linear(x, values, bits, offsets, wide, number)
        return y
    dense = torch.ops.fxcompress_cpu.sparse_expand(values, bits, offsets, columns, number)
    return F.linear(x, dense, bias)
