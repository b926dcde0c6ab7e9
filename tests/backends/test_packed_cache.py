"""The packed cache as transformers uses it: any model, any split of a prompt, beams, crops, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import fxcompress
from fxcompress.backends.packed_cache import PackedCache, PackedLayer
from fxcompress.errors import FxCompressError
from fxcompress.forms import CacheForm, IntStore, SiteForm
from fxcompress.generation_cache import CacheMaker
from tests.zoo import entry

MODELS = (
    "llama-tied-odd",  # grouped heads of an odd width
    "gpt2-odd",  # learned positions
    "gemma2",  # sliding windows, soft cap, attention in plain operations
    "qwen3-moe",  # norms of queries and keys
    "deepseek-v3",  # keys and values of different widths
    "phi3",  # one projection for queries, keys and values
    "gpt-oss",  # sinks in the softmax
)
SPLITS = ([40], [17, 18, 19, 40], [1, 2, 3, 39, 40])


def shapes(model: nn.Module, ids: Tensor) -> dict[int, tuple[int, int, int]]:
    """Heads and widths of every layer's cache."""
    found: dict[int, tuple[int, int, int]] = {}

    class Probe(DynamicCache):
        def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            found[layer] = (key.shape[1], key.shape[3], value.shape[3])
            return super().update(key, value, layer, *args, **kwargs)

    model(input_ids=ids, past_key_values=Probe(config=model.config), use_cache=True)
    return found


def made(model: nn.Module, ids: Tensor, key: IntStore, value: IntStore, capacity: int | None = None) -> Any:
    sizes = shapes(model, ids)
    forms = {layer: CacheForm(key, value, *size) for layer, size in sizes.items()}
    return PackedCache(model.config, forms, capacity)


def logits(model: nn.Module, ids: Tensor, cache: Any, ends: list[int]) -> Tensor:
    found, first = [], 0
    for last in ends:
        output = model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True)
        found.append(output.logits)
        first = last
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_window_longer_than_the_text_changes_nothing(name: str) -> None:
    model, ids = entry(name).build(), entry(name).tensors(2, 40)["input_ids"]
    store = IntStore(8, residual=64)
    plain, packed = DynamicCache(config=model.config), made(model, ids, store, store)
    for first, last in ((0, 17), (17, 18), (18, 40)):
        parts = [
            model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True).logits
            for cache in (plain, packed)
        ]
        assert torch.equal(parts[1], parts[0])
    assert packed.get_seq_length() == 40


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_eight_bits_change_little_for_any_split(name: str) -> None:
    model, ids = entry(name).build(), entry(name).tensors(2, 40)["input_ids"]
    expected = model(input_ids=ids, use_cache=True).logits.log_softmax(-1)
    for ends in SPLITS:
        cache = made(model, ids, IntStore(8), IntStore(8))
        found = logits(model, ids, cache, ends).log_softmax(-1)
        assert float((expected.exp() * (expected - found)).sum(-1).mean()) <= 1e-4


@torch.no_grad()
def test_the_first_layer_holds_the_same_after_any_split() -> None:
    """Later layers see what earlier ones computed from a quantized past, which depends on the split."""
    model, ids = entry("llama-tied-odd").build().double(), entry("llama-tied-odd").tensors(2, 40)["input_ids"]
    values = IntStore(8, "token", 5, residual=8)
    found = []
    for ends in SPLITS:
        cache = made(model, ids, IntStore(8, "channel", 4, residual=8), values)
        logits(model, ids, cache, ends)
        found.append(cache.layers[0].dequantized())
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_cache_of_fixed_capacity_and_a_growing_one_agree() -> None:
    model, ids = entry("llama-tied-odd").build(), entry("llama-tied-odd").tensors(2, 40)["input_ids"]
    store = IntStore(8, residual=4)
    growing, fixed = made(model, ids, store, store), made(model, ids, store, store, 64)
    for layer in growing.packed:
        layer.capacity = 8
    one, two = (logits(model, ids, cache, [5, 6, 30, 40]) for cache in (growing, fixed))
    assert torch.equal(one, two)
    assert growing.packed[0].capacity >= 40
    assert (growing.get_max_length(), fixed.get_max_length()) == (-1, 64)
    with pytest.raises(FxCompressError, match="65 tokens do not fit a cache of 64"):
        model(input_ids=ids[:, :25], past_key_values=fixed, use_cache=True)
    fixed.reset()
    assert torch.equal(
        logits(model, ids, fixed, [40]), logits(model, ids, made(model, ids, store, store), [40])
    )


