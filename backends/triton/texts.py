"""Forms as text, which operators take: equal in every process, so that graphs compiled earlier stay valid."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from typing import Any

from fxcompress.backends.triton.bytes_form import BytesForm
from fxcompress.backends.triton.linear_form import LinearForm
from fxcompress.backends.triton.row_forms import HadamardForm, QuantizeForm
from fxcompress.backends.triton.sparse_form import SparseForm

__all__ = ["form_of", "text_of"]

_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (LinearForm, BytesForm, SparseForm, QuantizeForm, HadamardForm)
}


@functools.cache
def text_of(form: Any) -> str:
    """The form's class and fields."""
    return json.dumps([type(form).__name__, asdict(form)])


@functools.cache
def form_of(text: str) -> Any:
    """Inverse of :func:`text_of`."""
    kind, fields = json.loads(text)
    return _KINDS[kind](**fields)
