"""``fxcompress bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from fxcompress.cli.common import (
    BackendOption,
    DebugOption,
    DeviceOption,
    DType,
    DTypeOption,
    ExistingPath,
    JsonOption,
    command,
    emit,
    load_any,
    megabytes,
    note,
)
from fxcompress.errors import FxCompressError


@command
def bench(
    path: ExistingPath,
    against: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="Measured beside it; the first is the baseline. Repeatable."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often all take turns.")] = 5,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens before decoding.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Decoding steps.")] = 63,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prefill measurement.")] = 512,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Measure PATH's kernels against the machine instead."),
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 leaves torch's choice.")] = 0,
    device: DeviceOption = "cpu",
    dtype: DTypeOption = DType.AUTO,
    backend: BackendOption = "inductor",
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure decode and prefill speed and weight memory of PATH, side by side with other models."""
    from fxcompress.bench import BenchSettings, Variant
    from fxcompress.bench import bench as measure

    if threads:
        torch.set_num_threads(threads)
    if kernels:
        emit_kernels(path, against, backend, device, dtype, json_output)
        return
    variants: list[Variant] = []
    for number, item in enumerate([*(against or []), path]):
        note(f"loading {item}")
        model, _ = load_any(item, device=device, dtype=dtype, backend=backend)
        if not hasattr(model, "config"):
            raise FxCompressError(f"{item}: its vocabulary is unknown, so there is nothing to feed it.")
        taken = {variant.name for variant in variants}
        name = item.name or str(item)
        variants.append(Variant(name if name not in taken else f"{name} ({number + 1})", model))
    settings = BenchSettings(prompt=prompt, steps=steps, prefill=prefill, rounds=rounds)
    result = measure(variants, settings=settings, progress=True)
    emit(result.to_dict(), json_output, table(result), Text(footer(result)))


def emit_kernels(
    path: Path, against: list[Path] | None, backend: str, device: str, dtype: DType, json_output: bool
) -> None:
    """Roofline table of a compressed model."""
    if against:
        raise FxCompressError("--kernels measures one model.", fix="leave out --against.")
    note(f"loading {path}")
    model, _ = load_any(path, device=device, dtype=dtype, backend=backend)
    if not hasattr(model, "measure_kernels"):
        raise FxCompressError(f"{path}: is not compressed, it has no kernels.", fix="compress it first.")
    size = getattr(model.config, "vocab_size", None)
    if not isinstance(size, int):
        raise FxCompressError(f"{path}: its vocabulary is unknown, so there is nothing to feed it.")
    note("compiling")
    model(input_ids=torch.arange(8).remainder(size)[None])
    rows = model.measure_kernels()
    emit({"kernels": rows}, json_output, kernel_table(rows))


def kernel_table(rows: list[dict[str, Any]]) -> Table:
    """One line per product and number of tokens (M)."""
    shown = Table("weights", "kernel", *("N×K", "M", "ms", "GB/s", "%", "GOP/s", "%"))
    for column in shown.columns[2:]:
        column.justify, column.no_wrap = "right", True
    before = ""
    for row in rows:
        names = [name.removesuffix(".weight").rsplit(".", 1)[-1] for name in row["weights"].split(", ")]
        weights = f"{' '.join(names)} ×{row['sites']}"
        shown.add_row(
            weights if row["weights"] != before else "",
            row["kernel"].removeprefix("generated ").removesuffix("-float32-float32"),
            *(f"{row['outputs']}×{row['inputs']}", str(row["tokens"]), f"{row['milliseconds']:.3f}"),
            *(f"{row['gigabytes']:.1f}", f"{100 * row['read share']:.0f}"),
            *(f"{row['gigaops']:.0f}", f"{100 * row['peak share']:.0f}"),
        )
        before = row["weights"]
    shown.caption = "%: of what all threads read, of the machine's products in the kernel's arithmetic"
    return shown


def table(result: object) -> Table:
    """Speeds, ratios to the baseline and memory, one row per variant."""
    from fxcompress.bench import BenchResult

    assert isinstance(result, BenchResult)
    shown = Table("variant", *("decode tok/s", "×", "prefill tok/s", "×", "weights MB"))
    for column in shown.columns[1:]:
        column.justify = "right"
    for item in result.variants:
        decode = ("–", "–") if item.decode is None else (f"{item.decode:.1f}", _ratio(item.decode_ratio))
        prefill = (f"{item.prefill:.0f}", _ratio(item.prefill_ratio))
        shown.add_row(item.name, *decode, *prefill, megabytes(item.weight_bytes))
    return shown


def footer(result: object) -> str:
    """Protocol and machine in one line."""
    from fxcompress.bench import BenchResult

    assert isinstance(result, BenchResult)
    s, m = result.settings, result.machine
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return (
        f"decode: {s.steps} greedy steps after {s.prompt} tokens; prefill: {s.prefill} tokens; medians of"
        f" {s.rounds} rounds, best of {s.tries} tries. {m['processor']}, {m['threads']} threads; {versions}."
    )


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
