"""ONNX Runtime on our exports and on what its own quantizers make of the same model, interleaved.

    python -m tests.benchmarks.onnx [--layers 30] [--tokens 128] [--rounds 5] [--only files decoders]

Every candidate runs once per round, in turn, so that a slower machine slows all of them; what counts is
the ratio of the medians. Perplexities are over the same windows. Decoders are exported with their cache and
generate in onnxruntime-genai, beside the model its own builder makes; their first 32 greedy tokens are
compared with those of the compressed model in torch. Results go to ``results/onnx.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
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
from fxcompress.apply import apply_state
from fxcompress.backends.onnx.decoders import CachedDecoder, write_generation_files
from fxcompress.backends.onnx.export import Signature, export_program, run_applied
from fxcompress.backends.onnx.report import OnnxReport
from fxcompress.capture import capture_model
from fxcompress.edits import CompressionState
from tests.benchmarks import peers_onnx
from tests.benchmarks.common import (
    RESULTS,
    calibration_windows,
    environment,
    held_out,
    packaged_model,
    write,
)

OURS: dict[str, tuple[Any, int | None]] = {
    "ours w4a16": ("w4a16", None),
    "ours w4a16, accuracy_level=4": ("w4a16", 4),
    "ours w8a8 dynamic": ("w8a8", None),
    "ours w8a8 static": (
        [
            {"quantize-weights": {"bits": 8, "group_size": 0}},
            {"quantize-activations": {"mode": "static"}},
        ],
        None,
    ),
}
"""Name → recipe, accuracy level asked for."""


def float_model(model: Any, ids: Tensor, path: Path) -> None:
    """The model without compression, through the same export."""
    mask = torch.ones_like(ids)
    kwargs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    program = capture_model(model, (), kwargs)
    state = CompressionState(dict(model.named_parameters()))
    export_program(program, state, path, [ids, mask, False], signature=Signature(outputs=["logits"]))


def float_decoder(model: Any, tokenizer: Any, ids: Tensor, path: Path) -> OnnxReport:
    """The model without compression, with its cache."""
    decoder, state = CachedDecoder.capture(model, ids), CompressionState(dict(model.named_parameters()))
    reference = apply_state(decoder.program, state)
    return export_program(
        decoder.program,
        state,
        path,
        decoder.example,
        trials=decoder.trials(lambda flat: run_applied(reference, state, flat), one_by_one=True),
        signature=decoder.signature,
        beside=lambda folder: write_generation_files(model, tokenizer, folder, path.name, decoder),
    )


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
    # By default activations are signed, and ONNX Runtime 1.32 does not load the file; x86 wants these anyway.
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    products = ["MatMul"]
    quantize_static(
        source, made["static"], Reader(), per_channel=True, op_types_to_quantize=products, **kinds
    )
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
    options.add_session_config_entry(*peers_onnx.ALONE)
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


SMOOTH_STATIC = {"smooth-activations": {"alpha": "search", "activation_mode": "static"}}
INT8 = {"quantize-weights": {"bits": 8, "group_size": 0}}
DECODERS: dict[str, Any] = {
    "float32": None,
    "w4a16-gptq": "w4a16-gptq",
    "w8a8-smooth": "w8a8-smooth",
    "w8a8-smooth, static": [SMOOTH_STATIC, INT8, {"quantize-activations": {"mode": "static"}}],
    "prune20-flap-w4a16-gptq": "prune20-flap-w4a16-gptq",
    "svd-llm -20 %, 8 bits": [
        {"svd-llm": {"keep": 0.8}},
        {"quantize-weights": {"bits": 8, "group_size": 32, "only_remaining": True}},
    ],
}
FAST = ("w4a16-gptq", "svd-llm -20 %, 8 bits")
"""Those that are exported once more with ``accuracy_level=4``."""
STEPS, PROMPT, GREEDY = 63, 128, 32
BUILDER = "onnxruntime-genai builder, int4"


def greedy(folder: Path, ids: Tensor, count: int) -> list[int]:
    """Tokens that onnxruntime-genai generates from a folder."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    length = ids.shape[1] + count
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def greedy_plain(folder: Path, ids: Tensor, count: int) -> list[int]:
    """Tokens that a loop around plain onnxruntime chooses."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    shapes = {item.name: item.shape for item in session.get_inputs()}
    outputs = [item.name for item in session.get_outputs()]
    feeds = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_key_values")
    }
    found, given = ids[0].tolist(), ids.numpy()
    for _ in range(count):
        total = len(found)
        feeds["input_ids"], feeds["attention_mask"] = given, np.ones((1, total), np.int64)
        feeds["position_ids"] = np.arange(total - given.shape[1], total)[None]
        results = dict(zip(outputs, session.run(None, feeds), strict=True))
        feeds = {f"past_key_values.{k[8:]}": v for k, v in results.items() if k.startswith("present.")}
        found.append(int(results["logits"][0, -1].argmax()))
        given = np.array([[found[-1]]])
    return found


def equal_tokens(wanted: list[int], found: list[int], prompt: int) -> int:
    """How many tokens after the prompt are equal before the first that is not."""
    same = (i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)
    return next(same, len(wanted)) - prompt


@torch.no_grad()
def decoder_row(small: Any, report: OnnxReport, windows: Tensor, folder: Path) -> dict[str, float]:
    """How the text and the perplexity of an exported decoder compare with the model in torch."""
    prompt = windows[:1, :64]
    settings = {"max_new_tokens": GREEDY, "min_new_tokens": GREEDY, "do_sample": False}
    wanted = small.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)[0].tolist()
    ours = perplexity(lambda ids: small(input_ids=ids, use_cache=False).logits.float().numpy(), windows)
    there = peers_onnx.perplexity(folder, small, windows)
    return {
        "perplexity": there,
        "torch": ours,
        "change %": 100 * (there / ours - 1),
        "equal tokens, onnxruntime": equal_tokens(wanted, greedy_plain(folder, prompt, GREEDY), 64),
        "equal tokens, genai": equal_tokens(wanted, greedy(folder, prompt, GREEDY), 64),
        "largest relative error": max(part.relative for part in report.parity),
    }


def decoders(model: Any, tokenizer: Any, data: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """Decoding and prompts in onnxruntime-genai, the builder's model first; agreement with torch."""
    windows = torch.cat(list(held_out(tokenizer, 2).values()))
    built = peers_onnx.build(model, tokenizer, folder)
    folders = {BUILDER: built}
    rows: dict[str, dict[str, float]] = {
        BUILDER: {"perplexity": peers_onnx.perplexity(built, model, windows)}
    }
    example = {"input_ids": windows[:2, :32], "attention_mask": torch.ones(2, 32).long()}
    prompts = [{"input_ids": item["input_ids"][:, :256]} for item in data[:4]]
    for label, recipe in DECODERS.items():
        small = model
        if recipe is not None:
            given: dict[str, Any] = {"tokenizer": tokenizer, "progress": False, "verify": "off"}
            small = fxcompress.compress(model, recipe, data, **given)
        for level in (None, 4) if label in FAST else (None,):
            name = f"ours {label}" + ("" if level is None else f", accuracy_level={level}")
            folders[name] = folder / name
            folders[name].mkdir()
            path = folders[name] / "model.onnx"
            if recipe is None:
                report = float_decoder(model, tokenizer, windows[:2, :32], path)
            else:
                options: dict[str, Any] = {"example_inputs": example, "calibration": prompts}
                report = small.export_onnx(path, cache=True, accuracy_level=level, **options)
            rows[name] = decoder_row(small, report, windows, folders[name])
            sys.stderr.write(f"{name}: {report.accuracy_levels} {rows[name]}\n")
    ids = windows[:1, :512]
    running = {name: peers_onnx.Genai(path, ids, PROMPT, STEPS) for name, path in folders.items()}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for turn in range(rounds + 1):
        for name, one in running.items():
            found_rates = one.decode(), one.prefill(ids.shape[1])
            if turn:
                rates[name].append(found_rates)
    base = rates[BUILDER]
    for name, values in rates.items():
        pairs = list(zip(values, base, strict=True))
        rows[name]["megabytes"] = sum(f.stat().st_size for f in folders[name].glob("model.onnx*")) / 1e6
        rows[name]["decode, builder = 1"] = statistics.median(a[0] / b[0] for a, b in pairs)
        rows[name]["prompt, builder = 1"] = statistics.median(a[1] / b[1] for a, b in pairs)
        rows[name]["decode tokens/s"] = statistics.median(a[0] for a in values)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=["files", "decoders"], default=["files", "decoders"])
    arguments = parser.parse_args()
    model, tokenizer = packaged_model()
    model.model.layers = model.model.layers[: arguments.layers]
    model.config.num_hidden_layers = arguments.layers
    calibration = calibration_windows(tokenizer, 8)
    data = [{"input_ids": row[None]} for row in calibration]
    command = ["-m", "tests.benchmarks.onnx", *sys.argv[1:]]
    known = RESULTS / "onnx.json"
    content = json.loads(known.read_text()) if known.exists() else {}
    content["environment"] = environment(command)
    if "decoders" in arguments.only:
        with tempfile.TemporaryDirectory() as name:
            content["decoders"] = decoders(model, tokenizer, data, Path(name), arguments.rounds)
            write("onnx", content)
    if "files" in arguments.only:
        content["rows"] = files(model, tokenizer, calibration, data, arguments)
        write("onnx", content)


