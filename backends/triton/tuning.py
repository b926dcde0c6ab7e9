"""Which configuration runs: one measured on this device before, else the model's choice.

Measuring is asked for, never done by surprise (``FXCOMPRESS_TRITON_TUNE=1``, or :func:`tune`): equal devices
then compute equal results, and compiling a dozen kernels per shape takes a minute that nobody expects.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.backends.triton.configs import Config, ProductForm, Shape, best, cost, ranked
from fxcompress.backends.triton.devices import KNOWN, Device, device_of
from fxcompress.backends.triton.generator import interpreted, source_folder

__all__ = [
    "TUNE_VARIABLE",
    "Choices",
    "choose",
    "copies",
    "current_device",
    "elapsed",
    "measure",
    "rotations",
    "tune",
]

logger = logging.getLogger("fxcompress.backends")
TUNE_VARIABLE = "FXCOMPRESS_TRITON_TUNE"
MOST_MEASURED = 12
"""Configurations that are measured: the first by the model."""
SHIPPED = Path(__file__).parent / "tuned"
"""Files of choices that come with the package: what ``tests/benchmarks/gpu.py --tune --write`` adds."""


def current_device(tensor_device: torch.device) -> Device:
    """The device of a tensor; for the interpreter, which has none, the first known one of capability 9.0."""
    if tensor_device.type == "cuda" and torch.cuda.is_available():
        return device_of(tensor_device)
    return next(device for device in KNOWN if device.capability == 90)


class Choices:
    """Measured choices of one device, kept in a file; those that came with the package where it has none.

    Args:
        device: The device.
        folder: Default: beside the generated sources.
        shipped: Folder of the files that came with the package.
    """

    def __init__(self, device: Device, folder: Path | None = None, shipped: Path = SHIPPED) -> None:
        name = "".join(c if c.isalnum() else "-" for c in device.name)
        self.path = (folder or source_folder()) / f"tuned-{name}-{device.capability}.json"
        self._known = _read(self.path)
        self._shipped = _read(shipped / self.path.name)

    def get(self, form: ProductForm, shape: Shape) -> Config | None:
        """The measured choice, or None."""
        key = _key(form, shape)
        found = self._known.get(key) or self._shipped.get(key)
        return None if found is None else Config(**found["config"])

    def put(self, form: ProductForm, shape: Shape, config: Config, seconds: float) -> None:
        """Keep a choice; written aside and renamed, merged with what other processes kept meanwhile."""
        entry = {"config": config.to_dict(), "seconds": seconds}
        self._known = {**_read(self.path), **self._known, _key(form, shape): entry}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._known, file, indent=1, sort_keys=True)
            os.replace(aside, self.path)
        except OSError as error:
            logger.info("%s: measured choices are not kept (%s)", self.path, error)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(form: ProductForm, shape: Shape) -> str:
    return f"{form.title} {shape.m}x{shape.n}x{shape.k}"


@functools.cache
def _choices(device: Device) -> Choices:
    return Choices(device)


@functools.lru_cache(maxsize=4096)
def choose(form: ProductForm, shape: Shape, device: Device) -> Config:
    """The configuration for a shape: measured, else the cheapest by the model."""
    return _choices(device).get(form, shape) or best(form, shape, device)


def tune(
    form: ProductForm,
    shape: Shape,
    device: Device,
    runs: Sequence[Callable[[Config], object]],
    most: int = MOST_MEASURED,
) -> list[dict[str, Any]]:
    """Measure the most promising configurations and keep the fastest.

    Args:
        form: Of the kernel.
        shape: Sizes to measure with.
        device: The device.
        runs: Each runs the product with a configuration, on tensors of its own (see :func:`copies`).
        most: Configurations that are measured, the first by the model.

    Returns:
        One row per configuration: ``config``, ``seconds`` (None where it failed), ``predicted``.
    """
    rows: list[dict[str, Any]] = []
    for config in ranked(form, shape, device)[:most]:
        row = {"config": config.to_dict(), "predicted": cost(form, config, shape, device)}
        try:
            row["seconds"] = measure(*(functools.partial(run, config) for run in runs))
        except Exception as error:  # a configuration that does not fit is no reason to fail
            logger.info("%s %s: %s", form.title, config, error)
            row["seconds"] = None
        rows.append(row)
    timed = [row for row in rows if row["seconds"] is not None]
    if timed:
        fastest = min(timed, key=lambda row: row["seconds"])
        _choices(device).put(form, shape, Config(**fastest["config"]), fastest["seconds"])
        choose.cache_clear()
    return rows


def copies(tensors: dict[str, Tensor], device: Device, most: int = 32) -> list[dict[str, Tensor]]:
    """The tensors, and as many copies that all together do not fit the device's cache."""
    count = rotations(sum(tensor.nbytes for tensor in tensors.values()), device, most)
    return [tensors, *({name: t.clone() for name, t in tensors.items()} for _ in range(count - 1))]


def rotations(nbytes: int, device: Device, most: int = 32) -> int:
    """How many tensors of a size do not fit the device's cache three times over."""
    return max(1, min(most, math.ceil(3 * device.cache / max(1, nbytes))))


_SPAN = 4e-3  # seconds of calls in a graph, where one call takes long
_CALLS = 40  # in a graph, where it does not


def measure(*works: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of one call: on a device the median of several replays of one graph of calls, by its own clock.

    Args:
        works: The same work on different tensors, taking turns, so that none finds its own in the cache.
        repeats: Replays.
    """
    for work in works:
        work()
    if interpreted() or not torch.cuda.is_available():
        start = time.perf_counter()
        works[0]()
        return time.perf_counter() - start
    one = elapsed(lambda: [work() for work in works]) / len(works)
    rounds = math.ceil(min(math.ceil(_SPAN / one), _CALLS) / len(works))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works * rounds:
            work()
    graph.replay()
    return statistics.median(elapsed(graph.replay) for _ in range(repeats)) / (rounds * len(works))


def elapsed(work: Callable[[], object]) -> float:
    """Seconds on the device, by its own clock."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def tuning_is_on() -> bool:
    """Whether shapes without a measured choice are measured when they first run."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return os.environ.get(TUNE_VARIABLE, "0") == "1" and not capturing and not interpreted()
