"""The decoding loop: transformers' tokens by replaying one compiled step; other cases use its own loop."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import fxcompress
from fxcompress import CompressedModel
from fxcompress.decoding import DecodeSession
from fxcompress.decoding_cache import NotCoveredError
from fxcompress.errors import FxCompressError
from tests.zoo import entry

COVERED = ("llama-tied-odd", "gpt2-odd", "mixtral", "qwen3-moe", "phi3")
OTHERS = ("gemma2", "t5", "mamba")


def compressed(name: str, backend: str = "eager", recipe: str = "w8a16") -> CompressedModel:
    model = entry(name).build()
    small = fxcompress.compress(model, recipe, verify="off")
    small.set_backend(backend)
    return small


def prompt(name: str, batch: int = 2, length: int = 5) -> dict[str, Tensor]:
    ids = entry(name).tensors(batch, length)["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def both(small: CompressedModel, **options: Any) -> tuple[Tensor, Tensor]:
    """The loop's tokens and those of transformers' own loop on the same compressed model."""
    torch.manual_seed(7)
    ours = small.generate(**options)
    torch.manual_seed(7)
    return ours, small.model.generate(**options)


def only_session(small: CompressedModel) -> DecodeSession:
    (session,) = small.generate._sessions.values()
    return session


@pytest.mark.parametrize("name", COVERED)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    small = compressed(name)
    ours, theirs = both(small, **prompt(name), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(ours, theirs)
    assert only_session(small)._replay is not None


@pytest.mark.parametrize("name", ["llama-tied-odd", "gpt2-odd"])
def test_compiled_steps_are_replayed(name: str) -> None:
    small = compressed(name, backend="inductor", recipe="w4a8")
    options = {**prompt(name), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ours, theirs = both(small, **options)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, small.generate(**options))
    assert only_session(small)._replay is not None


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
        {"do_sample": False, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "eos_token_id": list(range(0, 97, 3)), "pad_token_id": 1},
    ],
    ids=["sampling", "processors", "several", "ends"],
)
def test_choices_of_tokens_are_those_of_transformers(options: dict[str, Any]) -> None:
    small = compressed("llama-tied-odd")
    ours, theirs = both(small, **prompt("llama-tied-odd"), max_new_tokens=9, **options)
    assert torch.equal(ours, theirs)
    assert small.generate._sessions


def test_padded_prompts_see_no_padding() -> None:
    small = compressed("llama-tied-odd")
    inputs = prompt("llama-tied-odd", 3, 6)
    for row, missing in enumerate((0, 2, 5)):
        inputs["attention_mask"][row, :missing] = 0
        inputs["input_ids"][row, :missing] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    ours, theirs = both(small, **inputs, **options)
    assert torch.equal(ours, theirs)
    alone = small.generate(input_ids=inputs["input_ids"][1:2, 2:], **options)
    assert torch.equal(alone[0], ours[1, 2:])


def test_sizes_share_a_session_and_start_over() -> None:
    small = compressed("llama-tied-odd")
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    long = prompt("llama-tied-odd", 1, 9)
    for length, count in ((9, 4), (3, 12), (1, 2)):
        part = {key: value[:, :length] for key, value in long.items()}
        ours, theirs = both(small, **part, max_new_tokens=count, **options)
        assert torch.equal(ours, theirs)
    assert len(small.generate._sessions) == 1


def test_caches_of_other_capacities_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second on, Dynamo takes the capacity for a symbol; only the mask needs its value."""
    monkeypatch.setattr("fxcompress.generation_cache._LEAST", 8)
    small = compressed("llama-tied-odd", backend="inductor")
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    for count in (3, 8, 20):
        ours, theirs = both(small, **prompt("llama-tied-odd"), max_new_tokens=count, **options)
        assert torch.equal(ours, theirs)
    assert len(small.generate._sessions) == 3


