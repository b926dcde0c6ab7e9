"""Roofline table of linear kernels: generated ones beside ATen's, ONNX Runtime's (if installed) and float32,
taking turns in one run.

For every shape, form and number of tokens: time, weight bytes read and operations done per second, and both
as a share of what this machine was measured to stream and multiply in float32 (``torch.sum``, ``torch.mm``).
Single tokens are compared with sums over about as many bytes that take turns with them, since what was used
before, and how long a stream is, changes its rate as much as a kernel does.
The constants of ``backends/cpu/selection.py`` and ``isa.py`` come from this table.

Run: python -m tests.benchmarks.kernels [--shapes 8192x2048 576x1536] [--tokens 1 32 128 512] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.backends.cpu.generated import linear_form
from fxcompress.backends.cpu.kernel_types import LinearSpec
from fxcompress.backends.cpu.native import ensure_kernel
from fxcompress.backends.cpu.selection import choose_kernel, this_machine
from fxcompress.backends.cpu.tiled import kernel_group, tiled_layout
from fxcompress.formats import CodebookFormat, pack_codes
from fxcompress.formats.codebook import largest_magnitudes
from fxcompress.formats.integer import IntFormat, quantize_to_term
from fxcompress.forms import CodebookWeight, QuantizedWeight, WeightLayout
from tests.benchmarks.common import environment, write

FORMS = (  # bits, symmetric, group, activation
    (2, False, 64, None),
    (3, False, 64, None),
    (4, False, 64, None),
    (4, False, 64, "dynamic"),
    (4, False, 128, "dynamic"),
    (4, False, 0, "dynamic"),
    (5, False, 64, None),
    (6, False, 64, "dynamic"),
    (8, True, 0, None),
    (8, True, 0, "dynamic"),
)


TABLES = ((4, False, 64), (4, True, None), (3, True, None))  # bits, table per row, group
"""Codebooks: NF4's form, and learned tables of 4 and 3 bits."""


@dataclass(frozen=True)
class Variant:
    """One way to compute the product."""

    name: str
    run: Callable[[Tensor], Tensor]
    nbytes: int  # of the weight as it is read
    rest: float = 0.0  # seconds to wait after a call, for threads that spin on


@dataclass(frozen=True)
class Row:
    """One measurement."""

    rows: int
    columns: int
    tokens: int
    name: str
    milliseconds: float
    gigabytes: float
    gigaops: float
    streaming: float  # share of the measured streaming rate
    peak: float  # share of the measured float32 rate


def generated(weight: Tensor, bits: int, symmetric: bool, group: int, activation: str | None) -> Variant:
    rows, columns = weight.shape
    isa = this_machine().isa
    term: QuantizedWeight = quantize_to_term(
        weight, WeightLayout.rows(weight.shape), IntFormat(bits, symmetric, min(group, columns))
    )
    spec = LinearSpec(bits, symmetric, term.group_size, rows, columns, activation, None, torch.float32)
    form = linear_form(spec)
    if (reason := ensure_kernel(form, isa)) is not None:
        raise SystemExit(reason)
    packed = tiled_layout(isa).pack([term])
    operands = (packed["weight"], packed["scale"], packed.get("zero"), packed["total"], None, None, None)
    number = form.call_number(isa, kernel_group(term.group_size, columns))
    nbytes = sum(t.nbytes for t in operands if t is not None)
    operator = torch.ops.fxcompress_cpu.linear.default
    title = form.title.removeprefix("linear-").removesuffix("-float32-float32")
    name = f"{title}, {f'groups of {group}' if group else 'per row'}"
    return Variant(name, lambda x: operator(x, *operands, number), nbytes)


def looked_up(weight: Tensor, bits: int, per_row: bool, group: int | None, tokens: int) -> Variant:
    """Codes that index a table, by the kernel chosen for that many tokens; any values do."""
    rows, columns = weight.shape
    fmt = CodebookFormat(bits, group, per_row)
    table = torch.randn(fmt.table_shape(1, rows)).to(fmt.table_dtype)
    codes = pack_codes(torch.randint(0, 1 << bits, (1, rows, columns), dtype=torch.uint8), bits)
    scale = None if group is None else largest_magnitudes(weight[None], fmt)
    term = CodebookWeight(bits, group or 0, (rows, columns), (0, 1), 0, 1, codes, table, scale)
    sizes = (bits, True, group or 0, rows, columns, None, tokens, torch.float32)
    spec = LinearSpec(*sizes, table="rows" if per_row else "shared")
    kernel, text = choose_kernel(spec)
    if kernel is None:
        raise SystemExit(text)
    packed = kernel.layout.pack([term])  # type: ignore[list-item]
    name = f"t{bits}{'r' if per_row else ''}, {f'groups of {group}' if group else 'no scales'}"
    nbytes = packed["weight"].nbytes + packed["scale"].nbytes
    return Variant(name, lambda x: kernel.run(x, None, packed, spec), nbytes)


