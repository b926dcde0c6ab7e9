"""The pretrained models load from their packages and make sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.real_model


@torch.no_grad()
def test_smollm_continues_a_sentence(smollm: tuple[Any, Any]) -> None:
    model, tokenizer = smollm
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in answer


@torch.no_grad()
def test_small_model_has_the_first_blocks_of_the_real_one(smollm: tuple[Any, Any], smollm_small: Any) -> None:
    ids = smollm[1]("Rain fell on the harbour.", return_tensors="pt").input_ids
    whole = smollm[0](ids, output_hidden_states=True).hidden_states
    part = smollm_small.model(ids, output_hidden_states=True).hidden_states
    assert smollm_small.config.num_hidden_layers == len(smollm_small.model.layers) == 3
    torch.testing.assert_close(part[2], whole[2], rtol=0, atol=0)
    assert smollm_small.lm_head.weight is smollm_small.model.embed_tokens.weight


@torch.no_grad()
def test_minilm_ranks_similar_sentences(minilm: tuple[Any, Any]) -> None:
    model, tokenizer = minilm
    texts = ["The ferry leaves at noon.", "The boat departs at midday.", "He planted onions and carrots."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    similar = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert similar[0] > similar[1] + 0.3
