"""The recipes that come with the program, as data in the same shape as a recipe file."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS", "recipes"]

PRESETS: dict[str, dict[str, Any]] = {
    "w8a16": {
        "summary": "8-bit weights, full-precision activations; needs no data and is close to lossless",
        "passes": [{"quantize-weights": {"bits": 8}}, "fuse-siblings"],
    },
    "w4a16": {
        "summary": "4-bit weights in groups of 64; needs no data",
        "passes": [{"quantize-weights": {"bits": 4, "group_size": 64}}, "fuse-siblings"],
    },
    "w4a16-gptq": {
        "summary": "4-bit weights rounded by GPTQ on calibration data; the best 4-bit quality",
        "passes": [
            {"gptq": {"bits": 4, "group_size": 64}},
            {"quantize-weights": {"bits": 4, "group_size": 64, "only_remaining": True}},
            "fuse-siblings",
        ],
    },
    "w4a16-awq": {
        "summary": "4-bit weights after scaling up the channels that meet large activations; needs data",
        "passes": [
            {"awq": {"bits": 4, "group_size": 64}},
            {"clip-weights": {"bits": 4, "group_size": 64}},
            {"quantize-weights": {"bits": 4, "group_size": 64}},
            "fuse-siblings",
        ],
    },
    "w4a16-awq-gptq": {
        "summary": "w4a16-awq's scales, then rounding by GPTQ; needs calibration data",
        "passes": [
            {"awq": {"bits": 4, "group_size": 64}},
            {"gptq": {"bits": 4, "group_size": 64}},
            {"quantize-weights": {"bits": 4, "group_size": 64, "only_remaining": True}},
            "fuse-siblings",
        ],
    },
    "nf4": {
        "summary": "4-bit codes of a normal distribution's quantiles in groups of 64; needs no data",
        "passes": [
            {"quantize-codebook": {"table": "nf4"}},
            {"quantize-weights": {"only_remaining": True}},
            "fuse-siblings",
        ],
    },
    "w4a16-kmeans": {
        "summary": "4-bit codes into a table per row, learned from weights and inputs; needs data",
        "passes": [
            {"quantize-codebook": {"table": "kmeans", "weighting": "second-moment"}},
            {"quantize-weights": {"only_remaining": True}},
            "fuse-siblings",
        ],
    },
    "w4a16-eora": {
        "summary": "w4a16-gptq with 8-bit factors of rank 32 that make up for the rounding; needs data",
        "passes": [
            {"gptq": {"bits": 4, "group_size": 64}},
            {"quantize-weights": {"bits": 4, "group_size": 64, "only_remaining": True}},
            {"low-rank-residual": {"rank": 32, "bits": 8}},
            "fuse-siblings",
        ],
    },
    "svd-llm-20": {
        "summary": "a fifth of every linear layer's numbers removed by factoring, full precision; needs data",
        "passes": [{"svd-llm": {"keep": 0.8}}],
    },
    "svd-llm-20-w8a16": {
        "summary": "svd-llm-20 with both factors (and all else) in 8-bit codes; needs calibration data",
        "passes": [{"svd-llm": {"keep": 0.8}}, {"quantize-weights": {"bits": 8}}, "fuse-siblings"],
    },
    "w8a8": {
        "summary": "8-bit weights per channel and 8-bit activations per token; needs no data, fast prefill",
        "passes": [
            {"quantize-weights": {"bits": 8, "group_size": 0}},
            {"quantize-activations": {"bits": 8, "mode": "dynamic"}},
            "fuse-siblings",
        ],
    },
    "w8a8-smooth": {
        "summary": "w8a8 after moving activation outliers into the weights; needs calibration data",
        "passes": [
            {"smooth-activations": {"alpha": "search"}},
            {"quantize-weights": {"bits": 8, "group_size": 0}},
            {"quantize-activations": {"bits": 8, "mode": "dynamic"}},
            "fuse-siblings",
        ],
    },
    "w8a8-mixed": {
        "summary": "w8a8-smooth in groups of 64, the few worst inputs left at 16 bits; best 8-bit quality",
        "passes": [
            {"smooth-activations": {"alpha": "search", "group_size": 64}},
            {"quantize-weights": {"bits": 8, "group_size": 64}},
            {"quantize-activations": {"bits": 8, "mode": "dynamic", "max_error": 0.015}},
            "fuse-siblings",
        ],
    },
    "w8a8-outliers": {
        "summary": "static 8 bits after centring and shrinking outliers; dynamic or 16 bits where that loses",
        "passes": [
            {"suppress-outliers": {"group_size": 64}},
            {"quantize-weights": {"bits": 8, "group_size": 64}},
            {"quantize-activations": {"bits": 8, "mode": "static", "max_error": 0.015}},
            {"quantize-activations": {"bits": 8, "mode": "dynamic", "max_error": 0.015}},
            "fuse-siblings",
        ],
    },
    "w8a8-outlier-split": {
        "summary": "w8a8 with channels that reach 3.0 computed in float, found in every call; needs no data",
        "passes": [
            {"split-outlier-features": {"threshold": 3.0, "group_size": 64}},
            {"quantize-weights": {"bits": 8, "only_remaining": True}},
        ],
    },
    "w8a8-outlier-columns": {
        "summary": "w8a8 with the 16 largest channels of every layer in float; needs calibration data",
        "passes": [
            {"split-outlier-features": {"columns": 16}},
            {"quantize-weights": {"bits": 8, "only_remaining": True}},
        ],
    },
    "w8a8-reorder": {
        "summary": "w8a8, a static scale per cluster of channels, the worst inputs at 16 bits; needs data",
        "passes": [
            "reorder-channels",
            {"quantize-weights": {"bits": 8, "group_size": 64}},
            {"quantize-activations": {"bits": 8, "mode": "cluster", "max_error": 0.012}},
            "fuse-siblings",
        ],
    },
    "w4a8": {
        "summary": "4-bit weights in groups of 64, 8-bit activations per token; no data, fastest decoding",
        "passes": [
            {"quantize-weights": {"bits": 4, "group_size": 64}},
            {"quantize-activations": {"bits": 8, "mode": "dynamic"}},
            "fuse-siblings",
        ],
    },
    "w4a8-reorder": {
        "summary": "GPTQ 4-bit weights, 8-bit activations with a scale per cluster of channels; needs data",
        "passes": [
            "reorder-channels",
            {"gptq": {"bits": 4, "group_size": 64}},
            {"quantize-weights": {"bits": 4, "group_size": 64, "only_remaining": True}},
            {"quantize-activations": {"bits": 8, "mode": "cluster"}},
            "fuse-siblings",
        ],
    },
    "w8a8-zeroquant": {
        "summary": "8-bit weights and activations, each layer distilled from the original; needs data",
        "passes": [
            {"layer-distill": {"bits": 8}},
            {"quantize-weights": {"bits": 8, "only_remaining": True}},
            "fuse-siblings",
        ],
    },
    "w4a8-zeroquant": {
        "summary": "4-bit weights in groups of 64, 8-bit activations, layers distilled; needs data",
        "passes": [
            {"layer-distill": {"bits": 4, "group_size": 64}},
            {"quantize-weights": {"bits": 4, "group_size": 64, "only_remaining": True}},
            "fuse-siblings",
        ],
    },
    "sparse-2of4": {
        "summary": "2 of every 4 inputs kept (SparseGPT), stored without the zeros; needs calibration data",
        "passes": [{"sparsegpt": {"pattern": "2:4"}}, "pack-sparse"],
    },
    "sparse-2of4-w8a8": {
        "summary": "2 of every 4 inputs kept (SparseGPT), 8-bit weights and activations; needs data",
        "passes": [
            {"sparsegpt": {"pattern": "2:4"}},
            {"quantize-weights": {"bits": 8, "group_size": 0}},
            {"quantize-activations": {"bits": 8, "mode": "dynamic"}},
            "fuse-siblings",
            "pack-sparse",
        ],
    },
    "sparse50-w4a16-gptq": {
        "summary": "half of the weights zero (SparseGPT), the rest 4 bits by GPTQ; smallest; needs data",
        "passes": [
            {"sparsegpt": {"sparsity": 0.5}},
            {"gptq": {"bits": 4, "group_size": 64}},
            {"quantize-weights": {"bits": 4, "group_size": 64, "only_remaining": True}},
            "fuse-siblings",
            "pack-sparse",
        ],
    },
    "kv8": {
        "summary": "8-bit key/value cache, one scale per token and head; weights untouched, needs no data",
        "passes": [{"quantize-kv-cache": {"bits": 8}}],
    },
    "kv-fp8": {
        "summary": "8-bit floating-point key/value cache per token and head; needs no data",
        "passes": [{"quantize-kv-cache": {"format": "fp8-e4m3"}}],
    },
    "kv4-kivi": {
        "summary": "4-bit key/value cache, keys per channel, 64 recent tokens exact; needs no data",
        "passes": [
            {"quantize-kv-cache": {"bits": 4, "key_axis": "channel", "group_size": 64, "residual": 64}}
        ],
    },
    "kv2-kivi": {
        "summary": "2-bit key/value cache, keys per channel, 32 recent tokens exact; needs no data",
        "passes": [
            {"quantize-kv-cache": {"bits": 2, "key_axis": "channel", "group_size": 32, "residual": 32}}
        ],
    },
    "kv4-rotated": {
        "summary": "4-bit key/value cache per token and head in a rotated basis; needs no data",
        "passes": [{"quantize-kv-cache": {"bits": 4, "rotate": True}}],
    },
    "kv4-wkvquant": {
        "summary": "4-bit key/value cache, calibrated per channel and scaled per token; needs data",
        "passes": [{"wkvquant": {"bits": 4}}],
    },
    "kv3-kvquant": {
        "summary": "3-bit key/value cache by codebooks, keys before rotation, 1 % outliers apart; needs data",
        "passes": [{"kvquant": {"bits": 3}}],
    },
    "kv2-kvquant": {
        "summary": "2-bit key/value cache by codebooks, keys before rotation, 1 % outliers apart; needs data",
        "passes": [{"kvquant": {"bits": 2, "q_norm": True}}],
    },
    "prune20-flap": {
        "summary": "20 % fewer block parameters: channels by fluctuation, readers refitted; needs data",
        "passes": [
            {
                "prune-channels": {
                    "amount": 0.2,
                    "target": "block-parameters",
                    "importance": "flap",
                    "max_amount": 0.9,
                    "recover": True,
                    "round_to": 16,
                }
            }
        ],
    },
    "prune20-taylor": {
        "summary": "20 % fewer block parameters: channels by the loss's gradient, refitted; needs data",
        "passes": [
            {
                "prune-channels": {
                    "amount": 0.2,
                    "target": "block-parameters",
                    "importance": "taylor",
                    "recover": True,
                    "round_to": 16,
                }
            }
        ],
    },
    "prune20-flap-w4a16-gptq": {
        "summary": "prune20-flap, then 4-bit weights rounded by GPTQ; needs calibration data",
        "passes": [
            {
                "prune-channels": {
                    "amount": 0.2,
                    "target": "block-parameters",
                    "importance": "flap",
                    "max_amount": 0.9,
                    "recover": True,
                    "round_to": 64,
                }
            },
            {"gptq": {"bits": 4, "group_size": 64}},
            {"quantize-weights": {"bits": 4, "group_size": 64, "only_remaining": True}},
            "fuse-siblings",
        ],
    },
    "drop-blocks-20": {
        "summary": "every fifth block less, those without which the text is predicted best; needs data",
        "passes": [{"remove-blocks": {"amount": 0.2, "criterion": "perplexity"}}],
    },
    "llm-qat-w4a8kv4": {
        "summary": "4-bit weights and cache, 8-bit activations, trained on text of its own (LLM-QAT); slow",
        "passes": [
            {"quantize-weights": {"bits": 4, "group_size": 0, "symmetric": True}},
            {"quantize-activations": {"bits": 8, "mode": "dynamic"}},
            {"quantize-kv-cache": {"bits": 4}},
            {"distill": {"train": ["weights"], "scale_steps": "range", "learning_rate": 2e-5, "warmup": 0.0}},
            "fuse-siblings",
        ],
    },
    "w3a16-distilled": {
        "summary": "3-bit weights by GPTQ, then weights and scales trained on the original; needs data, slow",
        "passes": [
            {"gptq": {"bits": 3, "group_size": 64}},
            {"quantize-weights": {"bits": 4, "group_size": 64, "only_remaining": True}},
            {"distill": {"train": ["weights"], "learning_rate": 2e-5}},
            "fuse-siblings",
        ],
    },
    "qlora": {
        "summary": "NF4 weights with 8-bit scales and trained low-rank branches (QLoRA); needs data, slow",
        "passes": [
            {"quantize-codebook": {"table": "nf4", "double_quant": True}},
            {"quantize-weights": {"only_remaining": True}},
            {"distill": {"train": ["lora"], "rank": 16, "learning_rate": 2e-4}},
            "fuse-siblings",
        ],
    },
    "loftq": {
        "summary": "NF4 weights, low-rank branches fitted in turns (LoftQ) and then trained; needs data",
        "passes": [
            {"quantize-codebook": {"table": "nf4"}},
            {"quantize-weights": {"only_remaining": True}},
            {"low-rank-residual": {"rank": 16, "metric": "weights", "iterations": 5}},
            {"distill": {"train": ["lora"], "rank": 16, "learning_rate": 1e-4}},
            "fuse-siblings",
        ],
    },
    "peqa-w4a16": {
        "summary": "4-bit weights whose scales alone are trained (PEQA); needs data, slow",
        "passes": [
            {"quantize-weights": {"bits": 4, "group_size": 64}},
            {"distill": {"train": ["scales"], "learning_rate": 1e-3}},
            "fuse-siblings",
        ],
    },
    "sparse-2of4-distilled": {
        "summary": "sparse-2of4 with the kept weights trained on the original; needs data, slow",
        "passes": [
            {"sparsegpt": {"pattern": "2:4"}},
            {"distill": {"train": ["weights"], "learning_rate": 5e-5}},
            "pack-sparse",
        ],
    },
    "prune30-flap-lora": {
        "summary": "30 % fewer block parameters, healed by trained low-rank updates; needs data, slow",
        "passes": [
            {
                "prune-channels": {
                    "amount": 0.3,
                    "target": "block-parameters",
                    "importance": "flap",
                    "max_amount": 0.9,
                    "recover": True,
                    "round_to": 16,
                }
            },
            {"distill": {"train": ["lora", "floats"], "rank": 32, "learning_rate": 5e-4}},
        ],
    },
    "qdq-int8": {
        "summary": "quantize/dequantize pairs at weights, inputs, attention and sums, static; needs data",
        "passes": [{"insert-quant-dequant": {"activations": "tensor"}}],
    },
    "fp8": {
        "summary": "8-bit floating-point weights per channel and activations per token; needs no data",
        "passes": [
            {"quantize-weights": {"format": "fp8-e4m3"}},
            {"quantize-activations": {"format": "fp8-e4m3", "mode": "dynamic"}},
        ],
    },
    "fp8-static": {
        "summary": "8-bit floating point with one calibrated scale per activation; needs calibration data",
        "passes": [
            {"quantize-weights": {"format": "fp8-e4m3"}},
            {"quantize-activations": {"format": "fp8-e4m3", "mode": "static"}},
        ],
    },
}


def recipes() -> dict[str, str]:
    """Names of the built-in recipes with a one-line summary each.

    Example:
        >>> recipes()["w8a16"]
        '8-bit weights, full-precision activations; needs no data and is close to lossless'
    """
    return {name: str(preset["summary"]) for name, preset in PRESETS.items()}