def atens(weight: Tensor) -> list[Variant]:
    rows, columns = weight.shape
    half = weight.to(torch.bfloat16)
    values = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
    ones = torch.ones(rows, dtype=torch.bfloat16)
    found = [
        Variant("ATen float32", lambda x: F.linear(x, weight), weight.nbytes),
        Variant("ATen bfloat16", lambda x: F.linear(x.to(torch.bfloat16), half), half.nbytes),
        Variant(
            "ATen int8 weight-only",
            lambda x: torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16), values, ones),
            values.nbytes,
        ),
        Variant("ATen int8×int8", lambda x: torch._int_mm(_two_rows(x), values.t()), values.nbytes),
    ]
    if columns % 64 == 0:
        codes = torch.randint(0, 16, (-(-rows // 64) * 64, columns), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.ones(columns // 64, codes.shape[0], 2, dtype=torch.bfloat16)
        found.append(
            Variant(
                "ATen int4 weight-only g64",
                lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
                    x.to(torch.bfloat16), packed, 64, scales
                ),
                packed.nbytes + scales.nbytes,
            )
        )
    return found


def onnx_runtime(weight: Tensor) -> list[Variant]:
    """ONNX Runtime's 4-bit product with 8-bit activations (``accuracy_level`` 4), where it is installed."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return []
    rows, columns = weight.shape
    blocks = -(-columns // 32)
    codes = np.random.default_rng(0).integers(0, 256, (rows, blocks, 16), dtype=np.uint8)
    scales = np.full((rows, blocks), 0.01, dtype=np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        **{"K": columns, "N": rows, "bits": 4, "block_size": 32, "accuracy_level": 4},
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", rows])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings)

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return [Variant("ONNX Runtime MatMulNBits", run, codes.nbytes + scales.nbytes, rest=0.02)]


def _two_rows(x: Tensor) -> Tensor:
    codes = x.to(torch.int8)
    return F.pad(codes, (0, 0, 0, 1)) if codes.shape[0] == 1 else codes  # _int_mm needs two


def best_times(variants: list[Variant], x: Tensor, seconds: float) -> dict[str, float]:
    """Median over rounds of the time of each variant, all taking turns."""
    for variant in variants:
        variant.run(x)
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[variants[0].name]) < 5:
        for variant in variants:
            start = time.perf_counter()
            variant.run(x)
            times[variant.name].append(time.perf_counter() - start)
            time.sleep(variant.rest)
    return {name: statistics.median(values) for name, values in times.items()}


def sums(rows: int, columns: int) -> list[Variant]:
    """Streams as long as weights of 4 and of 8 bits."""
    found = []
    for bits in (4, 8):
        big = torch.ones(rows * columns * bits // 32)
        found.append(Variant(f"torch.sum, {bits} bits a weight", lambda _, big=big: big.sum(), big.nbytes))  # type: ignore[misc]
    return found


def rates() -> tuple[float, float]:
    """Bytes per second of a sum over 256 MiB, float32 operations per second of a 1024³ product."""
    big, square = torch.ones(1 << 26), torch.randn(1024, 1024)
    streaming = Variant("", lambda _: big.sum(), 0)
    product = Variant("", lambda _: square @ square, 0)
    empty = torch.empty(0)
    return (
        big.nbytes / min(best_times([streaming], empty, 1.0).values()),
        2 * 1024**3 / min(best_times([product], empty, 1.0).values()),
    )


def call_overhead() -> float:
    """Microseconds of a call whose product is tiny."""
    variant = generated(torch.randn(16, 16), 8, True, 0, None)
    x = torch.randn(1, 16)
    for _ in range(100):
        variant.run(x)
    start = time.perf_counter()
    for _ in range(5000):
        variant.run(x)
    return (time.perf_counter() - start) / 5000 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shapes",
        nargs="*",
        default=["8192x2048", "960x576", "3072x576", "576x1536"],
        help="outputs x inputs",
    )
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 32, 128, 512])
    parser.add_argument("--seconds", type=float, default=2.0, help="per shape and number of tokens")
    parser.add_argument("--write", action="store_true", help="keep the result under tests/benchmarks/results")
    parser.add_argument("--suffix", default="", help="of the result's name, for another machine")
    options = parser.parse_args()
    streaming, peak = rates()
    overhead = call_overhead()
    say = sys.stdout.write
    say(
        f"{this_machine().isa.name}, {torch.get_num_threads()} threads: streams {streaming / 1e9:.1f} GB/s,"
        f" float32 {peak / 1e9:.0f} GOP/s, {overhead:.1f} µs per call\n"
    )
    table: list[Row] = []
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        weight = torch.randn(rows, columns)
        fixed = [generated(weight, *form) for form in FORMS] + atens(weight) + onnx_runtime(weight)
        for tokens in options.tokens:
            x = torch.randn(tokens, columns)
            streams = sums(rows, columns) if tokens == 1 else []
            variants = [*fixed, *(looked_up(weight, *table, tokens) for table in TABLES), *streams]
            found = best_times(variants, x, options.seconds)
            for variant in variants:
                seconds = found[variant.name]
                near = min(streams, key=lambda stream: abs(stream.nbytes - variant.nbytes), default=None)
                fastest = streaming if near is None else near.nbytes / found[near.name]
                moved, done = variant.nbytes / seconds, 2 * tokens * rows * columns / seconds
                row = Row(
                    *(rows, columns, tokens, variant.name, seconds * 1e3, moved / 1e9, done / 1e9),
                    *(moved / fastest, done / peak),
                )
                table.append(row)
                say(
                    f"{shape:>10} M={tokens:<4} {row.name:32} {row.milliseconds:9.3f} ms"
                    f" {row.gigabytes:7.2f} GB/s {row.gigaops:8.1f} GOP/s"
                    f" {row.streaming:6.0%} of streaming {row.peak:6.0%} of float32\n"
                )
    if options.write:
        content = {
            "environment": environment(["-m", "tests.benchmarks.kernels", *sys.argv[1:]]),
            "isa": this_machine().isa.name,
            "streaming bytes per second": streaming,
            "float32 operations per second": peak,
            "microseconds per call": overhead,
            "rows": [asdict(row) for row in table],
        }
        write(f"kernels{options.suffix}", content)


if __name__ == "__main__":
    main()
