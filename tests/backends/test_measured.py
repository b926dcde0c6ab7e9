"""Measured choices of kernels: measured once, kept, the same for every later process."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.backends.cpu import measured
from fxcompress.backends.cpu.generated import GeneratedLinear
from fxcompress.backends.cpu.kernel_types import Kernel, LinearSpec
from fxcompress.backends.cpu.kernels import ATEN_KERNELS, Int4Unpacked, Int4WeightOnly, Int8Unpacked
from fxcompress.backends.cpu.measured import (
    OTHER_LAYOUT,
    SAME_LAYOUT,
    Answer,
    answer,
    bucket,
    measure_kernels,
    random_input,
    random_weight,
)
from fxcompress.backends.cpu.selection import candidates, choose_kernel, this_machine, why
from fxcompress.errors import BackendError
from fxcompress.formats.packing import unpack_codes

KERNELS: tuple[Kernel, ...] = (Int4WeightOnly(), Int4Unpacked(), Int8Unpacked())  # the last lies otherwise


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing measured yet, on disk and in the process; kernels stay compiled."""
    monkeypatch.setattr(measured, "selection_folder", lambda: tmp_path / "selection")
    monkeypatch.delenv(measured.SELECTION_VARIABLE, raising=False)
    monkeypatch.setattr(measured, "_ANSWERS", {})
    return tmp_path / "selection"


def spec(
    tokens: int | None = 1, *, rows: int = 512, columns: int = 512, activation: str | None = None
) -> LinearSpec:
    return LinearSpec(4, True, 0, rows, columns, activation, tokens, torch.float32)


