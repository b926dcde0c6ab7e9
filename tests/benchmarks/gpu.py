"""Generated Triton kernels on a CUDA device: correctness, then speed beside what torch has, within 9 minutes.

    python -m tests.benchmarks.gpu --write       on a machine with a GPU
    python -m tests.benchmarks.gpu --interpret   without: everything on tiny sizes, in Triton's interpreter
    python -m tests.benchmarks.gpu --compile     without: every kernel variant for sm_80 and sm_90

Measurements that no longer fit the time are listed as left out. Weights are random: no speed depends on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "1B": ((8192, 2048), (2048, 8192)),
    "8B": ((6144, 4096), (28672, 4096), (4096, 14336)),
    "70B": ((8192, 8192), (57344, 8192), (8192, 28672)),
}
"""Outputs × inputs of layers of decoders of about so many parameters, siblings joined."""
ROWS = (1, 4, 16, 64, 256, 2048)
CONTEXT = 32768


class Clock:
    """The time that is left.

    Args:
        seconds: In all.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def allows(self, what: str) -> bool:
        """Whether there is time for one more measurement; notes it when there is not."""
        if time.monotonic() < self.end:
            return True
        self.left_out.append(what)
        return False


def checks(device: str, examples: int) -> dict[str, str | None]:
    """Errors of the checks against the reference by name, from a process of their own."""
    environment = {
        **os.environ,
        "FXCOMPRESS_CHECK_DEVICE": device,
        "FXCOMPRESS_CHECK_EXAMPLES": str(examples),
    }
    command = [sys.executable, "-m", "tests.backends.triton_checks"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"all": done.stderr[-2000:]}
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def products(
    device: Any, sizes: dict[str, Any], rows: tuple[int, ...], clock: Clock, tune: bool
) -> Iterator[dict[str, Any]]:
    """One row per format, layer and number of rows."""
    import torch

    from fxcompress.backends.triton import configs, tuning
    from tests.benchmarks import gpu_formats

    known = tuning.current_device(device)
    for model, shapes in sizes.items():
        for outputs, inputs in shapes:
            for m in rows:
                shape = configs.Shape(configs.row_bucket(m), outputs, inputs)
                x = torch.randn(m, inputs, device=device, dtype=torch.bfloat16)
                for name, make in gpu_formats.FORMATS.items():
                    what = f"{name} {model} {outputs}x{inputs} {m}"
                    if not clock.allows(what):
                        continue
                    form, given, tensors = make(x, outputs)
                    run = partial(gpu_formats.run, form, x=given, tensors=tensors, outputs=outputs)
                    if tune:
                        tuning.tune(form, shape, known, run)
                    config = tuning.choose(form, shape, known)
                    yield {
                        "format": name,
                        "model": model,
                        "outputs": outputs,
                        "inputs": inputs,
                        "rows": m,
                        "seconds": tuning.measure(partial(run, config)),
                        "predicted": configs.cost(form, config, shape, known),
                        "bytes": configs.weight_bytes(form, shape) + 2 * m * (inputs + outputs),
                        "operations": 2 * m * outputs * inputs,
                        "config": config.to_dict(),
                    }
                    del tensors
                if clock.allows(f"torch {model} {outputs}x{inputs} {m}"):
                    yield from gpu_formats.torch_products(x, outputs, model)


def ceilings(device: Any, size: int) -> dict[str, float]:
    """Bytes per second copied, operations per second of a large bfloat16 product."""
    import torch

    from fxcompress.backends.triton.tuning import measure

    source = torch.empty(size * size * 8, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return {
        "copy": 2 * source.numel() / measure(lambda: target.copy_(source)),
        "bfloat16": 2 * size**3 / measure(lambda: square @ square),
    }


def environment(device: Any) -> dict[str, str]:
    """Names and versions."""
    import torch
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "command": "python -m tests.benchmarks.gpu --write",
    }


def keep_choices(device: Any) -> None:
    """Put what was measured on this device among the choices that come with the package."""
    from fxcompress.backends.triton import tuning

    measured = tuning.Choices(tuning.current_device(device)).path
    tuning.SHIPPED.mkdir(exist_ok=True)
    (tuning.SHIPPED / measured.name).write_bytes(measured.read_bytes())


def compile_everything() -> None:
    """Every variant of the tests, for both architectures."""
    from fxcompress.backends.triton.bytes_form import BytesForm
    from fxcompress.backends.triton.compilation import compile_kernel
    from tests.backends.test_triton_compiled import VARIANTS, name

    say = sys.stdout.write
    for variant in VARIANTS:
        form = variant.form
        native = isinstance(form, BytesForm) and form.codes != "int8" and not form.emulated
        for capability in (90,) if native else (80, 90):
            found = compile_kernel(
                form, variant.constants, capability, warps=variant.warps, stages=variant.stages
            )
            say(
                f"sm_{capability} {name(variant)}: {found.registers} registers, {found.stack} bytes of stack,"
                f" {found.shared} of shared memory, matrix units: {found.uses_tensor_cores}\n"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--interpret", action="store_true", help="tiny sizes, in Triton's interpreter")
    parser.add_argument("--compile", action="store_true", help="only compile every variant")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure configurations first, and keep the fastest; with --write, for the package",
    )
    parser.add_argument("--seconds", type=float, default=520, help="for everything")
    parser.add_argument("--write", action="store_true", help="keep the result under tests/benchmarks/results")
    parser.add_argument("--output", type=Path, help="keep the result in this file")
    options = parser.parse_args()
    if options.compile:
        compile_everything()
        return
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    clock = Clock(options.seconds)
    import torch

    from tests.benchmarks import gpu_decoding

    if not options.interpret and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --interpret runs tiny sizes in Triton's interpreter")
    device = torch.device("cpu" if options.interpret else "cuda")
    content: dict[str, Any] = {"environment": environment(device)}
    content["checks"] = checks(device.type, 2 if options.interpret else 3)
    tiny = options.interpret
    content["ceilings"] = ceilings(device, 64 if tiny else 8192)
    sizes: dict[str, Any] = {"tiny": ((48, 256),)} if tiny else SHAPES
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "decoder": lambda: gpu_decoding.decoder(device, tiny, clock),
        "attention": lambda: gpu_decoding.attention(device, 256 if tiny else CONTEXT, tiny, clock),
        "rows": lambda: gpu_decoding.row_kernels(device, tiny, clock),
        "products": lambda: list(products(device, sizes, (1, 5) if tiny else ROWS, clock, options.tune)),
    }
    for part, work in parts.items():
        content[part] = work()
    content["left out"] = clock.left_out
    text = json.dumps(content, indent=1)
    target = options.output
    if options.write and not tiny:
        target = (
            RESULTS
            / f"gpu-{''.join(c if c.isalnum() else '-' for c in content['environment']['device'])}.json"
        )
    if options.write and options.tune and not tiny:
        keep_choices(device)
    if target is not None:
        target.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    wrong = [name for name, error in content["checks"].items() if error is not None]
    if wrong:
        raise SystemExit(f"wrong results: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
