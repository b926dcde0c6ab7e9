"""A decoder of about a billion parameters with random weights: speed does not depend on their values."""

from __future__ import annotations

from typing import Any

import torch


def synthetic_model() -> Any:
    """1.1 billion parameters, the proportions of common models of that size, float32, tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()
