"""Decode and prefill beside what people use today: torch, torchao, ONNX Runtime, llama.cpp; in turns.

Every contender generates after the same prompt and reads the same tokens. Ratios are medians of the ratio to
float32 eager torch in the same round. llama.cpp runs files requantized from the packaged weights by its own
tool, ONNX Runtime what its builder makes of them; both tell perplexities on held-out texts (``--quality``).

Needs what nothing else here does: pip install torchao llama-cpp-python onnxruntime-genai.

Run: python -m tests.benchmarks.peers [--model packaged synthetic-1b] [--rounds 5] [--prefill 128 512 2048]
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import fxcompress
from fxcompress.bench import BenchSettings, Variant, _Run
from tests.benchmarks import peers_onnx
from tests.benchmarks.common import environment, held_out, packaged_model, write
from tests.benchmarks.peers_gguf import FILE_TYPES, requantize, source_file
from tests.benchmarks.suites import mixed_widths
from tests.benchmarks.synthetic import synthetic_model

RECIPES: dict[str, Any] = {
    **{name: name for name in ("w4a16", "w4a8", "w8a8")},
    "w4 and w6, 16-bit activations": [*mixed_widths("quantize-weights"), "fuse-siblings"],
    "w4 and w6, 8-bit activations": [
        *mixed_widths("quantize-weights"),
        {"quantize-activations": {"bits": 8, "mode": "dynamic"}},
        "fuse-siblings",
    ],
}
PROMPT, STEPS, TRIES = 128, 63, 2


class Contender(Protocol):
    """Something that reads prompts and decodes."""

    def decode(self) -> float:
        """Tokens per second of greedy steps."""
        ...

    def prefill(self, tokens: int) -> float:
        """Tokens per second of reading a prompt."""
        ...


class TorchContender:
    """A callable model of transformers, measured as ``fxcompress bench`` does."""

    def __init__(self, name: str, model: Any, ids: Tensor) -> None:
        self._ids, self._model, self._name = ids, model, name
        self._shapes: list[tuple[Tensor, Tensor]] = []
        self._runs: dict[int, _Run] = {}

    def _run(self, tokens: int) -> _Run:
        if tokens not in self._runs:
            settings = BenchSettings(prompt=PROMPT, steps=STEPS, prefill=tokens)
            ids = self._ids[:, : max(tokens, PROMPT)]
            variant = Variant(self._name, self._model)
            self._runs[tokens] = _Run(variant, ids, settings, time.perf_counter, self._shapes)
        return self._runs[tokens]

    @torch.no_grad()
    def decode(self) -> float:
        run = self._run(PROMPT)
        with run._fixed_sizes():
            return run._decode()

    @torch.no_grad()
    def prefill(self, tokens: int) -> float:
        run = self._run(tokens)
        with run._fixed_sizes():
            return run._prefill()


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path, ids: Tensor) -> None:
        import llama_cpp

        self._ids = ids[0].tolist()
        threads = torch.get_num_threads()
        self._model = llama_cpp.Llama(
            str(path),
            n_ctx=len(self._ids) + 64,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def _logits(self) -> np.ndarray[Any, Any]:
        import llama_cpp

        pointer = llama_cpp.llama_get_logits_ith(self._model._ctx.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab(),))

    def decode(self) -> float:
        self._model.reset()
        self._model.eval(self._ids[:PROMPT])
        token = int(self._logits().argmax())
        started = time.perf_counter()
        for _ in range(STEPS):
            self._model.eval([token])
            token = int(self._logits().argmax())
        return STEPS / (time.perf_counter() - started)

    def prefill(self, tokens: int) -> float:
        self._model.reset()
        started = time.perf_counter()
        self._model.eval(self._ids[:tokens])
        return tokens / (time.perf_counter() - started)


def llama_perplexity(path: Path, windows: Tensor) -> float:
    """Perplexity of a GGUF file on windows of tokens, as ``quality.py`` measures it."""
    import llama_cpp

    length = windows.shape[1]
    model = llama_cpp.Llama(str(path), n_ctx=length, n_batch=length, logits_all=True, verbose=False)
    losses = []
    for row in windows:
        model.reset()
        model.eval(row.tolist())
        logits = torch.from_numpy(np.asarray(model.scores[: length - 1]).copy())
        losses.append(torch.nn.functional.cross_entropy(logits.float(), row[1:]))
    return math.exp(float(torch.stack(losses).mean()))


def torch_models(model: Any, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and maker of every torch contender; the first is the baseline."""

    def narrow() -> Any:
        return copy.deepcopy(model).to(torch.bfloat16)

    yield "torch fp32 eager", lambda: model
    yield "torch bf16 eager", narrow
    if not options.no_compiled:
        yield "torch bf16 Inductor, freezing", lambda: torch.compile(narrow(), options={"freezing": True})
        yield "torchao int4 g32, bf16, Inductor", lambda: torchao_model(narrow(), "int4")
        yield (
            "torchao int4, int8 activations, Inductor",
            lambda: torchao_model(copy.deepcopy(model), "int4-int8"),
        )
        yield "torchao int8 activations and weights, bf16, Inductor", lambda: torchao_model(narrow(), "int8")
    for recipe in options.recipes:
        yield f"fxcompress {recipe}", lambda recipe=recipe: compressed(model, recipe)


