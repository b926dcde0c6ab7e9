"""What a measurement was made on, for its record."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fxcompress.errors import FxCompressError

__all__ = ["machine", "physical_memory", "torch_device"]


def machine() -> dict[str, Any]:
    """Processor, threads, versions and command line of this process."""
    versions = {"python": platform.python_version()}
    for name in ("fxcompress", "torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": versions,
        "command": shlex.join(command),
    }


def physical_memory() -> int:
    """Bytes of memory the machine has; where the system does not say, more than anything asks for."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.machine()


def torch_device(name: str | torch.device) -> torch.device:
    """The device called ``name``.

    Raises:
        FxCompressError: no such device on this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise FxCompressError(f"device {str(name)!r} cannot be used: {reason}.", fix="try cpu.") from error
    return device
