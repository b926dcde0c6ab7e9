"""Which kernels a compressed model will ask for, before any of its graphs is captured."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

import torch

from fxcompress.backends.cpu.cached_form import CachedAttentionForm
from fxcompress.backends.cpu.codebook import codebook_form, rows_form
from fxcompress.backends.cpu.embeddings import GeneratedEmbedding
from fxcompress.backends.cpu.generated import GeneratedBfloat16, GeneratedDense, linear_form
from fxcompress.backends.cpu.generator import DTYPES, AnyForm, AttentionForm
from fxcompress.backends.cpu.kernel_types import LinearSpec
from fxcompress.backends.cpu.native import prefetch
from fxcompress.backends.cpu.selection import candidates, this_machine
from fxcompress.edits import CompressionState
from fxcompress.forms import CodebookWeight, DynamicPerToken, SiteForm, StaticPerTensor
from fxcompress.store import PackedTerm


def forecast(
    state: CompressionState, tables: AbstractSet[str], dtype: torch.dtype, *, attention: bool
) -> list[AnyForm]:
    """Forms of the kernels that prompts need first, then those of single tokens.

    A guess: what is missing is compiled when it is met, what is not needed was compiled for the next model.

    Args:
        state: The compressed weights.
        tables: Names of weights that are looked up.
        dtype: Of the activations.
        attention: Whether the model attends.
    """
    if dtype not in DTYPES:
        return []
    wide: dict[AnyForm, None] = {}
    narrow: dict[AnyForm, None] = {}
    for name, form in state.forms.items():
        for spec in _specs(form, dtype):
            if spec.table is not None:
                if name in tables:
                    wide.setdefault(rows_form(spec, dtype))
                if this_machine().bfloat16 and spec.activation is None:
                    wide.setdefault(rows_form(spec, torch.bfloat16))
                narrow.setdefault(codebook_form(spec))
                continue
            if name in tables:
                wide.setdefault(GeneratedEmbedding.form(spec))
            if spec.activation is not None:
                wide.setdefault(linear_form(spec))
                continue
            for kernel in candidates(this_machine()):
                if isinstance(kernel, GeneratedBfloat16 | GeneratedDense):
                    wide.setdefault(kernel.form(spec))
            narrow.setdefault(linear_form(spec))
    caches = [form.cache for form in state.forms.values() if form.cache is not None]
    cached = [CachedAttentionForm.of(cache, DTYPES[dtype]) for cache in caches]
    read = [form for form in cached if form is not None]
    found: list[AnyForm] = [*wide, *([AttentionForm(DTYPES[dtype])] if attention else []), *narrow, *read]
    return list(dict.fromkeys(found))


def compile_ahead(
    state: CompressionState, tables: AbstractSet[str], dtype: torch.dtype, *, attention: bool
) -> None:
    """Start compiling what :func:`forecast` names."""
    prefetch(forecast(state, tables, dtype, attention=attention), this_machine().isa)


def _specs(form: SiteForm, dtype: torch.dtype) -> Iterator[LinearSpec]:
    """The products with codes; a second factor takes the result of the first, unquantized."""
    quantizer = {DynamicPerToken: "dynamic", StaticPerTensor: "static"}.get(type(form.activation))
    bits = getattr(form.activation, "bits", 8)
    for path, term in form.parts():
        if not isinstance(term, PackedTerm) or len(term.shape) != 2:
            continue
        activation = None if path.endswith(".u") else quantizer
        rows, columns = term.shape
        if isinstance(term, CodebookWeight):
            table = "rows" if term.per_row else "shared"
            shape = (term.bits, True, term.group_size, rows, columns)
            yield LinearSpec(*shape, activation, None, dtype, bits, table=table)
        else:
            shape = (term.bits, term.zero is None, term.group_size, rows, columns)
            yield LinearSpec(*shape, activation, None, dtype, bits)
