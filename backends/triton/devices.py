"""What the choice of a kernel depends on: the device's instructions and its published rates."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

__all__ = ["KNOWN", "Device", "device_of"]


@dataclass(frozen=True)
class Device:
    """A CUDA device.

    Args:
        name: As the driver gives it, or a part of it.
        capability: Compute capability, e.g. 80.
        processors: Multiprocessors.
        bandwidth: Bytes per second of memory.
        half: Operations per second of 16-bit matrix products (dense).
        shared: Bytes of shared memory a program may use.
        clock: Cycles per second.
        cache: Bytes of second-level cache.
    """

    name: str
    capability: int
    processors: int
    bandwidth: float
    half: float
    shared: int
    clock: float
    cache: int

    @property
    def bytes_rate(self) -> float:
        """Operations per second of products of bytes."""
        return 2 * self.half

    @property
    def small_floats(self) -> bool:
        """Whether it multiplies 8-bit floats."""
        return self.capability >= 89

    @property
    def serves(self) -> bool:
        """Whether the kernels run: they need bfloat16 and asynchronous copies."""
        return self.capability >= 80


def _device(
    name: str, capability: int, processors: int, gigabytes: float, teraops: float, shared: int
) -> Device:
    clock = {80: 1.41e9, 86: 1.7e9, 89: 2.5e9, 90: 1.755e9}.get(capability, 1.7e9)
    cache = {80: 40, 86: 6, 89: 72, 90: 50}.get(capability, 40) << 20
    return Device(name, capability, processors, gigabytes * 1e9, teraops * 1e12, shared << 10, clock, cache)


KNOWN: tuple[Device, ...] = (
    _device("A100-SXM4-80GB", 80, 108, 2039, 312, 163),
    _device("A100-SXM4-40GB", 80, 108, 1555, 312, 163),
    _device("A100", 80, 108, 1935, 312, 163),
    _device("A10", 86, 72, 600, 125, 99),
    _device("A6000", 86, 84, 768, 155, 99),
    _device("RTX 3090", 86, 82, 936, 71, 99),
    _device("RTX 4090", 89, 128, 1008, 165, 99),
    _device("L40S", 89, 142, 864, 362, 99),
    _device("L4", 89, 58, 300, 121, 99),
    _device("H100 PCIe", 90, 114, 2000, 756, 227),
    _device("H100 NVL", 90, 132, 3900, 835, 227),
    _device("H100", 90, 132, 3350, 989, 227),
    _device("H200", 90, 132, 4800, 989, 227),
)
"""Published rates: memory bandwidth, dense 16-bit matrix products. The first name that fits serves."""


def device_of(device: torch.device) -> Device:
    """What is known of a CUDA device; rates are estimated for one that is not listed."""
    index: int | None = device.index
    return _found(torch.cuda.current_device() if index is None else index)


@functools.cache
def _found(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return from_properties(
        properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count
    )


def from_properties(name: str, capability: int, processors: int) -> Device:
    """The listed device of that name and capability; else one with rates by the number of multiprocessors."""
    for known in KNOWN:
        if known.name in name and known.capability == capability:
            return known
    if capability >= 90:
        return _device(name, capability, processors, 25 * processors, 7.5 * processors, 227)
    shared = 163 if capability in (80, 87) else 99
    return _device(name, capability, processors, 8 * processors, 2 * processors, shared)
