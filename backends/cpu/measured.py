"""Which of several kernels is fastest for a product: measured once on a machine, kept on disk, then fixed.

A question is a form, a shape, a bucket of tokens and a number of threads; its answer is one small file beside
the compiled kernels (``FXCOMPRESS_CACHE_DIR``, folder ``selection``). Who answers first is right for
everybody: an answer is never measured again while it is there, so that every later process computes the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fxcompress.backends.cpu.generator import ABI_VERSION, MANY_ROWS
from fxcompress.backends.cpu.kernel_types import Kernel, LinearSpec, QuantizedInput
from fxcompress.backends.cpu.toolchain import cache_directory
from fxcompress.errors import BackendError
from fxcompress.formats.packing import packed_width
from fxcompress.forms import CodebookWeight, QuantizedWeight

logger = logging.getLogger("fxcompress.backends")

SELECTION_VARIABLE = "FXCOMPRESS_CPU_SELECTION"
"""``measured`` (the default), or ``rule``: the first kernel by the order of ``selection.py``, everywhere."""
SMALLEST = 1 << 18
"""Numbers in a weight from which a measurement is worth its time: a smaller one is read in microseconds."""
SAME_LAYOUT = 1.15
"""How much faster than the rule's kernel another one must be: timings of equal kernels differ by less."""
OTHER_LAYOUT = 1.5
"""The same where the weight would have to lie in memory twice, for prompts and for single tokens."""
_REPRESENTATIVE = {"1": 1, "2-15": 4, "16-127": 32, "128+": 256}
_MOST_NUMBERS = 1 << 23  # of the weight that is measured; one with more outputs takes as long for each
_STREAMED = 1 << 26  # bytes of copies that a single token's weight is read from: more than a cache holds
_ROUNDS = 7
_HOPELESS = 4  # times slower than the best in the first round: no need for more rounds


def bucket(tokens: int | None) -> str:
    """The bucket of a number of activation rows.

    Example:
        >>> bucket(1), bucket(7), bucket(None)
        ('1', '2-15', '128+')
    """
    if tokens is None or tokens >= 128:
        return "128+"
    if tokens >= MANY_ROWS:
        return "16-127"
    return "1" if tokens <= 1 else "2-15"


def selection_folder() -> Path:
    """Where answers are kept."""
    return cache_directory() / "selection"


@dataclass(frozen=True)
class Question:
    """What an answer depends on.

    Args:
        spec: The use, with the tokens that its bucket is measured with.
        threads: Of torch.
        machine: Processor and instruction set.
        kernels: What :meth:`Kernel.describe` says of those that serve the use, the rule's first.
    """

    spec: LinearSpec
    threads: int
    machine: str
    kernels: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For people, and for the key."""
        spec = {name: str(value) if name == "dtype" else value for name, value in asdict(self.spec).items()}
        spec["tokens"] = bucket(self.spec.tokens)
        versions = {"torch": torch.__version__, "interface": ABI_VERSION}
        return {
            "use": spec,
            "threads": self.threads,
            "machine": self.machine,
            "kernels": list(self.kernels),
            **versions,
        }

    @property
    def path(self) -> Path:
        """Where the answer is kept."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        spec = self.spec
        stem = f"w{spec.bits}-{spec.rows}x{spec.columns}-{bucket(spec.tokens)}"
        return selection_folder() / f"{stem}-{key}.json"


@dataclass(frozen=True)
class Answer:
    """The fastest kernel, as :meth:`Kernel.describe` names it, and the seconds of all."""

    kernel: str
    seconds: Mapping[str, float]

    @property
    def text(self) -> str:
        """For explanations."""
        times = sorted(self.seconds.items(), key=lambda item: (item[0] != self.kernel, item[1]))
        return ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in times)


