"""What checks of generated Triton kernels share: settings, random tensors, comparisons."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.backends.triton.configs import Config
from fxcompress.backends.triton.linear_form import LinearForm

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CLOSE = {"float16": 2e-3, "bfloat16": 1.5e-2}
few = settings(
    max_examples=int(os.environ.get("FXCOMPRESS_CHECK_EXAMPLES", "10")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
rows, outputs, inputs = st.integers(1, 18), st.integers(1, 40), st.integers(1, 290)
dtypes, flags = st.sampled_from(tuple(DTYPES)), st.booleans()


DEVICE = torch.device(os.environ.get("FXCOMPRESS_CHECK_DEVICE", "cpu"))
"""Where tensors lie: the CPU under the interpreter, ``cuda`` in tests/benchmarks/gpu.py."""


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device="cpu").to(DEVICE)


def random_codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8, device="cpu").to(DEVICE)


def assert_close(found: Tensor, expected: Tensor, dtype: str, what: object = "") -> None:
    assert found.shape == expected.shape
    error = (found.float() - expected).norm() / expected.norm().clamp_min(1e-20)
    shown = f" ({found.tolist()} for {expected.tolist()})" if found.numel() < 4 else ""
    assert error < CLOSE[dtype], f"{what}: {float(error):.2e}{shown}"


def config(
    splits: int = 1, *, scale_weight: bool = False, form: LinearForm | None = None, block_k: int = 64
) -> Config:
    """The smallest tiles; of a form with words, or ``block_k`` inputs."""
    block_k = block_k if form is None else form.block_k[0]
    return Config(16, 64, block_k, splits, 4, 2, scale_weight)


def unpacked(form: LinearForm) -> Config:
    """The weight unpacked first."""
    return Config(0, 64, max(form.block_k), 1, 4, 1, True, True)


def unaligned(x: Tensor) -> Tensor:
    """The same values one element behind an aligned address."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
