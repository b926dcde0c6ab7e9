"""Packed caches of attentions with a sliding window: bounded memory, and attention sees what it saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import fxcompress
from fxcompress.backends import packed_layer
from fxcompress.backends.cpu import cached_attention
from fxcompress.backends.packed_layer import PackedLayer, SlidingLayer, Window
from fxcompress.errors import FxCompressError
from fxcompress.forms import (
    CacheForm,
    CacheStore,
    CodebookStore,
    ExactStore,
    FloatStore,
    HeadRotation,
    IntStore,
    PositionRotation,
)
from tests.backends.test_packed_cache import logits, made
from tests.zoo import entry

MODELS = ("mistral", "gemma2", "gemma3", "gpt-oss")  # the second and fourth in plain operations
SPLITS = ([50], [17, *range(18, 40), 50])
EXACT = IntStore(8, residual=64)
SPARE = 8


@pytest.fixture(autouse=True)
def few_spare_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short texts fill the records."""
    monkeypatch.setattr(packed_layer, "_SPARE", SPARE)


def turned() -> PositionRotation:
    frequency = torch.tensor([0.3, 0.1, 0.0, 0.0], dtype=torch.float64)
    return PositionRotation(
        torch.tensor([4, 5, 2, 3, 0, 1, 6, 7]),
        torch.cat([frequency[:2], frequency[2:], -frequency[:2], frequency[2:]]),
    )


STORES: dict[str, CacheStore] = {
    "exact": ExactStore(),
    "per token": IntStore(4, residual=3),
    "per channel": IntStore(8, "channel", 4, residual=8, sinks=3),
    "long window": IntStore(8, residual=20, transforms=(HeadRotation(),)),
    "float": FloatStore("e4m3"),
    "pre-rotary": CodebookStore(torch.linspace(-1, 1, 16), outliers=1, transforms=(turned(),)),
}


