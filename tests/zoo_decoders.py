"""Small random decoders with experts or a recurrence, and the tuple of all decoders of the zoo."""

from __future__ import annotations

from typing import Any

from tests.zoo_causal import BODY, POSITIONS, TOKENS, decoder
from tests.zoo_dense import DENSE
from tests.zoo_entry import ZooEntry

_FIXED = "the scan over time is a Python loop: torch.export specialises on the sequence length"
_CHUNKED = (
    "the chunked scan guards on the padding: only sequence lengths that are multiples of 4 are accepted"
)
_VARIADIC = (
    "forward takes use_cache through **kwargs, for which torch 2.13's export has no working dynamic_shapes: "
    "the configuration turns the cache off instead"
)

_SMALL_MOE: dict[str, Any] = {
    **BODY,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

MIXTURES: tuple[ZooEntry, ...] = (
    decoder("mixtral", "MixtralConfig", "moe rope gqa untied", num_local_experts=4, num_experts_per_tok=2),
    decoder(
        "qwen2-moe",
        "Qwen2MoeConfig",
        "moe shared-expert rope gqa bias untied",
        _SMALL_MOE,
        shared_expert_intermediate_size=40,
        hidden_size=48,
    ),
    decoder("qwen3-moe", "Qwen3MoeConfig", "moe rope gqa qk-norm untied", _SMALL_MOE, head_dim=16),
    decoder(
        "olmoe",
        "OlmoeConfig",
        "moe rope mha qk-norm untied",
        {**BODY, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    ),
    decoder(
        "gpt-oss",
        "GptOssConfig",
        "moe rope gqa attention-sinks sliding-window bias untied",
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        sliding_window=4,
    ),
    decoder(
        "granite-moe",
        "GraniteMoeConfig",
        "moe rope gqa tied",
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        takes_use_cache=False,
        export_note=_VARIADIC,
    ),
    decoder(
        "phimoe", "PhimoeConfig", "moe rope gqa layernorm untied", num_local_experts=4, num_experts_per_tok=2
    ),
    decoder(
        "deepseek-v2",
        "DeepseekV2Config",
        "moe shared-expert mla rope untied three-layers",
        {
            **_SMALL_MOE,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 24,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    decoder(
        "deepseek-v3",
        "DeepseekV3Config",
        "moe shared-expert mla rope untied",
        {
            **_SMALL_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 24,
            "q_lora_rank": 36,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 16,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
)

RECURRENT: tuple[ZooEntry, ...] = (
    decoder(
        "mamba",
        "MambaConfig",
        "state-space conv1d-depthwise tied fixed-length",
        {**TOKENS, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 5},
        export_note=_FIXED,
    ),
    decoder(
        "mamba2",
        "Mamba2Config",
        "state-space conv1d-depthwise untied length-multiple",
        {
            **TOKENS,
            "hidden_size": 48,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 6,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 4,
        },
        export_note=_CHUNKED,
    ),
    decoder(
        "falcon-mamba",
        "FalconMambaConfig",
        "state-space conv1d-depthwise tied fixed-length",
        {**TOKENS, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
        export_note=_FIXED,
    ),
    decoder(
        "jamba",
        "JambaConfig",
        "hybrid state-space moe gqa fixed-length",
        {
            **BODY,
            "num_hidden_layers": 3,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 6,
            "use_mamba_kernels": False,
        },
        export_note=_FIXED,
    ),
    decoder(
        "recurrent-gemma",
        "RecurrentGemmaConfig",
        "hybrid linear-recurrence mqa tied three-layers fixed-length",
        {
            **TOKENS,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "lru_width": 64,
            "attention_window_size": 8,
        },
        export_note=_FIXED,
    ),
    decoder(
        "bamba",
        "BambaConfig",
        "hybrid state-space gqa length-multiple",
        {
            **BODY,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
        },
        export_note=_CHUNKED,
    ),
    decoder(
        "falcon-h1",
        "FalconH1Config",
        "hybrid state-space parallel-branches gqa length-multiple",
        {
            **BODY,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
        },
        export_note=_CHUNKED,
    ),
    decoder(
        "qwen3-next",
        "Qwen3NextConfig",
        "hybrid linear-attention moe gqa shared-expert slow",
        {
            **_SMALL_MOE,
            "shared_expert_intermediate_size": 24,
            "head_dim": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        export_note="the chunked delta rule unrolls to 1,350 nodes in 20 s; agrees to 1e-6, not bit for bit",
    ),
    decoder(
        "lfm2",
        "Lfm2Config",
        "hybrid short-convolution gqa qk-norm tied",
        {**BODY, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    decoder(
        "rwkv",
        "RwkvConfig",
        "rwkv state-space fixed-length",
        {
            **TOKENS,
            "hidden_size": 48,
            "attention_hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "context_length": POSITIONS,
        },
        export_note=_FIXED,
    ),
)

DECODERS: tuple[ZooEntry, ...] = DENSE + MIXTURES + RECURRENT
