"""Small random dense decoders, each from a `transformers` configuration and nothing else.

Every entry is two or three layers with a vocabulary of 128. Widths are mixed on purpose: some are
powers of two, some are odd or have an odd quotient, so that partial groups and tiles are the
normal case.
"""

from __future__ import annotations

from tests.zoo_causal import BODY, GPT_BODY, POSITIONS, TOKENS, decoder
from tests.zoo_entry import ZooEntry

DENSE: tuple[ZooEntry, ...] = (
    decoder("llama", "LlamaConfig", "dense rope gqa untied"),
    decoder(
        "llama-tied-odd",
        "LlamaConfig",
        "dense rope mqa tied odd bias three-layers",
        hidden_size=45,
        intermediate_size=87,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
        num_hidden_layers=3,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    decoder("qwen2", "Qwen2Config", "dense rope gqa bias tied", hidden_size=48, tie_word_embeddings=True),
    decoder("qwen3", "Qwen3Config", "dense rope gqa qk-norm untied", head_dim=24),
    decoder(
        "olmo2",
        "Olmo2Config",
        "dense rope mha qk-norm post-norm untied",
        hidden_size=96,
        num_key_value_heads=4,
    ),
    decoder("olmo", "OlmoConfig", "dense rope mha parameterless-norm untied", num_key_value_heads=4),
    decoder(
        "mistral", "MistralConfig", "dense rope gqa sliding-window untied", sliding_window=4, head_dim=16
    ),
    decoder("gemma", "GemmaConfig", "dense rope mqa norm-plus-one tied", num_key_value_heads=1, head_dim=20),
    decoder(
        "gemma2",
        "Gemma2Config",
        "dense rope gqa sliding-window softcap sandwich-norm norm-plus-one tied",
        hidden_size=48,
        head_dim=16,
        sliding_window=4,
        query_pre_attn_scalar=16,
    ),
    decoder(
        "gemma3",
        "Gemma3TextConfig",
        "dense rope gqa qk-norm sliding-window sandwich-norm norm-plus-one tied three-layers",
        head_dim=16,
        sliding_window=4,
        num_hidden_layers=3,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    decoder(
        "phi", "PhiConfig", "dense rope mha parallel-residual bias partial-rope untied", num_key_value_heads=4
    ),
    decoder(
        "phi3",
        "Phi3Config",
        "dense rope gqa fused-qkv fused-gate-up untied",
        hidden_size=72,
        intermediate_size=88,
    ),
    decoder("stablelm", "StableLmConfig", "dense rope gqa partial-rope layernorm untied"),
    decoder("starcoder2", "Starcoder2Config", "dense rope gqa bias layernorm tied", tie_word_embeddings=True),
    decoder(
        "granite",
        "GraniteConfig",
        "dense rope gqa scaled-residual tied",
        tie_word_embeddings=True,
        residual_multiplier=0.5,
        embedding_multiplier=2.0,
        logits_scaling=2.0,
        attention_multiplier=0.25,
    ),
    decoder("glm4", "Glm4Config", "dense rope gqa fused-gate-up sandwich-norm untied", head_dim=16),
    decoder(
        "smollm3",
        "SmolLM3Config",
        "dense rope gqa no-rope-layers tied",
        tie_word_embeddings=True,
        no_rope_layers=[1, 0],
    ),
    decoder("nemotron", "NemotronConfig", "dense rope gqa relu2 norm-plus-one untied"),
    decoder("cohere", "CohereConfig", "dense rope gqa parallel-residual tied", logit_scale=0.25),
    decoder("diffllama", "DiffLlamaConfig", "dense rope gqa differential-attention untied"),
    decoder(
        "falcon",
        "FalconConfig",
        "dense rope mqa parallel-residual fused-qkv tied",
        {
            **TOKENS,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
        },
    ),
    decoder(
        "gpt-neox",
        "GPTNeoXConfig",
        "dense rope mha parallel-residual fused-qkv partial-rope bias untied",
        {**BODY, "hidden_size": 96, "rotary_pct": 0.25},
    ),
    decoder(
        "gptj",
        "GPTJConfig",
        "dense rope mha parallel-residual partial-rope untied",
        {**GPT_BODY, "rotary_dim": 8, "n_inner": 100, "tie_word_embeddings": False},
    ),
    decoder(
        "codegen",
        "CodeGenConfig",
        "dense rope mha parallel-residual fused-qkv untied",
        {**GPT_BODY, "rotary_dim": 8, "tie_word_embeddings": False},
    ),
    decoder(
        "gpt2-odd",
        "GPT2Config",
        "dense learned-positions mha transposed-linear fused-qkv bias tied odd three-layers",
        {**GPT_BODY, "n_embd": 45, "n_head": 3, "n_layer": 3, "n_inner": 75},
    ),
    decoder(
        "gpt-bigcode",
        "GPTBigCodeConfig",
        "dense learned-positions mqa fused-qkv bias tied",
        {**GPT_BODY, "n_embd": 48},
    ),
    decoder(
        "gpt-neo",
        "GPTNeoConfig",
        "dense learned-positions mha local-attention tied",
        {
            **TOKENS,
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": POSITIONS,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "intermediate_size": 80,
        },
    ),
    decoder(
        "opt-odd",
        "OPTConfig",
        "dense learned-positions mha bias tied odd relu",
        {
            **TOKENS,
            "hidden_size": 75,
            "word_embed_proj_dim": 75,
            "ffn_dim": 105,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "max_position_embeddings": POSITIONS,
        },
    ),
    decoder(
        "bloom",
        "BloomConfig",
        "dense alibi mha fused-qkv bias tied",
        {**TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    ),
    decoder(
        "mpt",
        "MptConfig",
        "dense alibi mha fused-qkv tied",
        {
            **TOKENS,
            "d_model": 48,
            "n_layers": 2,
            "n_heads": 4,
            "expansion_ratio": 2,
            "max_seq_len": POSITIONS,
        },
    ),
)
