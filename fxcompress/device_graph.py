"""A step on fixed memory as one CUDA graph: the device runs its kernels without Python between them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

__all__ = ["DeviceGraph", "on_device"]

logger = logging.getLogger("fxcompress.decoding")


def on_device(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``step``, recorded where the device can record: on CUDA; elsewhere as it is.

    Args:
        step: Reads and writes tensors that stay where they are, and starts the same kernels every time.
        device: Where they lie.

    Example:
        >>> step = on_device(lambda: None, torch.device("cpu"))
        >>> step()
    """
    return DeviceGraph(step, device) if device.type == "cuda" else step


class DeviceGraph:
    """Runs a step once as it is, records it, then replays the recording.

    The first call makes what kernels allocate once and keep. Where the second cannot be recorded (something
    in it waits for the device), this and all later calls run the step as it is, and a line is logged.

    Args:
        step: See :func:`on_device`.
        device: A CUDA device.
    """

    def __init__(self, step: Callable[[], object], device: torch.device) -> None:
        self._step, self._device = step, device
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """One step."""
        self._calls += 1
        if self._graph is None and self._calls == 2:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def _record(self) -> None:
        """Record the step; recording runs nothing."""
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph):
                self._step()
        except Exception as error:
            logger.info("the step is not one CUDA graph: %s", str(error).splitlines()[0])
            torch.cuda.synchronize(self._device)
            return
        self._graph = graph