class Clock:
    """Stands for :func:`measure_kernels`, and counts."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)
        self.asked: list[LinearSpec] = []

    def __call__(self, kernels: Sequence[Kernel], use: LinearSpec) -> list[float]:
        self.asked.append(use)
        return self.seconds[: len(kernels)]


def asked(clock: Clock, use: LinearSpec, kernels: Sequence[Kernel] = KERNELS) -> Answer:
    return answer(use, "a machine", kernels, measure=clock)


def test_measured_once_per_form_bucket_and_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(2.0, 1.0, 9.0)
    for tokens in (1, 2, 15, 3, 16, 100, 128, 5000, None):
        assert asked(clock, spec(tokens)).kernel == KERNELS[1].name
    assert [bucket(use.tokens) for use in clock.asked] == ["1", "2-15", "16-127", "128+"]
    asked(clock, spec(rows=513))
    asked(clock, spec(activation="dynamic"))
    torch.set_num_threads(torch.get_num_threads() + 1)
    asked(clock, spec())
    assert len(clock.asked) == len(list(folder.iterdir())) == 7
    monkeypatch.setattr(measured, "_ANSWERS", {})  # as another process starts
    torch.set_num_threads(torch.get_num_threads() - 1)
    other = Clock(1.0, 2.0, 9.0)
    assert asked(other, spec()).kernel == KERNELS[1].name
    assert other.asked == []


@given(first=st.floats(0.1, 10), same=st.floats(0.1, 10), other=st.floats(0.1, 10))
@settings(max_examples=50, deadline=None)
def test_another_kernel_must_be_clearly_faster(first: float, same: float, other: float) -> None:
    names = [kernel.name for kernel in KERNELS]
    chosen = measured._fastest(KERNELS, names, [first, same, other])
    gains = {names[0]: 1.0, names[1]: first / same / SAME_LAYOUT, names[2]: first / other / OTHER_LAYOUT}
    assert gains[chosen] == max(gains.values())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kernel": "gone", "seconds": {}}'])
def test_a_damaged_answer_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    asked(Clock(2.0, 1.0, 9.0), spec())
    (file,) = folder.iterdir()
    file.write_text(text)
    monkeypatch.setattr(measured, "_ANSWERS", {})
    clock = Clock(1.0, 2.0, 9.0)
    assert asked(clock, spec()).kernel == KERNELS[0].name
    assert len(clock.asked) == 1
    assert json.loads(file.read_text())["kernel"] == KERNELS[0].name
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_who_is_first_is_right_for_everybody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that measure at the same time, and disagree."""

    def slow(kernels: Sequence[Kernel], use: LinearSpec) -> list[float]:
        with monkeypatch.context() as patch:
            patch.setattr(measured, "_ANSWERS", {})
            asked(Clock(1.0, 2.0, 9.0), spec())  # the other process ends first
        return [2.0, 1.0, 9.0]

    found = answer(spec(), "a machine", KERNELS, measure=slow)
    assert found.kernel == KERNELS[0].name
    assert len(list(folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(measured, "selection_folder", lambda: blocked / "selection")
    measured._log_not_kept.cache_clear()
    clock = Clock(2.0, 1.0, 9.0)
    with caplog.at_level(logging.WARNING, "fxcompress.backends"):
        for _ in range(2):
            assert asked(clock, spec()).kernel == KERNELS[1].name
    assert len(clock.asked) == 1
    assert "hold for this process only" in caplog.text


def test_threads_of_one_process_agree() -> None:
    clock = Clock(2.0, 1.0, 9.0)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(asked(clock, spec()).kernel)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [KERNELS[1].name] * 8


@pytest.mark.parametrize("activation", [None, "dynamic", "static"])
@pytest.mark.parametrize("tokens", [1, 4, 32])
def test_every_kernel_can_be_measured(activation: str | None, tokens: int) -> None:
    for bits, symmetric, group in ((8, False, 0), (4, True, 64), (8, True, -1)):
        use = LinearSpec(bits, symmetric, group, 96, 208, activation, tokens, torch.float32)
        kernels = [
            kernel for kernel in (*candidates(this_machine()), *ATEN_KERNELS) if not kernel.refuses(use)
        ]
        assert any(isinstance(kernel, GeneratedLinear) for kernel in kernels)
        seconds = measure_kernels(kernels, use)
        assert all(0 < took < 60 for took in seconds)


@pytest.mark.parametrize(("table", "scaled"), [("shared", True), ("shared", False), ("rows", True)])
def test_codebooks_can_be_measured(table: str, scaled: bool) -> None:
    use = LinearSpec(
        3, True, 32 if scaled else 0, 64, 96, None, 32, torch.bfloat16, table=table, scaled=scaled
    )
    kernels = [kernel for kernel in candidates(this_machine(), table=True) if not kernel.refuses(use)]
    assert len(measure_kernels(kernels, use)) == len(kernels) >= 1


def test_what_is_measured_computes_the_product() -> None:
    use = dataclasses.replace(spec(4, activation="dynamic"), rows=64, columns=96)
    term, (x, quantized) = random_weight(use), random_input(use)
    assert quantized is not None
    dense = (unpack_codes(term.codes, 4, 96)[0].float() - 8) * 0.01
    expected = (quantized.codes.float() * quantized.scale) @ dense.T
    kernel = GeneratedLinear(this_machine().isa)
    assert kernel.refuses(use) is None
    torch.testing.assert_close(
        kernel.run(x, quantized, kernel.layout.pack([term]), use), expected, rtol=1e-3, atol=1e-3
    )


def test_the_model_runs_what_was_measured(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    use = spec(None, rows=1024)
    names = [kernel.describe(use) for kernel in candidates(this_machine()) if not kernel.refuses(use)]
    assert len(names) > 1
    monkeypatch.setattr(measured, "measure_kernels", lambda kernels, use: [*[1.0] * (len(kernels) - 1), 0.01])
    assert choose_kernel(use)[1] == names[-1]
    assert why(use)[0].startswith(f"measured here: {names[-1]} 10 ms")
    assert len(list(folder.iterdir())) == 1


def test_the_rule_on_request_for_small_weights_and_for_other_machines(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def never(kernels: Sequence[Kernel], use: LinearSpec) -> list[float]:
        raise AssertionError("measured")

    monkeypatch.setattr(measured, "measure_kernels", never)
    use = spec(None, rows=1024)
    first = next(kernel.describe(use) for kernel in candidates(this_machine()) if not kernel.refuses(use))
    assert choose_kernel(use, this_machine())[1] == first
    assert choose_kernel(spec(None, rows=64, columns=64))[0] is not None
    monkeypatch.setenv(measured.SELECTION_VARIABLE, "rule")
    assert choose_kernel(use)[1] == first
    assert not folder.exists()


def test_an_unknown_way_to_select_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(measured.SELECTION_VARIABLE, "fastest")
    with pytest.raises(BackendError, match=r"FXCOMPRESS_CPU_SELECTION='fastest'.*'measured' or 'rule'"):
        choose_kernel(spec(None, rows=1024))


SCRIPT = """
import pathlib
import sys
import torch
from fxcompress.backends.cpu import measured
from fxcompress.backends.cpu.kernel_types import LinearSpec
from fxcompress.backends.cpu.selection import why
measured.selection_folder = lambda: pathlib.Path(sys.argv[1])
torch.set_num_threads(1)
print(why(LinearSpec(4, True, 0, 1024, 512, None, None, torch.float32))[0])
"""


def test_two_processes_at_once_say_the_same(folder: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert said[0].startswith("measured here: ")
    assert said[0] == said[1]
    assert len(list(folder.iterdir())) == 1