def test_streams_every_token() -> None:
    class Collect:
        def __init__(self) -> None:
            self.found: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.found += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    small = compressed("llama-tied-odd")
    streamer = Collect()
    tokens = small.generate(
        **prompt("llama-tied-odd", 1), max_new_tokens=5, do_sample=False, streamer=streamer, eos_token_id=None
    )
    assert streamer.ended
    assert streamer.found == tokens[0].tolist()


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_use_the_loop_of_transformers(name: str, caplog: pytest.LogCaptureFixture) -> None:
    small = compressed(name)
    with caplog.at_level(logging.INFO, logger="fxcompress.decoding"):
        ours, theirs = both(small, **prompt(name), max_new_tokens=4, do_sample=False)
    assert torch.equal(ours, theirs)
    assert "transformers' generation loop is used" in caplog.text
    with pytest.raises(NotCoveredError):
        small.generate.session(1, 10)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"position_ids": torch.arange(5).expand(2, 5)}, "position_ids"),
    ],
)
def test_other_calls_use_the_loop_of_transformers(
    options: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    small = compressed("llama-tied-odd")
    with caplog.at_level(logging.INFO, logger="fxcompress.decoding"):
        found = small.generate(**prompt("llama-tied-odd"), max_new_tokens=3, do_sample=False, **options)
    assert why in caplog.text
    tokens = found if isinstance(found, Tensor) else found.sequences
    assert tokens.shape == (2, 8)
    assert not small.generate._sessions


def test_a_weight_assigned_between_calls_counts() -> None:
    small = compressed("llama-tied-odd")
    options = {**prompt("llama-tied-odd"), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    before = small.generate(**options)
    with torch.no_grad():
        small.model.model.norm.weight.neg_()
    ours, theirs = both(small, **options)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, before)


def test_changing_the_backend_starts_over() -> None:
    small = compressed("llama-tied-odd")
    options = {**prompt("llama-tied-odd"), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    before = small.generate(**options)
    small.set_backend("inductor")
    assert torch.equal(small.generate(**options), before)


def test_few_sessions_are_kept() -> None:
    small = compressed("llama-tied-odd")
    for batch in range(1, 7):
        small.generate.session(batch, 10)
    assert len(small.generate._sessions) == 4


def test_a_cache_that_would_not_fit_is_left_to_grow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = compressed("llama-tied-odd")
    options = {**prompt("llama-tied-odd"), "max_new_tokens": 4, "do_sample": False}
    with caplog.at_level(logging.INFO, logger="fxcompress.decoding"), monkeypatch.context() as patched:
        patched.setattr("fxcompress.decoding_cache.physical_memory", lambda: 1000)
        found = small.generate(**options)
    assert "a cache for this length takes" in caplog.text
    assert torch.equal(found, small.generate(**options))
    assert small.generate._sessions


def test_a_second_thread_does_not_share_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    small = compressed("llama-tied-odd")
    options = {**prompt("llama-tied-odd"), "max_new_tokens": 4, "do_sample": False}
    expected = small.generate(**options)
    with caplog.at_level(logging.INFO, logger="fxcompress.decoding"), small.generate._busy:
        assert torch.equal(small.generate(**options), expected)
    assert "another thread" in caplog.text


def test_a_cache_of_another_shape_than_the_configuration_says_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = compressed("llama-tied-odd")
    monkeypatch.setattr(small.model.config, "num_key_value_heads", 7)
    with caplog.at_level(logging.INFO, logger="fxcompress.decoding"):
        found = small.generate(**prompt("llama-tied-odd"), max_new_tokens=3, do_sample=False)
    assert "cannot be read into a static cache" in caplog.text
    assert found.shape[1] <= 8


def test_a_session_refuses_what_does_not_fit() -> None:
    small = compressed("llama-tied-odd")
    session = small.generate.session(1, 10)
    ids = prompt("llama-tied-odd", 1, 5)["input_ids"]
    with pytest.raises(FxCompressError, match="do not fit a cache"):
        session.prefill(ids.repeat(1, session.capacity))
    with pytest.raises(FxCompressError, match="padded=True"):
        session.prefill(ids, torch.ones_like(ids))
    session.prefill(ids)
    for _ in range(session.capacity - 5):
        session.step()
    with pytest.raises(FxCompressError, match=f"{session.capacity + 1} tokens"):
        session.step()


def test_every_weight_of_equal_blocks_is_explained() -> None:
    small = compressed("llama-tied-odd", backend="inductor", recipe="w4a8")
    small(input_ids=prompt("llama-tied-odd")["input_ids"])
    matrices = {name for name in small.artifact.forms if small.artifact.forms[name].terms}
    assert set(small.explain()) == matrices
