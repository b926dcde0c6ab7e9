"""Checks of generated Triton kernels against reference computations, in Triton's interpreter.

Run as a program, because the interpreter has to be chosen before triton is imported:
``TRITON_INTERPRET=1 python -m tests.backends.triton_checks`` prints one JSON object: check → error or null.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from tests.backends import triton_product_checks, triton_row_checks
from tests.backends.triton_common import DEVICE

CHECKS: dict[str, Callable[[], Any]] = {
    name.removeprefix("check_"): check
    for part in (triton_product_checks, triton_row_checks)
    for name, check in vars(part).items()
    if name.startswith("check_")
}


def main() -> None:
    """Run all checks, or those named."""
    found: dict[str, str | None] = {}
    if DEVICE.type != "cpu":
        torch.set_default_device(DEVICE)
    for name in sys.argv[1:] or CHECKS:
        try:
            CHECKS[name]()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
