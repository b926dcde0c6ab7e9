"""A cache of transformers whose attention layers keep keys and values in packed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fxcompress.backends.packed_layer import PackedLayer, SlidingLayer, Window
from fxcompress.errors import FxCompressError
from fxcompress.forms import CacheForm

__all__ = ["PackedCache", "PackedLayer"]


class PackedCache(Cache):
    """A cache whose attention layers keep keys and values in packed form.

    Args:
        config: Of the model.
        forms: By the model's layer number; other attention layers are kept exact, layers that are no
            attention as transformers keeps them.
        capacity: Tokens there is room for; None grows as needed. In compiled code a cache cannot grow:
            :meth:`reserve` before the call.
        offloading: See :class:`transformers.Cache`.

    Raises:
        FxCompressError: the configuration has other layers than ``forms``.

    Example:
        >>> cache = small.new_cache()  # doctest: +SKIP
        >>> small(input_ids, past_key_values=cache, use_cache=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: Any,
        forms: Mapping[int, CacheForm],
        capacity: int | None = None,
        *,
        offloading: bool = False,
    ) -> None:
        layers: list[Any] = list(DynamicCache(config=config).layers)
        unknown = sorted(number for number in forms if number >= len(layers))
        if unknown:
            raise FxCompressError(
                f"forms for the layers {unknown}, the cache of this model has {len(layers)}."
            )
        windows = _windows(layers, forms)
        for number, layer in enumerate(layers):
            if type(layer) is DynamicSlidingWindowLayer:
                window = windows[layer.sliding_window]
                layers[number] = SlidingLayer(forms.get(number), window, capacity)
            elif type(layer) is DynamicLayer:
                layers[number] = PackedLayer(forms.get(number), capacity)
            elif number in forms:
                raise FxCompressError(
                    f"layer {number}: its cache is a {type(layer).__name__}, which cannot be packed.",
                    fix="exclude this layer from the cache's quantization.",
                )
        super().__init__(layers=layers, offloading=offloading)

    @property
    def packed(self) -> list[PackedLayer]:
        """The layers of attentions."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in all; compiled code needs it before the call."""
        for layer in self.packed:
            layer.reserve(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens in every layer, or in none.

        Raises:
            FxCompressError: a positive number, or more than a sliding layer can take back.
        """
        for layer in self.packed:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def allocate(self, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Get memory for ``batch`` sequences now; whether all layers could, which needs their forms."""
        for layer in self.packed:
            if layer.form is not None and not layer.is_initialized:
                layer.allocate(batch, dtype, device)
        return all(isinstance(layer, PackedLayer) and layer.is_initialized for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed layers' memory."""
        return sum(layer.nbytes for layer in self.packed)


def _windows(layers: Sequence[Any], forms: Mapping[int, CacheForm]) -> dict[int, Window]:
    """By size, what the layers with a window of that size have in common."""
    found: dict[int, list[CacheForm | None]] = {}
    for number, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer:
            found.setdefault(layer.sliding_window, []).append(forms.get(number))
    return {size: Window.of(size, members) for size, members in found.items()}