def is_on(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether kernels are measured.

    Raises:
        BackendError: the variable has an unknown value.
    """
    named = environment.get(SELECTION_VARIABLE) or "measured"
    if named not in ("measured", "rule"):
        raise BackendError(
            f"{SELECTION_VARIABLE}={named!r} is unknown.", fix="use 'measured' or 'rule', or unset it."
        )
    return named == "measured"


def worth_measuring(spec: LinearSpec) -> bool:
    """Whether a choice between kernels can be felt."""
    return spec.rows * spec.columns >= SMALLEST


def answer(
    spec: LinearSpec,
    machine: str,
    kernels: Sequence[Kernel],
    *,
    measure: Callable[[Sequence[Kernel], LinearSpec], list[float]] | None = None,
) -> Answer:
    """The kept answer, or one measured now and kept.

    Args:
        spec: The use; its tokens are replaced by those that stand for their bucket.
        machine: Processor and instruction set.
        kernels: At least two that serve the use, the rule's first.
        measure: Seconds of each. Default: :func:`measure_kernels`.
    """
    asked = replace(spec, tokens=_REPRESENTATIVE[bucket(spec.tokens)])
    names = tuple(kernel.describe(spec) for kernel in kernels)
    question = Question(asked, torch.get_num_threads(), machine, names)
    found = _ANSWERS.get(question) or _read(question)
    if found is None:
        logger.info("measuring %d kernels for %s", len(kernels), asked)
        seconds = (measure or measure_kernels)(kernels, asked)
        chosen = _fastest(kernels, names, seconds)
        found = _keep(question, Answer(chosen, dict(zip(names, seconds, strict=True))))
    _ANSWERS[question] = found
    return found


_ANSWERS: dict[Question, Answer] = {}


def _fastest(kernels: Sequence[Kernel], names: Sequence[str], seconds: Sequence[float]) -> str:
    """The rule's kernel, unless another one is faster by more than its margin."""
    best, gain = names[0], 1.0
    for kernel, name, took in zip(kernels[1:], names[1:], seconds[1:], strict=True):
        same = kernel.layout.name == kernels[0].layout.name
        won = seconds[0] / took / (SAME_LAYOUT if same else OTHER_LAYOUT)
        if won > gain:
            best, gain = name, won
    return best


def _read(question: Question) -> Answer | None:
    """A kept answer; None where there is none, or what is there answers something else."""
    try:
        found = json.loads(question.path.read_text(encoding="utf-8"))
        answered = Answer(found["kernel"], {name: float(value) for name, value in found["seconds"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return answered if answered.kernel in question.kernels else None


def _keep(question: Question, measured: Answer) -> Answer:
    """Write an answer aside and give it its name; if another process was first, that one's counts."""
    path = question.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                content = {"kernel": measured.kernel, "seconds": dict(measured.seconds), **question.to_dict()}
                json.dump(content, file, indent=1)
            try:
                os.link(aside, path)  # fails where there is one, which a rename would replace
            except FileExistsError:
                first = _read(question)
                if first is not None:
                    return first
                os.replace(aside, path)  # what is there cannot be read
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
    except OSError as error:
        _log_not_kept(str(error))
    return measured


@functools.cache
def _log_not_kept(reason: str) -> None:
    logger.warning("measured choices of kernels hold for this process only, they cannot be kept: %s", reason)


@torch.no_grad()
def measure_kernels(kernels: Sequence[Kernel], spec: LinearSpec) -> list[float]:
    """Seconds of each kernel: the best of several rounds in which all take turns."""
    with _disable_current_modes():  # a graph may be being traced
        spec = replace(spec, rows=min(spec.rows, max(64, _MOST_NUMBERS // spec.columns)))
        term = random_weight(spec)
        x, quantized = random_input(spec)
        works = [_work(kernel, spec, term, x, quantized) for kernel in kernels]
        for work in works:
            work()  # the first call of each sets itself up
        best = [_seconds(work) for work in works]
        contenders = [index for index, took in enumerate(best) if index == 0 or took < _HOPELESS * min(best)]
        for _ in range(_ROUNDS - 1):
            for index in contenders:
                best[index] = min(best[index], _seconds(works[index]))
        return best


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _work(
    kernel: Kernel,
    spec: LinearSpec,
    term: QuantizedWeight | CodebookWeight,
    x: Tensor,
    quantized: QuantizedInput | None,
) -> Callable[[], object]:
    """A call of a kernel; few tokens find a weight that no cache holds, as a model's does."""
    packed = kernel.layout.pack([term])  # type: ignore[list-item]
    size = sum(tensor.nbytes for tensor in packed.values())
    copies = 1 if spec.many_rows else min(_ROUNDS + 1, -(-_STREAMED // size))
    weights = [packed, *({key: t.clone() for key, t in packed.items()} for _ in range(copies - 1))]
    turn = iter(range(1 << 62))

    def work() -> object:
        return kernel.run(x, quantized, weights[next(turn) % copies], spec)

    return work


def random_weight(spec: LinearSpec) -> QuantizedWeight | CodebookWeight:
    """A weight of a use, of numbers that mean nothing."""
    generator = torch.Generator().manual_seed(0)
    shape = (spec.rows, spec.columns)
    width = (1, spec.rows, packed_width(spec.columns, spec.bits))
    codes = torch.randint(0, 256, width, dtype=torch.uint8, generator=generator)
    groups = -(-spec.columns // spec.group_size) if spec.group_size > 0 else 1
    scales = (1, 1 if spec.group_size < 0 else spec.rows, groups)
    scale = torch.full(scales, 0.01, dtype=torch.bfloat16 if spec.group_size > 0 else torch.float32)
    if spec.table is not None:
        per_row = spec.table == "rows"
        table = torch.linspace(-1, 1, 1 << spec.bits).to(torch.bfloat16 if per_row else torch.float32)
        tables = table.expand(1, spec.rows if per_row else 1, -1).contiguous()
        scaled = scale if spec.scaled else None
        return CodebookWeight(spec.bits, spec.group_size, shape, (0, 1), 0, 1, codes, tables, scaled)
    zero = None if spec.symmetric else torch.full(scales, 1 << (spec.bits - 1), dtype=torch.uint8)
    return QuantizedWeight(
        *(spec.bits, spec.symmetric, spec.group_size, shape, (0, 1), 0, 1, codes, scale, zero)
    )


def random_input(spec: LinearSpec) -> tuple[Tensor, QuantizedInput | None]:
    """Activations ``[tokens, K]`` of a use, and as a graph would have quantized them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(spec.tokens or 1, spec.columns, generator=generator).to(spec.dtype)
    if spec.activation is None:
        return x, None
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    static = spec.activation == "static"
    scale = scale.max() if static else scale
    codes = (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
    return x, QuantizedInput(codes, scale, torch.zeros((), dtype=torch.int32) if static else None, x)