def compressed(model: Any, name: str) -> Any:
    """Ours; values do not matter here, so nothing is calibrated."""
    return fxcompress.compress(model, RECIPES.get(name, name), verify="off")


def torchao_model(model: Any, kind: str) -> Any:
    """A model quantized by torchao and compiled."""
    from torchao.prototype.quantization.int4.inference_workflow import (
        Int8DynamicActivationInt4WeightConfig,
        PrototypeInt4WeightOnlyConfig,
    )
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    configs: dict[str, Callable[[], Any]] = {
        "int4": lambda: PrototypeInt4WeightOnlyConfig(group_size=32),
        "int4-int8": lambda: Int8DynamicActivationInt4WeightConfig(group_size=32),
        "int8": Int8DynamicActivationInt8WeightConfig,
    }
    config = configs[kind]()
    quantize_(model, config)
    return torch.compile(model)


def measure(
    contenders: dict[str, Contender], prefills: list[int], rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Median rate and ratio to the first contender, by contender and measurement."""
    works: dict[str, Callable[[Contender], float]] = {"decode": lambda c: c.decode()}
    for tokens in prefills:
        works[f"prefill {tokens}"] = lambda c, tokens=tokens: c.prefill(tokens)  # type: ignore[misc]
    rates: dict[str, dict[str, list[float]]] = {name: {work: [] for work in works} for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            for work, run in works.items():
                tries = [run(contender) for _ in range(TRIES)]
                if turn:  # the first round compiles
                    rates[name][work].append(max(tries))
            sys.stderr.write(f"round {turn}: {name}\n")
    base = rates[next(iter(contenders))]
    return {
        name: {
            work: {
                "tokens/s": round(statistics.median(values), 1),
                "ratio": round(statistics.median(a / b for a, b in zip(values, base[work], strict=True)), 2),
            }
            for work, values in found.items()
        }
        for name, found in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="*", choices=["packaged", "synthetic-1b"], default=["packaged"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512, 2048])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--files", nargs="*", choices=list(FILE_TYPES), default=list(FILE_TYPES))
    parser.add_argument("--no-compiled", action="store_true", help="leave out what torch's compiler makes")
    parser.add_argument("--suffix", default="", help="of the result file's name")
    parser.add_argument("--quality", action="store_true", help="llama.cpp's perplexity, too")
    options = parser.parse_args()
    # All compiled contenders count against one limit; past it Dynamo would run the later ones uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for kind in options.model:
        model, tokenizer = packaged_model() if kind == "packaged" else (synthetic_model(), None)
        size = model.config.vocab_size
        ids = torch.randint(size, (1, max(*options.prefill, PROMPT)), generator=torch.manual_seed(0))
        failures: dict[str, str] = {}
        contenders: dict[str, Contender] = {}
        content: dict[str, Any] = {
            "environment": environment(["-m", "tests.benchmarks.peers", *sys.argv[1:]]),
            "versions": peer_versions(),
        }
        with tempfile.TemporaryDirectory() as folder:
            for name, make in torch_models(model, options):
                try:
                    contenders[name] = TorchContender(name, make(), ids)
                except Exception as error:  # a peer that cannot run is a result
                    failures[name] = reason(error)
                    sys.stderr.write(f"{name}: {failures[name]}\n")
            try:
                made = peers_onnx.build(model, tokenizer, Path(folder))
                name = f"ONNX Runtime int4 g{peers_onnx.BLOCK}"
                contenders[name] = peers_onnx.Genai(made, ids, PROMPT, STEPS)
                if options.quality and tokenizer is not None:
                    texts = held_out(tokenizer, 8)
                    found = {text: peers_onnx.perplexity(made, model, rows) for text, rows in texts.items()}
                    content.setdefault("perplexity", {})[name] = found
                    sys.stderr.write(f"{name}: {found}\n")
            except Exception as error:
                failures["ONNX Runtime"] = reason(error)
                sys.stderr.write(f"ONNX Runtime: {failures['ONNX Runtime']}\n")
            source = source_file(model, tokenizer, Path(folder))
            for file in options.files:
                path = requantize(source, Path(folder), file)
                contenders[f"llama.cpp {file}"] = LlamaCpp(path, ids)
                if options.quality and tokenizer is not None:
                    texts = held_out(tokenizer, 8)
                    found = {text: llama_perplexity(path, rows) for text, rows in texts.items()}
                    content.setdefault("perplexity", {})[f"llama.cpp {file}"] = found
                    sys.stderr.write(f"{file}: {found}\n")
            gc.collect()
            content["rates"] = measure(contenders, options.prefill, options.rounds)
        content["failures"] = failures
        write(f"peers-{kind}{options.suffix}", content)


def reason(error: Exception) -> str:
    """The first line of an error: those behind it may tell where things lie on this machine."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def peer_versions() -> dict[str, str]:
    """Versions of the other tools."""
    from importlib import metadata

    names = ("torchao", "llama-cpp-python", "onnxruntime", "onnxruntime-genai")
    return {name: metadata.version(name) for name in names}


if __name__ == "__main__":
    main()
