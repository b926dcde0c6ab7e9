"""Kernels compiled ahead are those that are asked for; who needs one early waits; failures do not hang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress
from fxcompress.backends.cpu import native
from fxcompress.backends.cpu.forecast import forecast
from fxcompress.backends.cpu.generator import KernelForm
from fxcompress.backends.cpu.selection import this_machine
from tests.zoo import entry

ISA = this_machine().isa


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_KERNELS", "_FAILED", "_ON_THE_WAY"):
        monkeypatch.setattr(native, name, {})


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16", "w4a8", "w8a8", "nf4"])
def test_the_forecast_is_what_generation_asks_for(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    ensure = native.ensure_kernel

    def recorded(form: Any, isa: Any) -> str | None:
        asked.add(form.title)
        return ensure(form, isa)

    for module in ("generated", "embeddings", "attention", "codebook"):
        monkeypatch.setattr(f"fxcompress.backends.cpu.{module}.ensure_kernel", recorded)
    small = fxcompress.compress(entry("llama-tied-odd").build(), recipe, verify="off")
    ids = entry("llama-tied-odd").tensors(1, 5)["input_ids"]
    small.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    tables = {"model.embed_tokens.weight"}
    named = {form.title for form in forecast(small._store.state, tables, torch.float32, attention=True)}
    assert asked <= named
    # The head reads the last token only; with matrix units one of two ways for many tokens is taken.
    spare = {"dense-w8-bfloat16-bfloat16", "linear-bfloat16-w8-float32-float32"}
    if this_machine().matrix_units:
        spare |= {title for title in named if title.startswith("linear-bfloat16-")}
    assert named - asked <= spare


def test_whoever_needs_a_kernel_early_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXCOMPRESS_CACHE_DIR", str(tmp_path))
    form = KernelForm("embedding", 3, True, True, None, 0, "float32", "float32")
    native.prefetch([form], ISA)
    assert native.ensure_kernel(form, ISA) is None
    assert len(list(tmp_path.glob("embedding-w3zg-*.so"))) == 1
    assert not list(tmp_path.glob(".compiling-*"))


def test_a_failing_compiler_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXCOMPRESS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    form = KernelForm("embedding", 3, True, True, None, 0, "bfloat16", "bfloat16")
    native.prefetch([form], ISA)
    assert native.ensure_kernel(form, ISA) is not None


def test_other_dtypes_have_no_forecast() -> None:
    small = fxcompress.compress(entry("llama-tied-odd").build(), "w8a16", verify="off")
    assert forecast(small._store.state, set(), torch.float64, attention=True) == []