@torch.no_grad()
def test_rows_of_a_batch_are_reordered_repeated_and_selected() -> None:
    model, ids = entry("llama-tied-odd").build(), entry("llama-tied-odd").tensors(3, 20)["input_ids"]
    cache = made(model, ids, IntStore(8), IntStore(8))
    logits(model, ids, cache, [20])
    before = cache.layers[0].dequantized()[0]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.layers[0].dequantized()[0], before[[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].dequantized()[0], before[[2, 2, 0, 0, 0, 0]])
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(cache.layers[0].dequantized()[0], before[[2, 0]])
    assert cache.batch_size == 2
    with pytest.raises(FxCompressError, match="holds 2 sequences"):
        model(input_ids=ids, past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_cropping_forgets_the_last_tokens() -> None:
    model, ids = entry("llama-tied-odd").build(), entry("llama-tied-odd").tensors(2, 40)["input_ids"]
    store = IntStore(8, residual=16)
    cropped, plain = (made(model, ids, store, store) for _ in range(2))
    logits(model, ids, cropped, [30])
    cropped.crop(-9)
    assert cropped.get_seq_length() == 21
    found = logits(model, ids[:, 21:], cropped, [4])
    logits(model, ids, plain, [21])
    torch.testing.assert_close(found, logits(model, ids[:, 21:], plain, [4]), rtol=0, atol=2e-2)
    with pytest.raises(FxCompressError, match="negative number"):
        cropped.crop(3)


def small_model(name: str, recipe: Any, backend: str = "eager") -> fxcompress.CompressedModel:
    small = fxcompress.compress(entry(name).build(), recipe, verify="off", progress=False)
    small.set_backend(backend)
    return small


KV8 = [{"quantize-kv-cache": {"bits": 8, "residual": 4}}]


def test_generate_uses_the_packed_cache_and_so_does_a_saved_model(tmp_path: Any) -> None:
    name = "llama-tied-odd"
    small = small_model(name, [*KV8, "quantize-weights"])
    ids = entry(name).tensors(2, 12)["input_ids"]
    options = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = small.generate(**options, attention_mask=torch.ones_like(ids))
    (session,) = small.generate._sessions.values()
    assert all(isinstance(layer, PackedLayer) for layer in session._cache.layers)
    assert int(session._cache.layers[0].length) == 19
    cache = small.generate._caches.for_generate((), options)
    theirs = small.model.generate(**options, attention_mask=torch.ones_like(ids), past_key_values=cache)
    assert torch.equal(found, theirs)
    assert cache.get_seq_length() == 19
    small.save(tmp_path / "saved")
    again = fxcompress.load(tmp_path / "saved", backend="eager")
    assert again.new_cache().layers[1].form.same_as(small.new_cache().layers[1].form)


def test_a_growing_cache_is_enlarged_before_a_compiled_call() -> None:
    small = small_model("llama-tied-odd", KV8)
    ids = entry("llama-tied-odd").tensors(1, 40)["input_ids"]
    cache = small.new_cache()
    for layer in cache.packed:
        layer.capacity = 16
    small(input_ids=ids, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 40


@torch.no_grad()
def test_beams_assistants_and_padding() -> None:
    name = "llama-tied-odd"
    model, ids = entry(name).build(), entry(name).tensors(2, 12)["input_ids"]
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }

    def cache() -> Any:
        return made(model, ids, IntStore(8, residual=4), IntStore(8, residual=4))

    beams = {"input_ids": ids, "attention_mask": mask, "num_beams": 3, **options}
    assert torch.equal(model.generate(**beams, past_key_values=cache()), model.generate(**beams))
    one = {"input_ids": ids[:1], "attention_mask": mask[:1], **options}
    used = cache()
    assisted = model.generate(**one, past_key_values=used, assistant_model=entry(name).build(seed=3))
    assert torch.equal(assisted, model.generate(**one))
    padded, seen = ids.clone(), mask.clone()
    padded[1, :5], seen[1, :5] = 0, 0
    alone = model.generate(
        input_ids=ids[1:, 5:], attention_mask=mask[1:, 5:], past_key_values=cache(), **options
    )
    both = model.generate(input_ids=padded, attention_mask=seen, past_key_values=cache(), **options)
    assert torch.equal(both[1, 5:], alone[0])


def test_models_without_a_packed_cache_say_so() -> None:
    small, store = small_model("llama-tied-odd", "w8a16"), IntStore(8)
    with pytest.raises(FxCompressError, match="not quantized"):
        small.new_cache()
    with pytest.raises(FxCompressError, match="no module around it says which layer"):
        CacheMaker(nn.Linear(2, 2), {"weight": SiteForm(cache=CacheForm(store, store, 1, 10, 10))})
    model = entry("llama-tied-odd").build()
    with pytest.raises(FxCompressError, match="layers \\[7\\]"):
        PackedCache(model.config, {7: CacheForm(IntStore(8), IntStore(8), 1, 10, 10)})
