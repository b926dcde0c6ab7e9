"""The form every attention's cache gets, what is left out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.calibration import as_calibration
from fxcompress.capture.export import capture_model
from fxcompress.edits import CompressionState
from fxcompress.errors import FormatError, RecipeError
from fxcompress.forms import CacheForm, ExactStore, FloatStore, HeadRotation, IntStore
from fxcompress.manager import run_recipe
from fxcompress.passes import QuantizeKvCache
from fxcompress.presets import PRESETS
from fxcompress.recipe import Recipe
from tests.zoo import entry


def solved(name: str, *passes: Any) -> CompressionState:
    item = entry(name)
    program = capture_model(item.build(), (), item.inputs())
    return run_recipe(program, list(passes), as_calibration([item.inputs()], program), verify="off").state


def caches(state: CompressionState) -> dict[str, CacheForm]:
    return {name: form.cache for name, form in state.forms.items() if form.cache is not None}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama-tied-odd", (1, 10, 10)),
        ("gpt2-odd", (3, 15, 15)),
        ("phi3", (2, 18, 18)),
        ("deepseek-v3", (4, 20, 16)),
        ("gemma2", (2, 16, 16)),
    ],
)
def test_every_attention_gets_a_form_of_its_own_size(name: str, sizes: tuple[int, int, int]) -> None:
    model = entry(name).build()
    state = solved(name, QuantizeKvCache(8))
    found = caches(state)
    assert len(found) == model.config.num_hidden_layers
    for form in found.values():
        if name != "deepseek-v3":
            assert (form.heads, form.key_width, form.value_width) == sizes
        assert isinstance(form.key, IntStore)
        assert form.key.bits == 8
    assert not any(form.terms for form in state.forms.values())
    assert not state.tensors


def test_options_reach_the_stores() -> None:
    item = QuantizeKvCache(
        key_bits=4, value_bits=2, key_axis="channel", group_size=16, residual=32, sinks=1, rotate=True
    )
    (form, *_) = caches(solved("gemma2", item)).values()
    key, value = form.key, form.value
    assert isinstance(key, IntStore)
    assert isinstance(value, IntStore)
    assert (key.bits, key.axis, key.group_size, key.block, key.window) == (4, "channel", 16, 32, 0)
    assert (value.bits, value.axis, value.block, value.window, value.sinks) == (2, "token", 1, 32, 1)
    assert isinstance(key.transforms[0], HeadRotation)
    (form, *_) = caches(solved("gemma2", QuantizeKvCache(format="fp8-e5m2", value_bits=16))).values()
    assert isinstance(form.key, FloatStore)
    assert isinstance(form.value, ExactStore)


def test_layers_can_differ() -> None:
    first = QuantizeKvCache(8, include=("*layers.0.*",))
    second = QuantizeKvCache(4, residual=4, include=("*layers.1.*", "*layers.2.*"))
    found = caches(solved("llama-tied-odd", first, second))
    assert [form.key.describe() for form in found.values()] == [
        "int8 per token",
        "int4 per token r4",
        "int4 per token r4",
    ]
    alone = caches(solved("llama-tied-odd", first))
    assert [form.exact for form in alone.values()] == [False, True, True]
    with pytest.raises(RecipeError, match="quantized already"):
        solved("llama-tied-odd", QuantizeKvCache(8), QuantizeKvCache(4))


def test_it_goes_with_weights_and_activations() -> None:
    state = solved(
        "llama-tied-odd", {"quantize-weights": {"bits": 8}}, "quantize-activations", QuantizeKvCache(8)
    )
    form = state.forms["model.layers.0.self_attn.v_proj.weight"]
    assert form.terms
    assert form.activation is not None
    assert form.cache is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"key_bits": 12}, "key_bits=12"),
        ({"key_bits": 16, "value_bits": 16}, "nothing to do"),
        ({"key_axis": "head", "group_size": 4}, "axis='head'"),
        ({"key_axis": "channel"}, "group_size=0"),
        ({"key_axis": "channel", "group_size": 32, "residual": 48}, "residual=48 is no multiple"),
        ({"residual": -1}, "residual=-1"),
        ({"sinks": 1.5}, "sinks=1.5"),
        ({"rotate": 1}, "rotate=1"),
        ({"format": "fp4"}, "format='fp4'"),
        ({"format": "fp8-e4m3", "group_size": 4}, "one scale per token and head"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        QuantizeKvCache(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 4, "group_size": 3}, "group_size=3 does not divide 10 channels"),
        ({"bits": 3}, "10 channels of 3 bits do not fill whole bytes"),
    ],
)
def test_heads_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        solved("llama-tied-odd", QuantizeKvCache(**options))


def test_models_without_a_cache_are_refused() -> None:
    for model in (nn.Sequential(nn.Linear(4, 4)), entry("bert").build(), entry("t5").build()):
        with pytest.raises(RecipeError, match=r"keeps no cache|cannot be replaced"):
            fxcompress.compress(model, "kv8", example_inputs=torch.randn(2, 4))
    program = capture_model(nn.Linear(4, 4), (torch.randn(2, 4),), {})
    with pytest.raises(RecipeError, match="no attention"):
        run_recipe(program, [QuantizeKvCache(8)], verify="off")


def test_presets_read_and_say_what_they_need() -> None:
    for name in PRESETS:
        if name.startswith("kv"):
            needs = Recipe.load(name).needs_calibration
            assert needs == ("needs data" in PRESETS[name]["summary"])
