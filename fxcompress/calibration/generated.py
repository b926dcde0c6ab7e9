"""Calibration text sampled from the model itself.

The distribution a language model generates is the one it models: no outside text is needed, and no particular
kind of text is favoured. First tokens are drawn over the whole vocabulary, a few greedy tokens settle on a
continuation, the rest is sampled (the data generation of LLM-QAT, Liu et al. 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import CalibrationError

SAMPLES = 32
LENGTH = 256
_GREEDY = 4


def generated_tokens(
    model: nn.Module, *, samples: int = SAMPLES, length: int = LENGTH, seed: int = 0
) -> list[Tensor]:
    """Sample token sequences from a causal language model.

    Args:
        model: Has transformers' ``generate`` and a text configuration.
        samples: Number of sequences. Default 32.
        length: Tokens per sequence. Default 256.
        seed: Of the sampling.

    Returns:
        ``samples`` tensors ``[1, length]`` of token ids.

    Raises:
        CalibrationError: the model takes something else than token ids alone.
    """
    config: Any = model.config
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or getattr(
        config, "is_encoder_decoder", False
    ):
        raise CalibrationError(
            f"{type(model).__name__} cannot make its own calibration text.", fix="pass calibration=..."
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, int(text.vocab_size), (samples, 1), generator=generator)
    generate: Any = model.generate
    common = {"pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = generate(first, max_new_tokens=_GREEDY, do_sample=False, **_masked(first), **common)
        ids = generate(
            start,
            max_new_tokens=length - 1 - _GREEDY,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            **_masked(start),
            **common,
        )
    return [row.unsqueeze(0) for row in ids]


def _masked(ids: Tensor) -> dict[str, Tensor]:
    return {"attention_mask": torch.ones_like(ids)}
