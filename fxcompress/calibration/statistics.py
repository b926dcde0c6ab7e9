"""Streaming statistics of a site's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.errors import CalibrationError

__all__ = ["ActivationStatistics", "as_tokens"]

# Up to this width the Gram matrix is summed in float64 (32 MiB); wider ones are summed in float32, because
# the matrix must be held once per distinct input of a block.
_FLOAT64_GRAM_WIDTH = 2048
_CHUNK = 8192  # tokens converted to float64 at a time


class ActivationStatistics:
    """Statistics of one activation ``x`` read as ``[T, K]``, all leading dimensions being tokens.

    Means and second moments are summed in float64 and given in float32. Convolutions read ``[B, K, …]``:
    their channel dimension is K.

    Args:
        name: What to call the activation in messages: the site's parameter and its input.
        gram: Whether to collect ``Σ x xᵀ / T`` too, K² numbers.

    Attributes:
        count: Tokens seen, T.
    """

    def __init__(self, name: str, *, gram: bool = False) -> None:
        self.name = name
        self.count = 0
        self._want_gram = gram
        self._minimum: Tensor | None = None  # [K] float32
        self._maximum: Tensor | None = None  # [K] float32
        self._sums: Tensor | None = None  # [3, K] float64: Σx, Σ|x|, Σx²
        self._gram: Tensor | None = None  # [K, K]

    def update(self, tokens: Tensor) -> None:
        """Add ``tokens: [T, K]``.

        Raises:
            CalibrationError: NaN or inf among them, or another width than before.
        """
        if tokens.shape[0] == 0:
            return
        x = tokens.detach().to(torch.float32)
        low, high = x.amin(0), x.amax(0)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise CalibrationError(
                f"{self.name}: the calibration run produced NaN or inf here.",
                fix="check the inputs and the model's numeric range (float16 overflows at 65504).",
            )
        if self._minimum is None or self._maximum is None or self._sums is None:
            self._minimum, self._maximum = low, high
            self._sums = torch.zeros(3, x.shape[1], dtype=torch.float64, device=x.device)
        elif low.shape != self._minimum.shape:
            raise CalibrationError(
                f"{self.name}: a batch has {low.numel()} channels, earlier ones had {self._minimum.numel()}."
            )
        else:
            self._minimum = torch.minimum(self._minimum, low)
            self._maximum = torch.maximum(self._maximum, high)
        for part in x.split(_CHUNK):
            wide = part.to(torch.float64)
            self._sums += torch.stack([wide.sum(0), wide.abs().sum(0), wide.square().sum(0)])
        if self._want_gram:
            self._add_gram(x)
        self.count += x.shape[0]

    def _add_gram(self, x: Tensor) -> None:
        width = x.shape[1]
        if self._gram is None:
            dtype = torch.float64 if width <= _FLOAT64_GRAM_WIDTH else torch.float32
            self._gram = torch.zeros(width, width, dtype=dtype, device=x.device)
        self._gram += x.T @ x

    def _have(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise CalibrationError(
                f"{self.name}: no token reached this activation.", fix="use more or other calibration data."
            )
        return value

    @property
    def minimum(self) -> Tensor:
        """``[K]`` float32."""
        return self._have(self._minimum)

    @property
    def maximum(self) -> Tensor:
        """``[K]`` float32."""
        return self._have(self._maximum)

    @property
    def absmax(self) -> Tensor:
        """``[K]`` float32: max |x|."""
        return torch.maximum(self.maximum.abs(), self.minimum.abs())

    @property
    def mean(self) -> Tensor:
        """``[K]`` float32."""
        return (self._have(self._sums)[0] / self.count).to(torch.float32)

    @property
    def mean_abs(self) -> Tensor:
        """``[K]`` float32: mean |x|."""
        return (self._have(self._sums)[1] / self.count).to(torch.float32)

    @property
    def second_moment(self) -> Tensor:
        """``[K]`` float32: E[x²]."""
        return (self._have(self._sums)[2] / self.count).to(torch.float32)

    @property
    def variance(self) -> Tensor:
        """``[K]`` float32: E[(x − E[x])²], of the population; computed in float64."""
        first, _, second = self._have(self._sums) / self.count
        variance: Tensor = second - first.square()
        return variance.clamp_min(0).to(torch.float32)

    @property
    def gram(self) -> Tensor:
        """``[K, K]`` float32: Σ x xᵀ / T.

        Raises:
            CalibrationError: it was not asked for.
        """
        if not self._want_gram:
            raise CalibrationError(
                f"{self.name}: the Gram matrix was not collected.", fix="ask with gram=True."
            )
        return (self._have(self._gram) / self.count).to(torch.float32)


def as_tokens(site: Site, value: Any) -> Tensor:
    """Read a site's input as ``[T, K]``: the last dimension is K, for convolutions the channel dimension.

    Raises:
        CalibrationError: the input is no floating tensor (the indices of an embedding).
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise CalibrationError(
            f"{site.name}: its input is no activation but {getattr(value, 'dtype', type(value).__name__)}."
        )
    if site.kind in (SiteKind.CONV, SiteKind.CONV_TRANSPOSED):
        batched = value.dim() == len(site.layout.shape)
        value = value.movedim(1 if batched else 0, -1)
    tokens: Tensor = value.reshape(-1, value.shape[-1])
    return tokens
