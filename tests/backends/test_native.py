"""The operators: schema, tracing, both callers, threads, and what happens when nothing can be compiled."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxcompress.backends.cpu import native
from fxcompress.backends.cpu.generator import KernelForm
from fxcompress.backends.cpu.isa import AVX2, NEON, best_isa, processor_flags
from fxcompress.backends.cpu.native import ensure_kernel, python_dense, python_embedding, python_linear
from fxcompress.backends.cpu.tiled import tiled_layout
from fxcompress.errors import BackendError
from tests.backends.kernel_cases import CASES, QUICK, call, random_term

BEST = best_isa(processor_flags())
ops = torch.ops.fxcompress_cpu


def arguments(index: int, x: torch.Tensor) -> tuple[object, ...]:
    case = CASES[index]
    term = random_term(20, 64, case)
    assert ensure_kernel(case.form, BEST) is None
    packed = tiled_layout(BEST).pack([term])
    weights = (packed["weight"], packed["scale"], packed["zero"], packed["total"], None, None, None)
    return (x, *weights, case.form.call_number(BEST, term.group_size))


@pytest.mark.parametrize("index", [0, 1])
def test_the_operator_keeps_torchs_rules(index: int) -> None:
    torch.library.opcheck(ops.linear.default, arguments(index, torch.randn(2, 3, 64)))


@pytest.mark.parametrize("index", [0, 1])
def test_python_calls_the_same_kernel(index: int) -> None:
    for x in (torch.randn(2, 3, 64), torch.randn(64), torch.randn(64, 5).t(), torch.randn(0, 64)):
        given = arguments(index, x)
        assert torch.equal(python_linear(*given), ops.linear(*given))  # type: ignore[arg-type]


def test_export_and_inductor_see_one_node() -> None:
    given = arguments(1, torch.randn(3, 64))

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.linear(x, *given[1:]) * 2  # type: ignore[no-any-return]

    x = torch.randn(3, 64)
    exported = torch.export.export(Model(), (x,))
    assert [str(n.target) for n in exported.graph.nodes if "fxcompress_cpu" in str(n.target)] == [
        "fxcompress_cpu.linear.default"
    ]
    assert torch.equal(exported.module()(x), Model()(x))
    assert torch.equal(torch.compile(Model())(x), Model()(x))


def test_unknown_kernels_are_named() -> None:
    given = list(arguments(0, torch.randn(1, 64)))
    given[8] = CASES[0].form.number(NEON if BEST is not NEON else AVX2)
    with pytest.raises(RuntimeError, match="is not loaded in this process"):
        ops.linear(*given)
    with pytest.raises(BackendError, match="is not loaded in this process"):
        python_linear(*given)  # type: ignore[arg-type]


def test_python_calls_embeddings_and_dense() -> None:
    term = random_term(50, 200, CASES[0])
    packed = tiled_layout(BEST).pack([term])
    shared = (packed["weight"], packed["scale"], packed["zero"])
    indices = torch.tensor([[3, 49], [0, 3]])
    for kind in ("embedding", "dense"):
        form = KernelForm(kind, 4, True, True, None, 0, "float32", "float32")
        assert ensure_kernel(form, BEST) is None
        number = form.call_number(BEST, 64)
        if kind == "dense":
            assert torch.equal(python_dense(*shared, 200, number), ops.dense(*shared, 200, number))
        else:
            given = (*shared, packed["total"], 200, number)
            assert torch.equal(python_embedding(indices, *given), ops.embedding(indices, *given))
            with pytest.raises(IndexError, match="outside 0…49"):
                python_embedding(torch.tensor([-1]), *given)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_threads_are_torchs_own() -> None:
    """Kernels add no OpenMP runtime and no pool: there are as many threads as after a torch operation."""
    program = """
import os, torch
from tests.backends.kernel_cases import QUICK, call, random_term
from fxcompress.backends.cpu.generator import KernelForm
from fxcompress.backends.cpu.isa import AVX2, NEON, best_isa, processor_flags
torch.set_num_threads(3)
value = torch.randn(1 << 20)
for _ in range(3): value.exp(); torch.randn(400, 400) @ torch.randn(400, 400)
before = len(os.listdir("/proc/self/task"))
for case in QUICK:
    term = random_term(500, 128, case)
    for tokens in (1, 64): call(case, best_isa(processor_flags()), term, torch.randn(tokens, 128))
runtimes = {l.split()[-1] for l in open("/proc/self/maps") if "gomp" in l or "iomp" in l or "libomp" in l}
print(before, len(os.listdir("/proc/self/task")), len(runtimes))
"""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "3"}
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    before, after, runtimes = map(int, answer.stdout.split())
    assert after == before
    assert runtimes == 1


def run_without(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    program = """
import logging, torch
logging.basicConfig(level=logging.WARNING)
from fxcompress.backends.cpu.kernel_types import LinearSpec
from fxcompress.backends.cpu.selection import choose_kernel
for bits in (8, 8, 5):
    print(choose_kernel(LinearSpec(bits, True, 0, 64, 256, None, 1, torch.float32))[1])
"""
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FXCOMPRESS_CACHE_DIR": str(tmp_path / "cache"), **environment},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_torchs_kernels_are_used(tmp_path: Path, compiler: str) -> None:
    result = run_without(tmp_path, CXX=compiler)
    assert result.stdout.splitlines()[0] == "ATen int8 weight-only"
    assert result.stderr.count("no generated kernels") == 1


def test_a_damaged_object_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example one of another processor that was copied under the right name."""
    monkeypatch.setenv("FXCOMPRESS_CACHE_DIR", str(tmp_path))
    path = native.compiled("stem", 'extern "C" int fx_abi() { return 0; }', ())
    path.write_bytes(b"\x7fELF of another machine")
    monkeypatch.setattr(native, "compiled", lambda *_: path)
    with pytest.raises(BackendError, match="cannot be loaded") as caught:
        native.load_kernel(CASES[0].form, BEST)
    assert "delete" in str(caught.value)


def test_failures_are_remembered_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def refuse(*_: object) -> None:
        calls.append(1)
        raise BackendError("the compiler is on holiday")

    monkeypatch.setattr(native, "load_kernel", refuse)
    monkeypatch.setattr(native, "_KERNELS", {})
    monkeypatch.setattr(native, "_FAILED", {})
    native._log_failure.cache_clear()
    with caplog.at_level(logging.WARNING, "fxcompress.backends"):
        for case in (QUICK[0], QUICK[0], QUICK[1]):
            assert ensure_kernel(case.form, BEST) == "the compiler is on holiday"
    assert len(calls) == 2
    assert caplog.text.count("on holiday") == 1


def test_kernels_of_one_process_do_not_mix() -> None:
    x = torch.randn(2, 64)
    results = [call(case, BEST, random_term(8, 64, case), x) for case in QUICK]
    assert not torch.equal(*results)
