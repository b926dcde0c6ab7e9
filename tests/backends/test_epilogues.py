"""What kernels do behind a product, and which parts of a graph are left to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress
from fxcompress.backends.cpu.epilogues import FUNCTIONS, Epilogue, apply_gate
from fxcompress.backends.cpu.isa import PORTABLE, Isa, best_isa, processor_flags
from fxcompress.backends.cpu.native import ensure_kernel, python_linear, python_linear_residual
from fxcompress.backends.cpu.tiled import gated_layout, kernel_group, tiled_layout
from fxcompress.forms import StaticPerTensor
from tests.backends.kernel_cases import CASES, TOLERANCE, Case, error, random_term, reference

BEST = best_isa(processor_flags())
ops = torch.ops.fxcompress_cpu
CHOSEN = [CASES[0], CASES[1], CASES[3], CASES[4]]
OF_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


def operands(case: Case, isa: Isa, epilogue: Epilogue, term: Any, bias: Tensor | None) -> tuple[Any, ...]:
    assert ensure_kernel(case.form, isa) is None
    layout = gated_layout(isa, epilogue.gate_last) if epilogue.gated else tiled_layout(isa)
    packed = layout.pack([term])
    static = case.activation if isinstance(case.activation, StaticPerTensor) else None
    return (
        *(packed["weight"], packed["scale"], packed.get("zero"), packed["total"]),
        None if bias is None else layout.arrange(bias),
        None if static is None else static.scale,
        None if static is None else static.zero,
        case.form.call_number(isa, kernel_group(term.group_size, term.shape[1]), epilogue.code),
    )


def expected(epilogue: Epilogue, y: Tensor, residual: Tensor | None) -> Tensor:
    function = OF_NAME[epilogue.function]
    if epilogue.gated:
        one, two = y.chunk(2, dim=-1)
        y = one * function(two) if epilogue.gate_last else function(one) * two
    else:
        y = function(y)
    return y if residual is None else y + residual.double()


def name(value: object) -> str:
    return value.form.title if isinstance(value, Case) else str(value)


@pytest.mark.parametrize("case", CHOSEN, ids=name)
def test_every_epilogue(case: Case) -> None:
    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(1, 5),
        st.integers(0, 2 * BEST.lanes - 1),
        st.integers(1, 150),
        st.sampled_from([1, 2, 5, 15, 16, 40]),
        st.sampled_from(FUNCTIONS),
        st.sampled_from(["no gate", "gate first", "gate last"]),
        st.booleans(),
        st.booleans(),
        st.integers(0, 99),
    )
    def run(
        vectors: int,
        more: int,
        columns: int,
        tokens: int,
        function: str,
        gate: str,
        bias: bool,
        residual: bool,
        seed: int,
    ) -> None:
        gated = gate != "no gate"
        rows = 2 * vectors * BEST.lanes if gated else vectors * BEST.lanes + more
        epilogue = Epilogue(function, gated, gate == "gate last", residual)
        term = random_term(rows, columns, case, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(tokens, columns, generator=generator).to(case.dtype)
        added = torch.randn(rows, generator=generator) if bias else None
        width = rows // 2 if gated else rows
        other = torch.randn(tokens, width, generator=generator).to(case.dtype) if residual else None
        given = operands(case, BEST, epilogue, term, added)
        y = ops.linear(x, *given) if other is None else ops.linear_residual(x, other, *given)
        wanted = expected(epilogue, reference(case, term, x, added), other)
        assert y.shape == wanted.shape
        # A function may turn large outputs into small ones: errors are relative to what it was given.
        size = reference(case, term, x, added).norm().clamp(min=wanted.norm(), max=None)
        assert float((y.double() - wanted).norm() / size.clamp(min=1e-30)) < 2 * TOLERANCE[case.dtype]

    run()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_over_their_range(function: str) -> None:
    """An identity weight shows the function: everywhere as exact as float32 allows, faults stay visible."""
    case = Case(8, True, 0, None)
    values = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([1e-30, -1e-30, 0.0, 3e4, -3e4])])
    eye = dataclasses.replace(random_term(1, 1, case))
    x = values / float(eye.dense(torch.float32))
    given = operands(case, BEST, Epilogue(function), eye, None)
    seen = ops.linear(x[:, None], *given)[:, 0]
    exact = OF_NAME[function](
        ops.linear(x[:, None], *operands(case, BEST, Epilogue(), eye, None))[:, 0].double()
    )
    torch.testing.assert_close(seen.double(), exact, rtol=3e-6, atol=3e-6)
    fault = torch.tensor([[float("nan")], [1.0]])
    assert ops.linear(fault, *given).isnan().squeeze(1).tolist() == [True, False]


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=name)
def test_portable(case: Case) -> None:
    term = random_term(4 * PORTABLE.lanes, 70, case)
    for epilogue in (Epilogue("silu", gated=True), Epilogue("gelu", gated=True, gate_last=True)):
        for tokens in (3, 9):
            x = torch.randn(tokens, 70)
            y = ops.linear(x, *operands(case, PORTABLE, epilogue, term, None))
            assert error(y, expected(epilogue, reference(case, term, x), None)) < 5e-6


def test_residuals_of_any_strides() -> None:
    case = CASES[1]
    term = random_term(20, 64, case)
    given = operands(case, BEST, Epilogue(), term, None)
    x = torch.randn(4, 5, 64)
    wide = torch.randn(4, 5, 40)
    plain = ops.linear(x, *given)
    for residual in (
        wide[..., :20],
        wide[..., ::2],
        torch.randn(5, 4, 20).transpose(0, 1),
        wide[:1, :, :20].expand(4, 5, 20),
    ):
        assert torch.equal(ops.linear_residual(x, residual, *given), plain + residual)
        assert torch.equal(python_linear_residual(x, residual, *given), plain + residual)
    for call in (ops.linear_residual, python_linear_residual):
        with pytest.raises(RuntimeError, match="another shape"):
            call(x, wide, *given)


def test_the_operators_keep_torchs_rules() -> None:
    case, x = CASES[0], torch.randn(2, 3, 64)
    term = random_term(4 * BEST.lanes, 64, case)
    given = operands(case, BEST, Epilogue("silu", gated=True), term, None)
    residual = torch.randn(2, 3, 2 * BEST.lanes)
    torch.library.opcheck(ops.linear.default, (x, *given))
    torch.library.opcheck(ops.linear_residual.default, (x, residual, *given))
    assert torch.equal(python_linear(x, *given), ops.linear(x, *given))


def test_a_gate_apart_is_the_same() -> None:
    case = CASES[0]
    term = random_term(6 * BEST.lanes, 64, case)
    for last in (False, True):
        epilogue = Epilogue("silu", gated=True, gate_last=last)
        given = operands(case, BEST, epilogue, term, None)
        x = torch.randn(3, 64)
        apart = ops.linear(x, *given[:-1], case.form.call_number(BEST, 64))
        torch.testing.assert_close(apply_gate(apart, "silu", BEST.lanes), ops.linear(x, *given))


class Gated(nn.Module):
    """The MLP of a decoder with everything that may be fused, and a head."""

    def __init__(self, hidden: int = 96, bias: bool = True) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(64, hidden, bias=bias), nn.Linear(64, hidden, bias=False)
        self.down, self.head = nn.Linear(hidden, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return x + F.gelu(self.head(x))


class Packed(Gated):
    """Gate and up in one weight, the gate behind."""

    def __init__(self, cut: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 192)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.cut(self.gate(x))
        return x + self.down(one * F.gelu(two, approximate="tanh"))


class Shown(Gated):
    """The gate is needed elsewhere, too."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return torch.cat([gate, self.down(F.silu(gate) * self.up(x))], dim=-1)