@pytest.mark.parametrize("key", STORES)
@pytest.mark.parametrize("steps", [(1,) * 40, (7, 1, 1, 40, 1, 9, 2, 3), (60, 1, 5)])
def test_it_holds_the_last_tokens_of_what_an_unbounded_cache_holds(key: str, steps: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    form = CacheForm(STORES[key], IntStore(5, "token", 4, residual=2, sinks=1), 2, 8, 8)
    window = Window.of(6, [form])
    bounded, unbounded = SlidingLayer(form, window), PackedLayer(form.without_sinks())
    for tokens in steps:
        new = [torch.randn(1, 2, tokens, 8) for _ in range(2)]
        expected = min(5, unbounded.get_seq_length()) + tokens
        assert bounded.get_mask_sizes(tokens)[0] == expected
        seen, whole = bounded.update(*new), unbounded.update(*new)
        for one, two in zip(seen, whole, strict=True):
            torch.testing.assert_close(one, two[:, :, -expected:], rtol=0, atol=1e-6)
        for one, two in zip(bounded.dequantized(), unbounded.dequantized(), strict=True):
            torch.testing.assert_close(one, two[:, :, -one.shape[2] :], rtol=0, atol=1e-6)
    assert bounded.get_seq_length() == sum(steps)
    assert 5 <= int(bounded.length) <= bounded.capacity == window.capacity
    assert int(bounded.base) % window.unit == 0


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_with_an_exact_window_nothing_changes(name: str) -> None:
    model, ids = entry(name).build(), entry(name).tensors(2, 50)["input_ids"]
    for ends in SPLITS:
        plain = logits(model, ids, DynamicCache(config=model.config), ends)
        growing, fixed = (made(model, ids, EXACT, EXACT, capacity) for capacity in (None, 64))
        assert torch.equal(logits(model, ids, growing, ends), plain)
        assert torch.equal(logits(model, ids, fixed, ends), plain)
        for layer in (*growing.packed, *fixed.packed):
            assert not layer.is_sliding or layer.capacity < 32


@torch.no_grad()
def test_beams_padding_and_crops() -> None:
    model, ids = entry("mistral").build(), entry("mistral").tensors(2, 12)["input_ids"]
    options: dict[str, Any] = {
        "max_new_tokens": 14,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    seen = torch.ones_like(ids)
    seen[1, :5] = 0
    for more in ({"num_beams": 3}, {}):
        given = {"input_ids": ids, "attention_mask": seen, **options, **more}
        found = model.generate(**given, past_key_values=made(model, ids, EXACT, EXACT))
        assert torch.equal(found, model.generate(**given))
    one = {"input_ids": ids[:1], "attention_mask": seen[:1], **options}
    helped = model.generate(
        **one, past_key_values=made(model, ids, EXACT, EXACT), assistant_model=entry("mistral").build(seed=3)
    )
    assert torch.equal(helped, model.generate(**one))


@torch.no_grad()
def test_as_many_tokens_are_taken_back_as_are_left() -> None:
    model, ids = entry("gemma2").build(), entry("gemma2").tensors(2, 50)["input_ids"]
    cropped, plain = (made(model, ids, EXACT, EXACT) for _ in range(2))
    logits(model, ids, cropped, list(range(1, 46)))
    sliding = cropped.layers[0]
    left = int(sliding.length) - 3
    assert left >= SPARE
    with pytest.raises(FxCompressError, match=f"at most {left} can be taken back"):
        cropped.crop(-left - 1)
    assert [layer.get_seq_length() for layer in cropped.layers] == [45, 45]
    cropped.crop(-3)
    logits(model, ids, plain, [42])
    expected = logits(model, ids[:, 42:], plain, [8])
    torch.testing.assert_close(logits(model, ids[:, 42:], cropped, [8]), expected, rtol=0, atol=1e-5)
    cropped.reset()
    assert torch.equal(
        logits(model, ids, cropped, [50]), logits(model, ids, made(model, ids, EXACT, EXACT), [50])
    )
    short = made(model, ids, EXACT, EXACT, 6)
    with pytest.raises(FxCompressError, match="7 tokens do not fit a cache of 6"):
        logits(model, ids, short, [7])


def test_layers_of_one_window_share_their_unit() -> None:
    forms = [CacheForm(IntStore(8, "channel", n), IntStore(8), 1, 8, 8) for n in (4, 6)]
    window = Window.of(10, [*forms, None])
    assert (window.unit, window.by_position) == (12, False)
    assert window.capacity % SPARE == 0
    assert window.spare >= SPARE
    form = CacheForm(IntStore(8, transforms=(turned(),)), IntStore(8), 1, 8, 8)
    assert Window.of(10, [form]).by_position


KIVI = [{"quantize-kv-cache": {"bits": 8, "key_axis": "channel", "group_size": 4, "residual": 4}}]


def compiled_and_not(small: Any, model: Any, ids: Tensor, mask: Tensor | None = None) -> None:
    caches = [small.new_cache(64) for _ in range(2)]
    for first, last in ((0, 20), (20, 21), (21, 22), (22, 30), (30, 31)):
        given: dict[str, Any] = {"input_ids": ids[:, first:last], "use_cache": True}
        if mask is not None:
            given["attention_mask"] = mask[:, :last]
        with torch.no_grad():
            expected = model(**given, past_key_values=caches[0]).logits
        found = small(**given, past_key_values=caches[1]).logits
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_captured_graphs_compute_the_same(padded: bool) -> None:
    model, ids = entry("mistral").build(), entry("mistral").tensors(2, 31)["input_ids"]
    small = fxcompress.compress(entry("mistral").build(), KIVI, verify="off", progress=False)
    small.set_backend("eager")
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    compiled_and_not(small, model, ids, mask if padded else None)


@pytest.mark.slow
def test_compiled_steps_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[int] = []
    find = cached_attention.find_fused

    def watched(*args: Any) -> cached_attention.Fused:
        found = find(*args)
        fused.append(len(found.forms))
        return found

    monkeypatch.setattr(cached_attention, "find_fused", watched)
    model, ids = entry("mistral").build(), entry("mistral").tensors(2, 12)["input_ids"]
    small = fxcompress.compress(entry("mistral").build(), KIVI, verify="off", progress=False)
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    found = small.generate(input_ids=ids, attention_mask=mask, **options)
    assert any(fused)
    (session,) = small.generate._sessions.values()
    assert all(int(layer.base) for layer in session._cache.layers)
    given = {"input_ids": ids, "attention_mask": mask, "past_key_values": small.new_cache(64), **options}
    assert torch.equal(found, model.generate(**given))
