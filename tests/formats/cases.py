"""Weights and formats that the format tests draw from."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.formats import IntFormat, decode, encode, find_parameters

PROPERTY = settings(deadline=None)  # times vary with the load of the machine

formats = st.builds(
    IntFormat,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([-1, 0, 1, 3, 8, 32]),
)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 21))


def normal(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def round_trip(w: Tensor, fmt: IntFormat, dtype: torch.dtype = torch.float64, **options: object) -> Tensor:
    scale, zero = find_parameters(w, fmt, **options)  # type: ignore[arg-type]
    return decode(encode(w, scale, zero, fmt), scale, zero, fmt, dtype)