class Scaled(Gated):
    """A residual that is repeated, and one with a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.down(self.up(x)), alpha=2) + (self.head(x) + x[..., :1, :])


def compare(model: nn.Module, recipe: str) -> list[str]:
    """The compiled model against the reference; what was said to follow products."""
    model.eval()
    example = (torch.randn(3, 7, 64),)
    small, plain = (fxcompress.compress(model, recipe, [example], example_inputs=example) for _ in range(2))
    plain.set_backend("eager")
    for shape in ((3, 7, 64), (1, 1, 64)):
        x = torch.randn(shape)
        # Many rows of float activations are multiplied as bfloat16.
        assert error(small(x), plain(x).double()) < (4e-3 if recipe == "w4a16" else 1e-4)
    return sorted({text.partition(", ")[2] for text in small.explain().values()})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Gated, ["gelu + residual", "residual", "silu + gate"]),
        (lambda: Gated(bias=False), ["gelu + residual", "residual", "silu + gate"]),
        (lambda: Gated(hidden=90), ["", "gelu + residual", "residual"]),
        (lambda: Packed(lambda y: y.chunk(2, dim=-1)), ["gelu_tanh + gate", "residual"]),
        (lambda: Packed(lambda y: y.split(96, dim=-1)), ["gelu_tanh + gate", "residual"]),
        (lambda: Packed(lambda y: (y[..., :96], y[..., 96:])), ["gelu_tanh + gate", "residual"]),
        (Shown, [""]),
        (Scaled, [""]),
    ],
    ids=["gated", "without bias", "odd width", "chunk", "split", "slices", "shown", "scaled"],
)
def test_graphs(make: Callable[[], nn.Module], said: list[str]) -> None:
    assert compare(make(), "w8a8") == said


def test_graphs_of_float_activations() -> None:
    assert compare(Gated(), "w4a16") == ["gelu + residual", "residual", "silu + gate"]
