"""ONNX Runtime on our exports and on what its own quantizers make of the same model, interleaved.

    python -m tests.benchmarks.onnx [--layers 30] [--tokens 128] [--rounds 5]

Every candidate runs once per round, in turn, so that a slower machine slows all of them; what counts is
the ratio of the medians. Perplexities are over the same windows. Results go to ``results/onnx.json``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

import fxcompress
from fxcompress.backends.onnx.export import Signature, export_program
from fxcompress.capture import capture_model
from fxcompress.edits import CompressionState
from tests.benchmarks.common import calibration_windows, environment, held_out, packaged_model, write

OURS = {
    "ours w4a16": "w4a16",
    "ours w8a8 dynamic": "w8a8",
    "ours w8a8 static": [
        {"quantize-weights": {"bits": 8, "group_size": 0}},
        {"quantize-activations": {"mode": "static"}},
    ],
}


def float_model(model: Any, ids: Tensor, path: Path) -> None:
    """The model without compression, through the same export."""
    mask = torch.ones_like(ids)
    kwargs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    program = capture_model(model, (), kwargs)
    state = CompressionState(dict(model.named_parameters()))
    export_program(program, state, path, [ids, mask, False], signature=Signature(outputs=["logits"]))


def runtime_quantizers(source: Path, folder: Path, calibration: Tensor) -> dict[str, Path]:
    """What ONNX Runtime's quantizers make of ``source``."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(calibration[:, None, :64])

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            if row is None:
                return None
            return {"input_ids": row.numpy(), "attention_mask": np.ones(row.shape, np.int64)}

    made = {name: folder / f"{name.replace(' ', '_')}.onnx" for name in ("nbits", "dynamic", "static")}
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=64, is_symmetric=False, accuracy_level=4)
    quantizer.process()
    onnx.save(quantizer.model.model, made["nbits"])
    quantize_dynamic(source, made["dynamic"], weight_type=QuantType.QInt8, per_channel=True)
    quantize_static(source, made["static"], Reader(), per_channel=True, op_types_to_quantize=["MatMul"])
    return {
        "matmul_nbits_quantizer": made["nbits"],
        "quantize_dynamic": made["dynamic"],
        "quantize_static": made["static"],
    }


def runner(path: Path) -> Callable[[Tensor], np.ndarray]:
    """Logits of ``[B, T]`` ids."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(ids: Tensor) -> np.ndarray:
        feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
        logits: np.ndarray = session.run(["logits"], feeds)[0]
        return logits

    return run


def perplexity(run: Callable[[Tensor], np.ndarray], windows: Tensor) -> float:
    """Over independent windows."""
    losses = []
    for window in windows:
        logits = torch.from_numpy(run(window[None]))[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return math.exp(statistics.fmean(losses))


def measure(runners: dict[str, Any], ids: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds per call, interleaved; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for index in range(rounds + 1):
        for name, run in runners.items():
            start = time.perf_counter()
            run(ids)
            if index:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=2)
    arguments = parser.parse_args()
    model, tokenizer = packaged_model()
    model.model.layers = model.model.layers[: arguments.layers]
    model.config.num_hidden_layers = arguments.layers
    calibration = calibration_windows(tokenizer, 8)
    data = [{"input_ids": row[None]} for row in calibration]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "float.onnx"
        float_model(model, calibration[:2, :32], source)
        paths = {"float32": source, **runtime_quantizers(source, folder, calibration)}
        for label, recipe in OURS.items():
            small = fxcompress.compress(model, recipe, data, progress=False, verify="off")
            paths[label] = folder / f"{label.replace(' ', '_')}.onnx"
            example = {"input_ids": calibration[:2, :32], "attention_mask": torch.ones(2, 32).long()}
            small.export_onnx(paths[label], example_inputs=example)
        runners = {label: runner(path) for label, path in paths.items()}
        windows = torch.cat(list(held_out(tokenizer, arguments.windows).values()))
        prefill = measure(runners, windows[:1, : arguments.tokens], arguments.rounds)
        single = measure(runners, windows[:1, :1], 4 * arguments.rounds)
        rows = {
            label: {
                "megabytes": path.stat().st_size / 1e6,
                "perplexity": perplexity(runners[label], windows),
                "prefill speed, float32 = 1": prefill["float32"] / prefill[label],
                "one token speed, float32 = 1": single["float32"] / single[label],
            }
            for label, path in paths.items()
        }
    options = [f"--{key} {value}" for key, value in vars(arguments).items()]
    write("onnx", {"environment": environment(["-m tests.benchmarks.onnx", *options]), "rows": rows})


if __name__ == "__main__":
    main()
