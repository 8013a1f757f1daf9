"""A small config of every family, with odd sizes and the family's options set against their defaults."""

SIZES: dict[str, object] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 112, "num_experts_per_tok": 2,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LATENT: dict[str, object] = {
    "q_lora_rank": 20, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 10, "v_head_dim": 9,
    "n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 24,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LOCAL: dict[str, object] = {"num_local_experts": 6}

# By "family" or "family, what is special".
TOYS: dict[str, dict[str, object]] = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"head_dim": 24, "sliding_window": 8},
    "granite": {"attention_bias": True},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {"head_dim": 24, "attention_bias": True},
    "gemma2": {"head_dim": 24, "sliding_window": 8},
    "gemma3_text": {"head_dim": 24, "sliding_window": 8},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 32},
    "mixtral": LOCAL | {"sliding_window": 8},
    "granitemoe": LOCAL | {"attention_bias": True},
    "phimoe": LOCAL | {"attention_bias": True, "lm_head_bias": True},
    "olmoe": {"num_experts": 6, "attention_bias": True},
    "minimax_m2": LOCAL | {"head_dim": 24},
    "qwen2_moe": {
        "num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1],
    },
    "qwen3_moe": {"head_dim": 24, "num_experts": 6, "moe_intermediate_size": 24, "decoder_sparse_step": 2},
    "gpt_oss": LOCAL | {"head_dim": 24, "sliding_window": 8},
    "deepseek_v2": LATENT,
    "deepseek_v2, direct queries": LATENT | {"q_lora_rank": None, "attention_bias": True},
    "deepseek_v3": LATENT | {"num_nextn_predict_layers": 1, "attention_bias": True},
    "deepseek_v3, direct queries": LATENT | {"q_lora_rank": None, "tie_word_embeddings": True},
    "glm4_moe": {
        "head_dim": 24, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "moe_intermediate_size": 24, "attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 1,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2, "moe_intermediate_size": 24,
        "moe_layer_start_index": 1, "moe_layer_interval": 2, "use_bias": True, "tie_word_embeddings": False,
    },
    "hunyuan_v1_moe": {"head_dim": 24, "num_experts": 6, "moe_topk": 2, "attention_bias": True},
    "llama4_text": LOCAL | {
        "head_dim": 24, "num_experts_per_tok": 1, "intermediate_size_mlp": 80, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
    },
}  # fmt: skip


def toy(name: str) -> dict[str, object]:
    """The config of one of TOYS, as a config.json would hold it."""
    family = name.split(",")[0]
    sizes = {"vocab_size": 96} if family == "gpt2" else SIZES
    return {"model_type": family, **sizes, **TOYS[name]}
