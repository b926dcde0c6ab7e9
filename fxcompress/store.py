"""The packed weights of one compressed model: built on demand from its forms, shared by all its graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fxcompress.edits import CompressionState
from fxcompress.errors import BindingError
from fxcompress.form_inputs import TensorRef, tensor_in
from fxcompress.forms import (
    CodebookWeight,
    FloatWeight,
    QuantizedWeight,
    SiteForm,
    SparseQuantizedWeight,
    SparseWeight,
)

PackedTerm = QuantizedWeight | CodebookWeight
"""Terms of dense codes, which every backend has layouts for."""
_Packable = PackedTerm | FloatWeight | SparseWeight | SparseQuantizedWeight


class WeightLayouter(Protocol):
    """A backend's memory layout (see ``fxcompress.backends.cpu.layouts``)."""

    @property
    def name(self) -> str:
        """Unique name; part of the key that packed tensors are kept under."""
        ...

    def pack(self, terms: Sequence[Any]) -> dict[str, Tensor]:
        """Lay out the terms."""
        ...


class WeightStore:
    """Owner of the compressed weights of one model (or of one set of parameters).

    Args:
        state: The forms; their tensors may be lazy (memory-mapped), packed results are resident.
    """

    def __init__(self, state: CompressionState) -> None:
        self.state = state
        self._packed: dict[tuple[str, tuple[TensorRef, ...]], dict[str, Tensor]] = {}
        self._raw: dict[TensorRef, Tensor] = {}
        self.executable: WeightStore | None = None  # a backend's own view, see backends/cpu/sparse.py
        self._device: torch.device | None = None

    def place(self, device: torch.device) -> None:
        """Keep tensors on ``device`` from now on; what was packed elsewhere is dropped."""
        if self._device is not None and self._device != device:
            self._packed.clear()
            self._raw.clear()
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where tensors are kept."""
        return self._device or torch.device("cpu")

    def form(self, name: str) -> SiteForm | None:
        """The form of ``name``, with its tensors."""
        return self.state.forms.get(name)

    def packed(self, layout: WeightLayouter, terms: Sequence[TensorRef]) -> Mapping[str, Tensor]:
        """Packed tensors of terms of codes, each named by its place, rows concatenated; built once.

        Raises:
            BindingError: a parameter has no weight of codes at that place.
        """
        key = (layout.name, tuple(terms))
        if key not in self._packed:
            found = [self._coded(ref) for ref in terms]
            self._packed[key] = {
                tensor: self._placed(value.contiguous()) for tensor, value in layout.pack(found).items()
            }
        return self._packed[key]

    def _coded(self, ref: TensorRef) -> _Packable:
        form = self.form(ref.name)
        part = dict(form.parts()).get(ref.path) if form is not None else None
        if not isinstance(part, _Packable):
            raise BindingError(f"{ref.name}: no weight of codes at {ref.path} to pack.")
        return part

    def tensor(self, ref: TensorRef) -> Tensor:
        """A form tensor in its stored layout, resident from now on."""
        if ref not in self._raw:
            form = self.form(ref.name)
            if form is None:
                raise BindingError(f"{ref.name}: has no form any more.")
            self._raw[ref] = self._placed(tensor_in(form, ref))
        return self._raw[ref]

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None else tensor.to(self._device)

    def resident_tensors(self) -> list[Tensor]:
        """Every tensor the store keeps in memory."""
        held = [tensor for packed in self._packed.values() for tensor in packed.values()]
        view = [] if self.executable is None else self.executable.resident_tensors()
        return [*held, *self._raw.values(), *view]
