"""Which kernel a machine gets: with a compiler and without, with and without byte and bfloat16 products."""

from __future__ import annotations

import logging

import pytest
import torch

from fxcompress.backends.cpu import embeddings, generated
from fxcompress.backends.cpu.isa import AVX2, AVX512_VNNI, NEON, PORTABLE
from fxcompress.backends.cpu.kernel_types import LinearSpec
from fxcompress.backends.cpu.kernels import int4_layout_is_known
from fxcompress.backends.cpu.selection import Machine, choose_embedding, choose_kernel, this_machine

LAPTOP = Machine(AVX2, bfloat16=False, int8=False)
SERVER = Machine(AVX512_VNNI, bfloat16=True, int8=True)
MATRIX = Machine(AVX512_VNNI, bfloat16=True, int8=True, matrix_units=True)
ARM = Machine(NEON, bfloat16=True, int8=False)


def spec(
    bits: int,
    group: int = 0,
    activation: str | None = None,
    tokens: int | None = 1,
    dtype: torch.dtype = torch.float32,
) -> LinearSpec:
    return LinearSpec(bits, True, group, 64, 256, activation, tokens, dtype)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel exists, none is compiled."""
    monkeypatch.setattr(generated, "ensure_kernel", lambda form, isa: None)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (generated, embeddings):
        monkeypatch.setattr(module, "ensure_kernel", lambda form, isa: "no C++ compiler")


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize(
    ("machine", "use", "expected"),
    [
        (LAPTOP, spec(4, 64), "generated avx2 w4g-float32-float32"),
        (LAPTOP, spec(4, 64, tokens=None), "generated avx2 w4g-float32-float32"),
        (LAPTOP, spec(8, 0, "dynamic", 512), "generated avx2 w8-a8dynamic-float32-float32"),
        (LAPTOP, spec(3, 48, "static"), "generated avx2 w3g-a8static-float32-float32"),
        (SERVER, spec(4, 64), "generated avx512vnni w4g-float32-float32"),
        (SERVER, spec(4, 64, tokens=None), "generated avx512vnni bfloat16-w4g-float32-float32"),
        (SERVER, spec(4, 64, tokens=15), "generated avx512vnni w4g-float32-float32"),
        (MATRIX, spec(4, 64, tokens=None), "generated avx512vnni → bfloat16, oneDNN"),
        (ARM, spec(4, 64, tokens=None), "generated neon → bfloat16, oneDNN"),
        (SERVER, spec(8, 0, "dynamic", None), "generated avx512vnni w8-a8dynamic-float32-float32"),
    ],
)
def test_with_a_compiler(machine: Machine, use: LinearSpec, expected: str) -> None:
    kernel, text = choose_kernel(use, machine)
    assert kernel is not None
    assert text == expected


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("machine", "use", "expected"),
    [
        (SERVER, spec(8, 0, "dynamic"), "oneDNN int8×int8"),
        (SERVER, spec(8), "ATen int8 weight-only"),
        (SERVER, spec(8, tokens=512), "int8 → bfloat16, oneDNN"),
        (SERVER, spec(4, 64), "ATen int4 weight-only"),
        (LAPTOP, spec(3, 128), "ATen int4 weight-only"),
        (LAPTOP, spec(8), "ATen int8 weight-only"),
    ],
)
def test_without_a_compiler(machine: Machine, use: LinearSpec, expected: str) -> None:
    kernel, text = choose_kernel(use, machine)
    assert kernel is not None
    assert kernel.name == text == expected


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    "use", [spec(8, 0, None, 512), spec(4, 64, None, None), spec(8, 64), spec(5, 48, "dynamic")]
)
def test_float32_where_torchs_kernels_are_slow_or_missing(use: LinearSpec) -> None:
    kernel, reason = choose_kernel(use, LAPTOP)
    assert kernel is None
    assert "no C++ compiler" in reason


@pytest.mark.usefixtures("no_compiler")
def test_plain_byte_products_are_never_chosen_without_hardware() -> None:
    for tokens in (1, None):
        kernel, text = choose_kernel(spec(8, 0, "dynamic", tokens), LAPTOP)
        assert "int8×int8" not in text
        assert kernel is None or kernel.name == "ATen int8 weight-only"


@pytest.mark.usefixtures("no_compiler")
def test_int4_prefill_with_bfloat16_products() -> None:
    _, text = choose_kernel(spec(4, 64, tokens=None), SERVER)
    assert text == ("int4 → bfloat16, oneDNN" if int4_layout_is_known() else "ATen int4 weight-only")


def test_unsupported_dtypes_are_refused() -> None:
    kernel, reason = choose_kernel(spec(5, 48, dtype=torch.float64), LAPTOP)
    assert kernel is None
    assert "torch.float64" in reason


def test_embeddings() -> None:
    machine = Machine(PORTABLE, bfloat16=False, int8=False)
    assert choose_embedding(spec(4, 64, dtype=torch.float64), machine) is None
    rows = choose_embedding(spec(8, dtype=torch.float64), machine)
    assert rows is not None
    assert rows.layout.name == "int8-rows"


def test_this_machine_is_stable() -> None:
    assert this_machine() == this_machine()
    assert choose_kernel(spec(4, 64)) == choose_kernel(spec(4, 64))


def test_refusals_give_every_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generated, "ensure_kernel", lambda form, isa: "broken\nlong output")
    with caplog.at_level(logging.DEBUG):
        kernel, reason = choose_kernel(spec(8, 48), LAPTOP)
    assert kernel is None
    assert "broken" in reason
    assert "long output" not in reason
    assert "several scales per row" in reason
    assert "8-bit codes do not fit int4" in reason
