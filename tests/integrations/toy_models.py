"""Toy models of real families, their checkpoints, and the real text they read.

Shape suffixes: R micro-batches of one step, S tokens of one of them.
"""

import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

VOCABULARY = 256  # tokens are bytes


class Family(NamedTuple):
    """A `model_type` of transformers at toy size. `experts` is its config's name for their number."""

    model_type: str
    special: str
    experts: str
    settings: dict[str, Any]


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("mixtral", "auxiliary router loss", "num_local_experts", {"output_router_logits": True}),
        Family(
            "qwen3_moe",
            "4 of 8 experts a token, weights not normalised",
            "num_experts",
            {"moe_intermediate_size": 24, "num_experts_per_tok": 4, "head_dim": 8},
        ),
        Family(
            "qwen2_moe",
            "shared expert behind a gate, attention biases",
            "num_experts",
            {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 48},
        ),
        Family("olmoe", "norms of queries and keys", "num_experts", {"clip_qkv": 4.0}),
        Family(
            "deepseek_v3",
            "shared expert, sigmoid routing with bias and groups, a dense first layer, latent attention",
            "n_routed_experts",
            {
                "moe_intermediate_size": 24,
                "num_hidden_layers": 3,
                "num_key_value_heads": 4,
                "first_k_dense_replace": 1,
                "n_group": 2,
                "topk_group": 1,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
            },
        ),
        Family(
            "glm4_moe",
            "shared expert, sigmoid routing with bias, a dense first layer",
            "n_routed_experts",
            {"moe_intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 8, "use_qk_norm": True},
        ),
        Family(
            "gpt_oss",
            "biases, clamped SwiGLU, interleaved and transposed weights, attention sinks",
            "num_local_experts",
            {
                "head_dim": 8,
                "sliding_window": 16,
                "swiglu_limit": 0.25,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        Family(
            "granitemoe",
            "scaled embeddings, residuals, attention and logits",
            "num_local_experts",
            {
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.3,
                "logits_scaling": 2.0,
            },
        ),
        Family(
            "ernie4_5_moe",
            "shared experts, softmax routing with bias, a dense first layer, tied embeddings",
            "moe_num_experts",
            {
                "moe_intermediate_size": 24,
                "num_hidden_layers": 3,
                "moe_k": 2,
                "moe_layer_end_index": 2,
                "tie_word_embeddings": True,
            },
        ),
        Family(
            "phimoe",
            "SparseMixer routing, layer norms, biases",
            "num_local_experts",
            {"router_jitter_noise": 0.3},
        ),
        Family(
            "nemotron_h",
            "experts without a gate (squared ReLU), shared expert, sigmoid routing with bias",
            "n_routed_experts",
            {
                "layers_block_type": ["full_attention", "moe", "full_attention", "moe"],
                "num_hidden_layers": 4,
                "moe_intermediate_size": 24,
                "moe_shared_expert_intermediate_size": 48,
                "head_dim": 8,
            },
        ),
    )
}


def toy_config(name: str, experts: int) -> PreTrainedConfig:
    family = FAMILIES[name]
    return AutoConfig.for_model(family.model_type, **{**COMMON, **family.settings, family.experts: experts})


def write_checkpoint(name: str, experts: int, folder: Path) -> None:
    """Save a toy model whose every parameter is random: a zero bias would hide a bias in the wrong place."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(toy_config(name, experts))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            noise = torch.randn_like(tensor)
            norm = "norm" in key and key.endswith("weight")
            tensor.copy_(1 + 0.1 * noise if norm else noise * _scale(tensor))
    model.save_pretrained(folder)


def _scale(tensor: Tensor) -> float:
    """Keeps activations near 1 through matrices; biases small."""
    return 0.1 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5


@cache
def _text() -> bytes:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join((folder / name).read_bytes() for name in ("heapq.py", "textwrap.py", "fractions.py"))


def micro_batch(step: int, rank: int) -> Tensor:
    """int64 (1, S): bytes of the standard library's own sources; S grows by 8 with each rank."""
    start = 1000 * step + 4000 * rank
    return torch.tensor(list(_text()[start : start + 40 + 8 * rank])).unsqueeze(0)