def files(
    model: Any, tokenizer: Any, calibration: Tensor, data: Any, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Size, perplexity and speed of whole sequences, of every file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "float.onnx"
        float_model(model, calibration[:2, :32], source)
        paths = {"float32": source, **runtime_quantizers(source, folder, calibration)}
        for label, (recipe, level) in OURS.items():
            small = fxcompress.compress(model, recipe, data, progress=False, verify="off")
            paths[label] = folder / f"{label.replace(' ', '_')}.onnx"
            example, *further = (
                {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
                for rows in (calibration[:2, :32], calibration[2:4, :256])
            )
            given: dict[str, Any] = {"example_inputs": example, "calibration": further}
            report = small.export_onnx(paths[label], accuracy_level=level, **given)
            sys.stderr.write(f"{label}: {report.accuracy_levels}\n")
        runners = {label: runner(path) for label, path in paths.items()}
        windows = torch.cat(list(held_out(tokenizer, arguments.windows).values()))
        prefill = measure(runners, windows[:1, : arguments.tokens], arguments.rounds)
        single = measure(runners, windows[:1, :1], 4 * arguments.rounds)
        return {
            label: {
                "megabytes": path.stat().st_size / 1e6,
                "perplexity": perplexity(runners[label], windows),
                "prefill speed, float32 = 1": prefill["float32"] / prefill[label],
                "one token speed, float32 = 1": single["float32"] / single[label],
            }
            for label, path in paths.items()
        }


if __name__ == "__main__":
    main()
