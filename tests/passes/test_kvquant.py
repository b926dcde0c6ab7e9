"""Codebooks, rotations found by measuring, outliers; the calibrated passes for caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.backends.packed_cache import PackedCache
from fxcompress.calibration import as_calibration
from fxcompress.capture.export import capture_model
from fxcompress.errors import RecipeError
from fxcompress.forms import CacheForm, ChannelAffine, CodebookStore, IntStore, PositionRotation
from fxcompress.generation_cache import CacheMaker
from fxcompress.manager import run_recipe
from fxcompress.passes import Kvquant, QuantizeKvCache, Wkvquant
from fxcompress.passes._rotary import rotation_of
from fxcompress.passes.kvquant import lloyd
from tests.zoo import entry

LENGTH = 24


def forms(model: nn.Module, inputs: list[Any], *passes: Any) -> dict[str, CacheForm]:
    program = capture_model(model, (), inputs[0])
    state = run_recipe(program, list(passes), as_calibration(inputs, program), verify="off").state
    return {name: form.cache for name, form in state.forms.items() if form.cache is not None}


def zoo_forms(name: str, *passes: Any) -> dict[str, CacheForm]:
    item = entry(name)
    return forms(item.build(), [item.inputs(2, LENGTH, seed=seed) for seed in range(3)], *passes)


def rotation(form: CacheForm) -> PositionRotation | None:
    found = [t for t in form.key.transforms if isinstance(t, PositionRotation)]  # type: ignore[attr-defined]
    return found[0] if found else None


@pytest.mark.parametrize("pairs", ["half", "neighbours", "part"])
def test_rotations_are_found_by_measuring(pairs: str) -> None:
    width, half = 16, 4 if pairs == "part" else 8
    first = torch.arange(half) if pairs != "neighbours" else torch.arange(0, 16, 2)
    second = first + (half if pairs != "neighbours" else 1)
    partner = torch.arange(width)
    partner[first], partner[second] = second, first
    frequency = torch.zeros(width, dtype=torch.float64)
    frequency[first] = 0.5 ** torch.arange(half, dtype=torch.float64)
    frequency[second] = -frequency[first]
    expected = PositionRotation(partner, frequency)
    keys = torch.randn(40, 1, width).expand(-1, LENGTH, -1)
    turned = expected.undo(keys[:, None], torch.arange(LENGTH))[:, 0].double()
    found = rotation_of(turned)
    assert isinstance(found, PositionRotation)
    assert torch.equal(found.partner, partner)
    torch.testing.assert_close(found.frequency, frequency, atol=2e-5, rtol=1e-4)


def test_rotations_of_models_are_found() -> None:
    for name, rotated in (("qwen3-moe", 16), ("gpt2-odd", 0)):
        for form in zoo_forms(name, Kvquant(bits=8)).values():
            found = rotation(form)
            assert (0 if found is None else int((found.frequency != 0).sum())) == rotated


def test_other_dependence_on_positions_is_told() -> None:
    keys = torch.randn(40, 8, 6, dtype=torch.float64)
    assert isinstance(rotation_of(keys), str)
    fixed = keys[:, :1].expand(-1, 8, -1)
    assert rotation_of(fixed) is None
    stretched = fixed * torch.linspace(1, 2, 8, dtype=torch.float64)[:, None]
    assert isinstance(rotation_of(stretched), str)
    assert isinstance(rotation_of(keys[:, :2]), str)


def test_codebooks_minimise_the_weighted_error() -> None:
    x = torch.tensor([-1.0, -0.9, 0.1, 0.2, 0.9, 1.0], dtype=torch.float64)
    book = lloyd(x, torch.ones_like(x), 3)
    torch.testing.assert_close(book, torch.tensor([-0.95, 0.15, 0.95], dtype=torch.float64))
    heavy = torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert lloyd(x, heavy, 3)[0].item() == pytest.approx(-0.99)
    many = torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort().values

    def error(centres: Tensor) -> float:
        return float((many[:, None] - centres).abs().amin(1).square().mean())

    found = lloyd(many, torch.ones_like(many), 4)
    assert error(found) == pytest.approx(0.1175, rel=0.05)  # of the optimal quantizer of a normal variable
    assert error(found) < error(torch.linspace(float(many[0]), float(many[-1]), 4))


def test_stores_hold_what_the_paper_says() -> None:
    for form in zoo_forms("gemma2", Kvquant(bits=3, outliers=0.1, sinks=2)).values():
        key, value = form.key, form.value
        assert isinstance(key, CodebookStore)
        assert isinstance(value, CodebookStore)
        assert (key.bits, key.outliers, key.sinks, value.outliers) == (3, 2, 2, 2)
        assert key.offset is not None
        assert value.offset is None
        assert bool((key.codebook.diff() > 0).all())
        assert key.codebook.abs().max() <= 1 + 1e-6


def test_codebooks_beat_uniform_codes_on_a_large_channel() -> None:
    item = entry("gemma2")
    model = item.build()
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.k_proj.weight[3] *= 20  # type: ignore[index]
    ids = item.tensors(2, LENGTH)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)
    inputs = [item.inputs(2, LENGTH, seed=seed) for seed in range(4)]
    losses = {}
    for label, step in (("codebook", Kvquant(bits=3)), ("tokens", QuantizeKvCache(3))):
        program = capture_model(model, (), inputs[0])
        state = run_recipe(program, [step], as_calibration(inputs, program), verify="off").state
        cache = PackedCache(model.config, CacheMaker(model, state.forms).layers)
        with torch.no_grad():
            parts = [
                model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
                for i in range(LENGTH)
            ]
        found = torch.cat(parts, 1).log_softmax(-1)
        losses[label] = float(F.kl_div(found, expected, log_target=True, reduction="sum"))
    assert losses["codebook"] < 0.75 * losses["tokens"]


def test_wkvquant_centres_every_channel() -> None:
    for form in zoo_forms("llama-tied-odd", Wkvquant(bits=4)).values():
        for store in (form.key, form.value):
            assert isinstance(store, IntStore)
            (smooth,) = store.transforms
            assert isinstance(smooth, ChannelAffine)
            assert bool((smooth.scale > 0).all())
    x = torch.randn(1, 1, 6, 10)
    even = smooth.apply(x, torch.arange(6))
    torch.testing.assert_close(smooth.undo(even, torch.arange(6)), x)


def test_equal_runs_give_equal_forms() -> None:
    one, two = (zoo_forms("qwen3-moe", Kvquant(bits=2, q_norm=True)) for _ in range(2))
    for name, form in one.items():
        assert form.same_as(two[name])


def test_a_saved_codebook_cache_is_read_again(tmp_path: Any) -> None:
    item = entry("gemma2")
    batches = [item.inputs(2, LENGTH, seed=seed) for seed in range(2)]
    small = fxcompress.compress(item.build(), "kv3-kvquant", batches, verify="off", progress=False)
    small.save(tmp_path / "saved")
    again = fxcompress.load(tmp_path / "saved", backend="eager")
    for number, layer in enumerate(small.new_cache().layers):
        assert again.new_cache().layers[number].form.same_as(layer.form)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 1}, "bits=1"),
        ({"outliers": 1.5}, "outliers=1.5"),
        ({"sinks": -1}, "sinks=-1"),
        ({"tokens": 0}, "tokens=0"),
        ({"q_norm": 1}, "q_norm=1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Kvquant(**options)
    with pytest.raises(RecipeError, match="bits=0"):
        Wkvquant(bits=0)
