"""Long sessions on the compiled backend: several cache lengths, several models, one token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.errors import FxCompressError
from tests.zoo import entry, scores


@torch.no_grad()
def test_one_token_at_a_time_equals_the_whole_sequence() -> None:
    animal = entry("llama")
    small = fxcompress.compress(animal.build(), "w8a8", progress=False, verify="off")
    ids = animal.tensors(batch=1, seq=8)["input_ids"]
    whole = scores(small(input_ids=ids, use_cache=False))
    cache, steps = None, []
    for position in range(ids.shape[1]):
        out = small(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert float((torch.cat(steps, 1) - whole).norm() / whole.norm()) < 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_static_caches_of_several_lengths() -> None:
    animal = entry("llama")
    small = fxcompress.compress(animal.build(), "w8a8", progress=False, verify="off")
    settings = {"do_sample": False, "cache_implementation": "static", "max_new_tokens": 3}
    for length in (8, 11, 14):
        ids = animal.tensors(batch=1, seq=length)["input_ids"]
        small.set_backend("inductor")
        compiled = small.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        dynamic = small.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3)
        assert torch.equal(compiled, dynamic)


@torch.no_grad()
def test_many_models_in_one_process() -> None:
    animal = entry("llama")
    original = animal.build()
    for _ in range(5):
        small = fxcompress.compress(original, "w8a8", progress=False, verify="off")
        small.set_backend("eager")
        for length in (5, 9):
            ids = animal.tensors(batch=2, seq=length)["input_ids"]
            assert torch.isfinite(scores(small(input_ids=ids, use_cache=False))).all()


@torch.no_grad()
def test_code_that_escapes_compilation_is_an_error_and_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.compat.RECOMPILE_LIMIT", 1)
    animal = entry("llama")
    small = fxcompress.compress(animal.build(), "w8a8", progress=False, verify="off")
    small.set_backend("eager")
    assert torch.isfinite(scores(small(**animal.tensors(batch=2, seq=5), use_cache=False))).all()

    def many_shapes() -> None:
        for length in (6, 7, 8):
            small(**animal.tensors(batch=2, seq=length), use_cache=False)

    with pytest.raises(FxCompressError, match=r"weight: is compressed, .* not compiled: .*recompilation"):
        many_shapes()


@torch.no_grad()
def test_loading_into_a_module_restores_its_buffers(tmp_path: Path) -> None:
    animal = entry("resnet")
    model = animal.build()
    small = fxcompress.compress(model, "w8a8", example_inputs=animal.inputs(), progress=False)
    small.set_backend("eager")
    small.save(tmp_path / "small")
    other: nn.Module = animal.build(seed=7)
    again = fxcompress.load(tmp_path / "small", other, backend="eager")
    assert torch.equal(scores(again(**animal.inputs())), scores(small(**animal.inputs())))
