"""Speed and memory of several variants of one model, measured side by side.

Machines drift: another process, a hot processor. So variants take turns within *rounds*, each gets two tries
per round of which the better counts, medians are taken over rounds, and speed-ups are medians of the ratio to
the baseline in the same round.

Decode is 63 greedy steps after a prompt of 128 tokens, the prompt's own time excluded; prefill is 512 tokens
with logits for the last only. Both are a bare loop on the model's call, without ``generate``: eager variants
use a dynamic cache, compiled ones a static cache. A compressed model takes its steps as its ``generate`` does
(:mod:`fxcompress.decoding`). Models without a cache are only measured on prefill.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxcompress.bench_caches import cache_kind, cache_of, config_of, empty_entries, module_of, static_cache
from fxcompress.errors import FxCompressError
from fxcompress.evaluate import call_model, main_tensor
from fxcompress.machine import machine
from fxcompress.progress import ProgressEvent, ProgressOption, Reporter

__all__ = ["BenchResult", "BenchSettings", "Variant", "VariantResult", "bench", "resident_bytes"]


@dataclass(frozen=True)
class BenchSettings:
    """The protocol.

    Args:
        prompt: Tokens before decoding starts. Default 128.
        steps: Timed greedy steps. Default 63.
        prefill: Tokens of the prefill measurement. Default 512.
        rounds: How often every variant has its turn. Default 5.
        tries: Tries per turn, the best of which counts. Default 2.
    """

    prompt: int = 128
    steps: int = 63
    prefill: int = 512
    rounds: int = 5
    tries: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise FxCompressError(f"bench: {name}={value}, expected at least 1.")


@dataclass(frozen=True, eq=False)
class Variant:
    """One contender.

    Args:
        name: Shown in the table.
        model: The callable to time.
        cache: ``"dynamic"`` (the model makes its own, growing cache), ``"static"`` (a fixed-size cache of
            transformers, allocated outside of the timed call), or ``"none"`` (prefill only). Default: static
            for compiled and compressed models, dynamic for others that can decode.
    """

    name: str
    model: Callable[..., Any]
    cache: Literal["auto", "dynamic", "static", "none"] = "auto"


@dataclass(frozen=True)
class VariantResult:
    """Medians over rounds.

    Args:
        name: Name of the variant.
        cache: The cache it was given.
        decode: Greedy tokens per second, or None without a cache.
        prefill: Prompt tokens per second.
        decode_ratio: Median of the per-round ratio to the first variant, or None.
        prefill_ratio: The same for prefill.
        weight_bytes: Resident bytes of weights, see :func:`resident_bytes`.
        warmup_seconds: Time of the first, untimed calls: compilation, mostly.
        rounds: Tokens per second of every round, by measurement.
    """

    name: str
    cache: str
    decode: float | None
    prefill: float
    decode_ratio: float | None
    prefill_ratio: float
    weight_bytes: int
    warmup_seconds: float
    rounds: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchResult:
    """All variants of one run, the first being the baseline, with what is needed to repeat it."""

    variants: tuple[VariantResult, ...]
    settings: BenchSettings
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bench(
    variants: Sequence[Variant],
    *,
    vocabulary: int | None = None,
    settings: BenchSettings | None = None,
    inputs: Mapping[str, Tensor] | Tensor | None = None,
    seed: int = 0,
    progress: ProgressOption = False,
    clock: Callable[[], float] = time.perf_counter,
) -> BenchResult:
    """Measure variants side by side, as the module describes.

    Args:
        variants: The first is the baseline of all ratios.
        vocabulary: Token ids are drawn below it. Default: ``config.vocab_size`` of the first variant.
        settings: The protocol.
        inputs: Inputs of the prefill measurement for models that do not take token ids; its rate then counts
            the elements of the first two dimensions of the first tensor.
        seed: Of the token ids.
        progress: True for a bar on stderr, or a callable that gets every step.
        clock: Seconds; for tests.

    Raises:
        FxCompressError: no variants, two of one name, an unknown vocabulary, or a variant that cannot decode
            with the cache that was asked for.

    Example:
        >>> bench([Variant("fp32", model), Variant("w8a8", small)]).variants[1].decode_ratio  # doctest: +SKIP
        4.2
    """
    settings = settings or BenchSettings()
    names = [variant.name for variant in variants]
    if not names or len(set(names)) != len(names):
        raise FxCompressError(f"bench: variants {names}, expected at least one and no name twice.")
    prefill = _prefill_inputs(variants[0].model, inputs, vocabulary, settings, seed)
    shapes: list[tuple[Tensor, Tensor]] = []
    runs = [_Run(variant, prefill, settings, clock, shapes) for variant in variants]
    total = len(runs) * (settings.rounds + 1)
    with torch.no_grad(), Reporter(progress) as reporter:
        reporter.start("bench", total)
        done = 0
        for turn in range(settings.rounds + 1):
            for run in runs:
                run.warm_up() if turn == 0 else run.turn()
                done += 1
                what = "warm-up" if turn == 0 else f"round {turn}"
                reporter.step(ProgressEvent("bench", f"{run.name}, {what}", done, total))
    return BenchResult(tuple(run.result(runs[0]) for run in runs), settings, machine())


def resident_bytes(model: Any) -> int:
    """Bytes of weights in memory: parameters and buffers, each storage counted once.

    A model that holds packed weights elsewhere tells by its own ``resident_bytes()``.
    """
    own = getattr(model, "resident_bytes", None)
    if callable(own):
        return int(own())
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(module, nn.Module):
        return 0
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(storages.values())


class _Run:
    """One variant: its inputs, its cache, its measurements."""

    def __init__(
        self,
        variant: Variant,
        prefill: Any,
        settings: BenchSettings,
        clock: Callable[[], float],
        shapes: list[tuple[Tensor, Tensor]],
    ) -> None:
        self.name, self.model, self.settings, self.clock = variant.name, variant.model, settings, clock
        self.prefill_inputs = prefill
        self.cache = cache_kind(variant.cache, variant.model) if isinstance(prefill, Tensor) else "none"
        self.rates: dict[str, list[float]] = {"prefill": []}
        if self.cache != "none":
            self.rates["decode"] = []
        self.warmup = 0.0
        self._static: dict[int, Any] = {}
        self._shapes = shapes

    def warm_up(self) -> None:
        start = self.clock()
        for measure in self._measures().values():
            with self._fixed_sizes():
                measure()
                measure()  # lazily allocated caches have their first use compiled apart
        self.warmup = self.clock() - start

    def turn(self) -> None:
        for name, measure in self._measures().items():
            with self._fixed_sizes():
                self.rates[name].append(max(measure() for _ in range(self.settings.tries)))

    def _fixed_sizes(self) -> AbstractContextManager[object]:
        """With a static cache there are three calls, of one size each: nothing needs a graph for any size."""
        if self.cache != "static":
            return nullcontext()
        patched: AbstractContextManager[object] = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
        return patched

    def _measures(self) -> dict[str, Callable[[], float]]:
        known: dict[str, Callable[[], float]] = {"prefill": self._prefill, "decode": self._decode}
        return {name: known[name] for name in self.rates}

    def _prefill(self) -> float:
        item = self.prefill_inputs
        if self.cache != "none":
            item = item[:, : self.settings.prefill]
        first = item if isinstance(item, Tensor) else next(iter(item.values()))
        tokens = first.shape[0] * (first.shape[1] if first.ndim > 1 else 1)
        options = self._cache_options(first.shape[1]) if self.cache != "none" else {"use_cache": False}
        seconds = self._time(lambda: call_model(self.model, item, logits_to_keep=1, **options))
        return float(tokens / seconds)

    def _decode(self) -> float:
        settings = self.settings
        session = self._session()
        if session is not None:
            session.prefill(self.prefill_inputs[:, : settings.prompt])

            def replay() -> None:
                for _ in range(settings.steps):
                    session.step()

            return settings.steps / self._time(replay)
        options = self._cache_options(settings.prompt + settings.steps + 1)
        output = call_model(
            self.model, self.prefill_inputs[:, : settings.prompt], logits_to_keep=1, **options
        )

        if not self._shapes and self.cache == "dynamic":
            self._shapes += empty_entries(cache_of(output, self.name))

        def steps() -> None:
            token, cache = _greedy(output), cache_of(output, self.name)
            for _ in range(settings.steps):
                step = call_model(self.model, token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token, cache = _greedy(step), cache_of(step, self.name)

        return settings.steps / self._time(steps)

    def _session(self) -> Any:
        """Memory for decoding steps, of a model that has its own loop for them."""
        make = getattr(getattr(self.model, "generate", None), "session", None)
        if self.cache != "static" or make is None:
            return None
        length = self.settings.prompt + self.settings.steps + 1
        try:
            return make(1, length)
        except FxCompressError:  # it says that its loop does not cover this model
            return None

    def _time(self, work: Callable[[], object]) -> float:
        _synchronize()
        start = self.clock()
        work()
        _synchronize()
        return self.clock() - start

    def _cache_options(self, length: int) -> dict[str, Any]:
        if self.cache == "dynamic":
            return {"use_cache": True}
        if length not in self._static:
            self._static[length] = static_cache(self.model, length, self._shapes)
        cache = self._static[length]
        cache.reset()  # compiled graphs are bound to one cache's addresses: a new one would compile again
        return {"use_cache": True, "past_key_values": cache}

    def result(self, base: _Run) -> VariantResult:
        def ratio(name: str) -> float | None:
            if name not in self.rates or name not in base.rates:
                return None
            pairs = zip(self.rates[name], base.rates[name], strict=True)
            return statistics.median(own / other for own, other in pairs)

        decode = statistics.median(self.rates["decode"]) if "decode" in self.rates else None
        prefill_ratio = ratio("prefill")
        assert prefill_ratio is not None
        return VariantResult(
            name=self.name,
            cache=self.cache,
            decode=decode,
            prefill=statistics.median(self.rates["prefill"]),
            decode_ratio=ratio("decode"),
            prefill_ratio=prefill_ratio,
            weight_bytes=resident_bytes(self.model),
            warmup_seconds=self.warmup,
            rounds=self.rates,
        )


def _prefill_inputs(
    model: Any,
    inputs: Mapping[str, Tensor] | Tensor | None,
    vocabulary: int | None,
    settings: BenchSettings,
    seed: int,
) -> Any:
    """Given inputs, or random token ids ``[1, T]`` long enough for both measurements."""
    if inputs is not None:
        return inputs
    config = config_of(model)
    size = vocabulary or getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise FxCompressError(
            "bench: the model's vocabulary is unknown.", fix="pass vocabulary=, or inputs= of another kind."
        )
    generator = torch.Generator().manual_seed(seed)
    length = max(settings.prefill, settings.prompt)
    ids = torch.randint(size, (1, length), generator=generator)
    module = module_of(model)
    device = next((p.device for p in module.parameters()), None) if module is not None else None
    return ids.to(device) if device is not None else ids


def _greedy(output: Any) -> Tensor:
    return main_tensor(output, ("logits",))[:, -1:].argmax(-1)


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
