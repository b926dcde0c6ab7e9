"""How the zoo's causal language models are described: shared sizes, inputs and the entry maker."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.zoo_entry import ZooEntry

VOCAB = 128
POSITIONS = 64
TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BODY: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
GPT_BODY: dict[str, Any] = {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}


def token_ids(batch: int, seq: int) -> dict[str, Tensor]:
    """Random token ids int64 `[batch, seq]`, the special ids 0, 1 and 2 left out."""
    return {"input_ids": torch.randint(3, VOCAB, (batch, seq))}


def causal_lm(config_class: str, options: dict[str, Any], cache_by_default: bool = True) -> nn.Module:
    """Build a causal language model of `transformers` from a configuration class and its options.

    `cache_by_default=False` makes a plain call return no cache; `generate` still uses one.
    """
    config: Any = getattr(transformers, config_class)(**options)
    auto: Any = transformers.AutoModelForCausalLM
    model: Any = auto.from_config(config, dtype=torch.float32)
    if not cache_by_default:
        model.config.use_cache = False
    assert isinstance(model, nn.Module)
    return model


def decoder(
    name: str,
    config_class: str,
    tags: str,
    base: dict[str, Any] | None = None,
    *,
    export_note: str = "",
    takes_use_cache: bool = True,
    **options: Any,
) -> ZooEntry:
    """Describe one decoder: options over `base` (default `BODY`) make the configuration.

    `takes_use_cache` says that `forward` names the keyword `use_cache`.
    """
    merged = {**(BODY if base is None else base), **options}
    return ZooEntry(
        name=name,
        builder=lambda: causal_lm(config_class, dict(merged), cache_by_default=takes_use_cache),
        tags=frozenset(tags.split()) | {"decoder"},
        maker=token_ids,
        generates=True,
        options={"use_cache": False} if takes_use_cache else {},
        dynamic_dims={"input_ids": (0, 1)},
        export_note=export_note,
    )
