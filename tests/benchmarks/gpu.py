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


def sizes(options: argparse.Namespace) -> Iterator[tuple[str, int, int, int]]:
    """Model, outputs, inputs and rows of every product."""
    if options.interpret:
        yield "tiny", 48, 256, 5
        return
    for model in options.layers:
        for outputs, inputs in SHAPES[model]:
            yield from ((model, outputs, inputs, rows) for rows in options.rows)


def products(device: Any, options: argparse.Namespace, clock: Clock) -> Iterator[dict[str, Any]]:
    """One row per format, layer and number of rows."""
    import torch

    from fxcompress.backends.triton import configs, tuning
    from fxcompress.backends.triton.launch import run_product
    from tests.benchmarks import gpu_formats, gpu_peers

    known = tuning.current_device(device)
    for model, outputs, inputs, m in sizes(options):
        shape = configs.Shape(configs.row_bucket(m), outputs, inputs)
        x = torch.randn(m, inputs, device=device, dtype=torch.bfloat16)
        for name in options.formats:
            what = f"{name} {model} {outputs}x{inputs} {m}"
            if not clock.allows(what):
                continue
            form, given, tensors = gpu_formats.FORMATS[name](x, outputs)
            runs = [
                partial(run_product, form, x=given, tensors=each, outputs=outputs)
                for each in tuning.copies(tensors, known)
            ]
            tried = tuning.tune(form, shape, known, runs, options.most) if options.tune else []
            config = tuning.choose(form, shape, known)
            yield {
                "format": name,
                "model": model,
                "outputs": outputs,
                "inputs": inputs,
                "rows": m,
                "seconds": tuning.measure(*(partial(run, config) for run in runs)),
                "predicted": configs.cost(form, config, shape, known),
                "bytes": configs.weight_bytes(form, shape) + 2 * m * (inputs + outputs),
                "operations": 2 * m * outputs * inputs,
                "config": config.to_dict(),
                **({"tried": tried} if options.keep_tried else {}),
            }
            del tensors, runs
        if options.peers and clock.allows(f"torch {model} {outputs}x{inputs} {m}"):
            yield from gpu_peers.torch_products(x, outputs, model, known)


def ceilings(device: Any, size: int) -> dict[str, float]:
    """Bytes per second copied, operations per second of a large bfloat16 product."""
    import torch

    from fxcompress.backends.triton.tuning import measure

    source = torch.ones(size * size * 2, device=device)
    target = torch.empty_like(source)
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return {
        # By a kernel: the copy engine, which a copy in a graph runs on, reached two thirds of it on an H200.
        "copy": 2 * source.nbytes / measure(lambda: torch.mul(source, 2, out=target)),
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


def parser() -> argparse.ArgumentParser:
    """Of the command line; ``gpu_compile`` shares it."""
    from tests.benchmarks.gpu_formats import FORMATS

    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add = found.add_argument
    add("--interpret", action="store_true", help="tiny sizes, in Triton's interpreter")
    add("--compile", action="store_true", help="only compile every variant, for both architectures")
    add(
        "--tune",
        action="store_true",
        help="measure configurations, keep the fastest; with --write, for the package",
    )
    add("--most", type=int, default=12, help="configurations to measure, the first by the cost model")
    add("--keep-tried", action="store_true", help="write every configuration's time")
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    add("--layers", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--rows", nargs="+", type=int, default=ROWS)
    add("--no-peers", dest="peers", action="store_false", help="leave out torch's and torchao's products")
    add("--seconds", type=float, default=520, help="for everything")
    add("--write", action="store_true", help="keep the result under tests/benchmarks/results")
    add("--output", type=Path, help="keep the result in this file")
    return found


PARTS = ("checks", "decoder", "attention", "rows", "products", "model")


def prepared(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Checks, and compiled kernels; all that does not need the device alone."""
    from tests.benchmarks import gpu_prepare

    programs = gpu_prepare.checks() if "checks" in options.parts else {}
    if "decoder" in options.parts:
        programs["compile: decoder"] = ["-m", "tests.benchmarks.gpu_decoding"]
    if "products" in options.parts:
        programs |= gpu_prepare.compilers(arguments)
    order = sorted(programs, key=lambda name: not name.startswith("compile"))
    return gpu_prepare.prepare("cuda", 3, {name: programs[name] for name in order}, options.seconds / 2)


def main() -> None:
    options = parser().parse_args()
    if options.compile:
        compile_everything()
        return
    tiny = options.interpret
    if tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    clock = Clock(options.seconds)
    import torch

    from tests.benchmarks import gpu_decoding, gpu_model, gpu_prepare

    if not tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --interpret runs tiny sizes in Triton's interpreter")
    device = torch.device("cpu" if tiny else "cuda")
    content: dict[str, Any] = {"environment": environment(device)}
    done = {} if tiny else prepared(options, sys.argv[1:])
    content["prepared"] = {name: row for name, row in done.items() if name.startswith("compile")}
    content["seconds of checks"] = {name: row["seconds"] for name, row in done.items()}
    content["models"] = {
        name: row.get("found") for name, row in done.items() if name.startswith(("layers", "dec"))
    }
    content["checks"] = gpu_prepare.verdicts(done)
    content["ceilings"] = ceilings(device, 64 if tiny else 8192)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "decoder": lambda: gpu_decoding.decoder(device, tiny, clock),
        "attention": lambda: gpu_decoding.attention(device, 256 if tiny else CONTEXT, tiny, clock),
        "rows": lambda: gpu_decoding.row_kernels(device, tiny, clock),
        "products": lambda: list(products(device, options, clock)),
        "model": lambda: gpu_model.rows(device, clock) if not tiny and gpu_model.installed() else [],
    }
    for part, work in parts.items():
        content[part] = work() if part in options.parts else []
        keep(content, clock, options)
    if not options.write and options.output is None:
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
    if options.write and options.tune and not tiny:
        keep_choices(device)
    wrong = [name for name, error in content["checks"].items() if error is not None]
    if wrong:
        raise SystemExit(f"wrong results: {', '.join(wrong)}")


def keep(content: dict[str, Any], clock: Clock, options: argparse.Namespace) -> None:
    """Write what there is so far."""
    content["left out"] = clock.left_out
    text = json.dumps(content, indent=1) + "\n"
    target = options.output
    if options.write and not options.interpret:
        name = "".join(c if c.isalnum() else "-" for c in content["environment"]["device"])
        target = RESULTS / f"gpu-{name}.json"
    if target is not None:
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
