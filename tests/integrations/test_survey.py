"""More families, one cell each: whatever else carries an expert plan and builds at toy size without special care.

The matrix (test_parity.py) proves eleven families in depth; this shows that the layer knows nothing of families.
Those that stay out, and why, are in docs/models.md.
"""

from pathlib import Path

import pytest
import torch
from tests.integrations.parity import Judge, Layout, errors, on_rank, oracle
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from run_distributed import RankPool

FAMILIES = [
    "afmoe", "aria_text", "axk1", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v32", "dots1", "exaone_moe",
    "flex_olmo", "flint", "glm4_moe_lite", "glm_moe_dsa", "granitemoe_swa", "granitemoeshared",
    "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "inkling_text", "kolibri1", "laguna", "mellum",
    "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "solar_open",
]  # fmt: skip
LATENT = {"axk1", "deepseek_v2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"}  # as many keys as queries

# Every name that any of them uses for a size; a config takes those that it knows.
SIZES = {
    "unpadded_vocab_size": 256,
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24,
    "shared_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 128,
    "sliding_window": 16, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "num_dense_layers": 0,
    "first_k_dense_replace": 0, "mlp_only_layers": [], "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
# Those that say for each layer what it is: one layer of each kind.
PER_LAYER = ("layer_types", "mlp_layer_types")


def toy_config(family: str) -> PreTrainedConfig:
    defaults = CONFIG_MAPPING[family]()
    sizes = {name: size for name, size in SIZES.items() if hasattr(defaults, name)}
    for name in PER_LAYER:
        if kinds := getattr(defaults, name, None):
            sizes[name] = (list(dict.fromkeys(kinds)) + list(kinds))[:2]
    if family in LATENT:
        sizes["num_key_value_heads"] = 4
    if isinstance(getattr(defaults, "moe_layer_freq", None), list):
        sizes["moe_layer_freq"] = [0, 1]
    return CONFIG_MAPPING[family](**sizes)


def write_checkpoint(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(toy_config(family), attn_implementation="eager")
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn_like(tensor)
                scale = 0.1 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
                tensor.copy_(1 + 0.1 * noise if "norm" in key and tensor.ndim < 2 else scale * noise)
    model.save_pretrained(folder)
    return folder


@pytest.mark.full
@pytest.mark.filterwarnings(
    r"ignore:FSDP2-wrapped module \((?!\w*Experts):UserWarning"
)  # a model's own views
@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_with_an_expert_plan(family: str, ranks2: RankPool, judge: Judge, tmp_path: Path) -> None:
    folder = write_checkpoint(family, tmp_path)
    outcomes = ranks2.run(on_rank, folder, Layout(fsdp=2, ep=2))
    found = errors(outcomes, oracle(folder, 2))
    judge.cells.setdefault(family, []).append(found)
    assert found.worst <= 1e-5, found
    assert outcomes[0].guests > 0
