"""The bench's protocol, with a clock that ticks as told; no timing of this machine is asserted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.bench import BenchSettings, Variant, bench, resident_bytes
from fxcompress.errors import FxCompressError
from fxcompress.machine import machine
from fxcompress.progress import ProgressEvent
from tests.zoo import ZOO

SHORT = BenchSettings(prompt=6, steps=4, prefill=10, rounds=3, tries=2)


class Recorder(nn.Module):
    """A tiny decoder that notes the lengths and caches of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = ZOO["llama"].build()
        self.config = self.inner.config
        self.calls: list[tuple[int, str]] = []

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False, logits_to_keep: int = 0
    ) -> Any:
        self.calls.append((input_ids.shape[1], type(past_key_values).__name__))
        assert logits_to_keep == 1
        return self.inner(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)


def test_protocol_of_the_calls() -> None:
    model = Recorder()
    result = bench([Variant("one", model)], settings=BenchSettings(6, 4, 10, rounds=1, tries=1))
    turn = [(10, "NoneType"), (6, "NoneType"), *[(1, "DynamicCache")] * 4]
    warm_up = [*[turn[0]] * 2, *turn[1:], *turn[1:]]
    assert model.calls == [*warm_up, *turn]
    assert result.variants[0].cache == "dynamic"


def test_static_cache_is_kept_and_reset() -> None:
    model = Recorder()
    caches: list[Any] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    bench([Variant("plain", Recorder()), Variant("one", model, cache="static")], settings=SHORT)
    assert len({id(cache) for cache in caches}) == 2, "one for prefill, one for decode"
    lengths = sorted({cache.layers[0].max_cache_len for cache in caches})
    assert lengths == [10, 11]
    assert {name for _, name in model.calls} == {"StaticCache"}


def test_static_and_dynamic_caches_decode_the_same_tokens() -> None:
    model = ZOO["llama"].build()
    seen: dict[str, list[int]] = {"static": [], "dynamic": []}
    for kind, tokens in seen.items():
        handle = model.register_forward_pre_hook(
            lambda _, args, kwargs, tokens=tokens: tokens.extend(kwargs["input_ids"].flatten().tolist()),
            with_kwargs=True,
        )
        bench([Variant("plain", ZOO["llama"].build()), Variant("one", model, cache=kind)], settings=SHORT)  # type: ignore[arg-type]
        handle.remove()
    assert seen["static"] == seen["dynamic"]


def test_ratios_are_medians_of_rounds_and_the_better_try_counts() -> None:
    def speeds() -> Iterator[float]:
        for slow, fast in ((4.0, 2.0), (6.0, 1.0), (8.0, 4.0)):  # three rounds, two tries per turn
            yield from (slow, slow * 9)
            yield from (fast * 9, fast)

    item = torch.zeros(2, 5)
    clock = WarmClock(speeds())
    variants = [Variant("slow", nn.Identity()), Variant("fast", nn.Identity())]
    result = bench(variants, settings=SHORT, inputs={"input": item}, clock=clock)
    slow, fast = result.variants
    assert slow.rounds == {"prefill": pytest.approx([10 / 4, 10 / 6, 10 / 8])}
    assert fast.rounds == {"prefill": pytest.approx([10 / 2, 10 / 1, 10 / 4])}
    assert (slow.prefill, fast.prefill) == pytest.approx((10 / 6, 10 / 2))
    assert (slow.prefill_ratio, fast.prefill_ratio) == pytest.approx((1.0, 2.0))
    assert slow.decode is slow.decode_ratio is None
    assert slow.cache == "none"


class WarmClock:
    """Warm-up reads are free; afterwards every second read adds the next duration."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.seconds, self.reads, self.now = seconds, 0, 0.0

    def __call__(self) -> float:
        self.reads += 1
        if self.reads <= 12:  # per variant: start, two measures of two reads each, end
            self.now += 1e-3
        elif self.reads % 2 == 0:
            self.now += next(self.seconds)
        return self.now


def test_result_can_be_repeated_from_its_record() -> None:
    result = bench([Variant("one", ZOO["gpt2-odd"].build())], settings=SHORT).to_dict()
    assert result["settings"] == {"prompt": 6, "steps": 4, "prefill": 10, "rounds": 3, "tries": 2}
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert {"processor", "cores", "threads", "command"} <= set(result["machine"])
    assert result["machine"] == machine()


def test_compiled_model_gets_a_static_cache() -> None:
    compiled: Any = torch.compile(ZOO["llama"].build(), backend="eager")
    in_place = ZOO["llama"].build()
    in_place.compile(backend="eager")
    result = bench(
        [
            Variant("eager", ZOO["llama"].build()),
            Variant("compiled", compiled),
            Variant("in place", in_place),
        ],
        settings=BenchSettings(6, 2, 8, rounds=1, tries=1),
    )
    assert [variant.cache for variant in result.variants] == ["dynamic", "static", "static"]
    assert len({variant.weight_bytes for variant in result.variants}) == 1


def test_models_without_a_cache_are_measured_on_prefill() -> None:
    entry = ZOO["bert"]
    result = bench([Variant("encoder", entry.build())], settings=SHORT)
    assert result.variants[0].decode is None
    assert result.variants[0].prefill > 0


def test_weights_are_counted_once() -> None:
    linear = nn.Linear(8, 4, bias=False)
    tied = nn.ModuleList([linear, linear])
    tied.register_buffer("view", linear.weight.detach()[:2])
    assert resident_bytes(tied) == 8 * 4 * 4
    linear.weight = nn.Parameter(torch.zeros(1).expand(4, 8), requires_grad=False)
    assert resident_bytes(linear) == 4

    class Packed:
        def resident_bytes(self) -> int:
            return 7

    assert resident_bytes(Packed()) == 7
    assert resident_bytes(lambda x: x) == 0


def test_mistakes_are_refused() -> None:
    model = ZOO["llama"].build()
    with pytest.raises(FxCompressError, match="no name twice"):
        bench([Variant("one", model), Variant("one", model)])
    with pytest.raises(FxCompressError, match="at least one"):
        bench([])
    with pytest.raises(FxCompressError, match="vocabulary is unknown"):
        bench([Variant("plain", nn.Linear(2, 2))])
    with pytest.raises(FxCompressError, match="rounds=0"):
        BenchSettings(rounds=0)
    with pytest.raises(FxCompressError, match="returned no cache"):
        bench([Variant("encoder", ZOO["bert"].build(), cache="dynamic")], settings=SHORT)


def test_progress_is_told() -> None:
    events: list[ProgressEvent] = []
    bench([Variant("one", nn.Identity())], settings=SHORT, inputs=torch.zeros(2), progress=events.append)
    assert [(event.done, event.total) for event in events] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert events[0].step == "one, warm-up"
