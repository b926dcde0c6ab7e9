"""What tests of generated kernels share: random weights, the reference, and calls of a form's kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.backends.cpu.generator import DTYPES, KernelForm
from fxcompress.backends.cpu.isa import Isa
from fxcompress.backends.cpu.native import ensure_kernel
from fxcompress.backends.cpu.tiled import kernel_group, tiled_layout
from fxcompress.formats.integer import IntFormat, quantize_to_term
from fxcompress.forms import (
    ActivationQuantizer,
    DynamicPerToken,
    QuantizedWeight,
    StaticPerTensor,
    WeightLayout,
)
from fxcompress.ops import apply_quantizer

STATIC = StaticPerTensor(8, torch.tensor(0.03), torch.tensor(-7, dtype=torch.int32))


@dataclass(frozen=True)
class Case:
    """A form as a user meets it."""

    bits: int
    symmetric: bool
    group: int
    activation: ActivationQuantizer | None
    dtype: torch.dtype = torch.float32
    kind: str = "linear"

    @property
    def form(self) -> KernelForm:
        mode, bits = None, 0
        if self.activation is not None:
            mode, bits = "static" if isinstance(self.activation, StaticPerTensor) else "dynamic", 8
        dtype = DTYPES[self.dtype]
        return KernelForm(self.kind, self.bits, not self.symmetric, self.group > 0, mode, bits, dtype, dtype)


DYNAMIC = DynamicPerToken(8)
CASES = [  # every width, both kinds of zero-point and scale, all three activations, all dtypes
    Case(4, False, 64, None),
    Case(4, False, 48, DYNAMIC),
    Case(8, True, 0, DYNAMIC),
    Case(8, False, 0, STATIC),
    Case(2, True, 32, STATIC, torch.bfloat16),
    Case(3, False, 40, DYNAMIC),
    Case(5, True, 0, None, torch.float16),
    Case(6, False, 64, DYNAMIC),
    Case(7, True, 16, DYNAMIC),
    Case(8, False, 50, None),
    Case(2, True, 24, None),
]
QUICK = CASES[:2]
"""Compiling takes seconds per form: what is not about forms runs on these two."""


def random_term(rows: int, columns: int, case: Case, seed: int = 0) -> QuantizedWeight:
    value = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    fmt = IntFormat(case.bits, case.symmetric, min(case.group, columns))
    return quantize_to_term(value, WeightLayout.rows(value.shape), fmt)


def call(case: Case, isa: Isa, term: QuantizedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernel's result; compiles it when needed."""
    form = case.form
    assert ensure_kernel(form, isa) is None
    packed = tiled_layout(isa).pack([term])
    columns = term.shape[1]
    static = case.activation if isinstance(case.activation, StaticPerTensor) else None
    y: Tensor = torch.ops.fxcompress_cpu.linear(
        x,
        packed["weight"],
        packed["scale"],
        packed.get("zero"),
        packed["total"],
        bias,
        None if static is None else static.scale,
        None if static is None else static.zero,
        form.call_number(isa, kernel_group(term.group_size, columns)),
    )
    return y


def reference(case: Case, term: QuantizedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The form's value, float64 from the quantized activations on."""
    seen = x.float() if case.activation is None else apply_quantizer(x.float(), case.activation)
    bias = None if bias is None else bias.double()
    return torch.nn.functional.linear(seen.double(), term.dense(torch.float64), bias)


def error(y: Tensor, expected: Tensor) -> float:
    """Relative error in the norm."""
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Float32 sums; then one rounding to the output's dtype."""
