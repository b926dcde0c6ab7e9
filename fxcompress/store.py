"""The packed weights of one compressed model: built on demand from its forms, shared by all its graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from fxcompress.edits import CompressionState
from fxcompress.errors import BindingError
from fxcompress.form_inputs import TensorRef, form_tensor
from fxcompress.forms import QuantizedWeight


class WeightLayouter(Protocol):
    """A backend's memory layout (see ``fxcompress.backends.cpu.layouts``)."""

    @property
    def name(self) -> str:
        """Unique name; part of the key that packed tensors are kept under."""
        ...

    def pack(self, terms: Sequence[QuantizedWeight]) -> dict[str, Tensor]:
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

    def packed(self, layout: WeightLayouter, terms: Sequence[TensorRef]) -> Mapping[str, Tensor]:
        """Packed tensors of quantized terms, each named by its place, rows concatenated; built once.

        Raises:
            BindingError: a parameter has no quantized weight at that place.
        """
        key = (layout.name, tuple(terms))
        if key not in self._packed:
            found = [self._quantized(ref) for ref in terms]
            self._packed[key] = {tensor: value.contiguous() for tensor, value in layout.pack(found).items()}
        return self._packed[key]

    def _quantized(self, ref: TensorRef) -> QuantizedWeight:
        form = self.state.forms.get(ref.name)
        part = dict(form.parts()).get(ref.path) if form is not None else None
        if not isinstance(part, QuantizedWeight):
            raise BindingError(f"{ref.name}: no quantized weight at {ref.path} to pack.")
        return part

    def tensor(self, ref: TensorRef) -> Tensor:
        """A form tensor in its stored layout, resident from now on."""
        if ref not in self._raw:
            self._raw[ref] = form_tensor(self.state, ref)
        return self._raw[ref]

    def resident_tensors(self) -> list[Tensor]:
        """Every tensor the store keeps in memory."""
        return [tensor for packed in self._packed.values() for tensor in packed.values()] + list(
            self._raw.values()
        )
