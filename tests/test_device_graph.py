"""Steps recorded on a device, and what a compressed model on a device is made of; no device is needed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.device_graph import DeviceGraph, on_device
from fxcompress.errors import FxCompressError
from fxcompress.ghost import ghost_copy

CUDA = torch.device("cuda")


class Recorder:
    """In place of a CUDA graph: remembers what was called while it recorded."""

    def __init__(self) -> None:
        self.recorded: Callable[[], object] | None = None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Graphs made during a test, by a runtime that is not there."""
    made: list[Recorder] = []

    def make() -> Recorder:
        made.append(Recorder())
        return made[-1]

    @contextlib.contextmanager
    def recording(graph: Recorder) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return made


def test_elsewhere_a_step_is_run_as_it_is() -> None:
    def step() -> None:
        return None

    assert on_device(step, torch.device("cpu")) is step
    assert isinstance(on_device(step, CUDA), DeviceGraph)


def test_the_second_step_is_recorded_and_all_later_ones_replayed(graphs: list[Recorder]) -> None:
    calls = []
    step = DeviceGraph(lambda: calls.append(1), CUDA)
    step()
    assert calls == [1]
    assert not graphs
    for _ in range(3):
        step()
    assert len(calls) == 2, "once as it is, once to be recorded"
    assert graphs[0].replays == 3


def test_a_step_that_waits_for_the_device_goes_on_as_it_is(
    graphs: list[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def step() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    run = DeviceGraph(step, CUDA)
    with caplog.at_level(logging.INFO, "fxcompress.decoding"):
        for _ in range(4):
            run()
    assert len(calls) == 5, "four steps, and the attempt"
    assert [record.getMessage() for record in caplog.records] == [
        "the step is not one CUDA graph: operation not permitted when stream is capturing"
    ]


def test_parameters_ghosts_and_buffers_go_where_the_model_runs() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    there = torch.device("meta")  # the one other device of every build
    copy = ghost_copy(model, {"0.bias": torch.ones(4)}, {"0.weight"}, None, there)
    assert {t.device for t in (*copy.parameters(), *copy.buffers())} == {there}
    assert copy.get_parameter("0.weight").stride() == (0, 0), "a ghost holds one number"
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_a_saved_model_is_loaded_on_a_device(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(2, 32)
    small = fxcompress.compress(model, "w8a16", example_inputs=(x,), progress=False)
    small.save(tmp_path / "out")
    again = fxcompress.load(tmp_path / "out", model, device="cpu")
    assert torch.equal(again(x), small(x))
    with pytest.raises(FxCompressError, match="device 'nowhere' cannot be used"):
        fxcompress.load(tmp_path / "out", model, device="nowhere")
    far = fxcompress.load(tmp_path / "out", model, device="meta")
    assert {p.device.type for p in far.model.parameters()} == {"meta"}
