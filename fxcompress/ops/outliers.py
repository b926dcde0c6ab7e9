"""Outlier features found at run time, with static shapes and without a graph break.

Which channels are outliers depends on the data; how many there are would make shapes depend on it, too. So
``quantize_outlier_split`` returns the outlier part at full width, zero elsewhere, and ``outlier_product``,
one opaque node for every compiler, gathers the few channels that are not zero inside itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.formats.integer import decode_rows
from fxcompress.formats.packing import unpack_codes
from fxcompress.ops._library import composite, opaque

__all__: list[str] = []


@composite(
    "quantize_outlier_split(Tensor x, int bits, float threshold) -> (Tensor q, Tensor scale, Tensor rest)"
)
def _quantize_outlier_split(x: Tensor, bits: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales per token of ``x`` without its outlier channels, and those channels alone.

    A channel is an outlier when any token has ``|x| >= threshold`` there, or NaN. Returns ``q`` int8 and
    ``rest`` like ``x``, ``scale`` float32 ``[..., 1]`` as ``quantize_per_token`` gives it.
    """
    flat = x.reshape(-1, x.shape[-1])
    outlier = ~(flat.abs() < threshold).all(dim=0)  # [K]; NaN compares false
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    q, scale = torch.ops.fxcompress.quantize_per_token.default(torch.where(outlier, zero, x), bits)
    return q, scale, torch.where(outlier, x, zero)


def _product_shape(rest: Tensor, shape: Sequence[int], perm: Sequence[int]) -> list[int]:
    return [*rest.shape[:-1], shape[perm[0]]]


def _fake_outlier_product(
    rest: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    shape: Sequence[int],
    perm: Sequence[int],
) -> Tensor:
    return rest.new_empty(_product_shape(rest, shape, perm))


@opaque(
    "outlier_product(Tensor rest, Tensor codes, Tensor scale, Tensor? zero, int bits, int group_size,"
    " int[] shape, int[] perm) -> Tensor",
    fake=_fake_outlier_product,
)
def _outlier_product(
    rest: Tensor,  # [..., K], zero in all but a few channels
    codes: Tensor,  # [1, N, packed_width(K, bits)] uint8
    scale: Tensor,  # [1, N, G] or [1, 1, 1]
    zero: Tensor | None,  # uint8 like scale
    bits: int,
    group_size: int,
    shape: Sequence[int],  # of the parameter, two dimensions
    perm: Sequence[int],
) -> Tensor:
    """``rest @ Wᵀ`` from the channels that are not zero and the same columns of the packed weight."""
    width = shape[perm[1]]
    flat = rest.reshape(-1, width)
    columns = (flat != 0).any(dim=0).nonzero().flatten()  # NaN counts
    result = rest.new_zeros(_product_shape(rest, shape, perm))
    if not columns.numel():
        return result
    chosen = codes[0][:, columns] if bits == 8 else unpack_codes(codes[0], bits, width)[:, columns]
    groups = columns // group_size if group_size > 0 else None

    def per_column(table: Tensor) -> Tensor:  # [N, k], or what broadcasts to it
        return table[0] if groups is None else table[0][:, groups]

    # Every column has its own scale now: groups of one.
    offset = None if zero is None else per_column(zero)
    weight = decode_rows(chosen, per_column(scale), offset, bits, 0 if groups is None else 1, rest.dtype)
    return (flat[:, columns] @ weight.T).reshape(result.shape)
