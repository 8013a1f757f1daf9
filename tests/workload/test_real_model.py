"""What a shape says of a model is true of the model that transformers builds: its parameters by part and its matrix
products exactly, and what its forward keeps for backward within two parts of a hundred."""

import re
from collections.abc import Mapping

import pytest
import torch
from tests.workload.toy_configs import TOYS, toy
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from anabranch.workload.blocks import Kernels
from anabranch.workload.hf_config import read_config, read_shape, shape_from_config, shipped_shapes
from anabranch.workload.shape import ModelShape

# What a parameter belongs to, by its name in any family; the first that fits counts.
PARTS = {
    "attention": r"\.(self_attn|attn|attention)\.",
    "shared": r"\.shared_",
    "experts": r"\.experts\.",
    "router": r"\.(gate|router)\.",
    "dense": r"\.(mlp|feed_forward)\.",
    "head": r"lm_head",
    "positions": r"\.wpe\.",
    "embedding": r"embed|\.wte\.",
    "norms": r"norm|\.ln_",
}
TOKENS = (2, 24)
# Families whose modules are in the pieces that `Kernels(fused=False)` describes; each has attention by a flash kernel
# on a CPU, which windows and heads of unequal sizes have not.
PLAIN = (
    "llama", "granite", "qwen3", "granitemoe", "olmoe", "qwen2_moe", "qwen3_moe", "hunyuan_v1_moe", "phimoe",
)  # fmt: skip
WIDER = {"hidden_size": 128, "intermediate_size": 224, "vocab_size": 512}


def build(config: Mapping[str, object], **how: object) -> nn.Module:
    known = {name: value for name, value in config.items() if name not in ("name", "source")}
    if known["model_type"] == "kimi_k2":  # the checkpoint's own name for the architecture of DeepSeek-V3
        known["model_type"] = "deepseek_v3"
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**known), **how)


def real_parts(config: Mapping[str, object]) -> dict[str, int]:
    parts = dict.fromkeys(PARTS, 0)
    with torch.device("meta"):
        model = build(config)
    for name, parameter in model.named_parameters():
        parts[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += parameter.numel()
    return parts


@pytest.mark.parametrize("name", [*TOYS, *shipped_shapes()])
def test_parameters(name):
    config = toy(name) if name in TOYS else read_config(name)
    shape, real = shape_from_config(config), real_parts(config)
    counted = shape.params_by_part._asdict()
    counted.pop("mtp")  # transformers builds none
    assert counted == real
    assert shape.params == sum(real.values())
    if shape.experts:
        assert shape.expert_params * shape.experts.count * shape.moe_layers == real["experts"]


@pytest.mark.parametrize(
    "name", [name for name in TOYS if not name.startswith("deepseek")]
)  # mtp: absent is 0
def test_a_config_that_transformers_has_saved_is_the_same(tmp_path, name):
    known = {field: value for field, value in toy(name).items() if field not in ("name", "source")}
    AutoConfig.for_model(**known).save_pretrained(tmp_path)
    assert read_shape(tmp_path) == shape_from_config(toy(name))


@pytest.mark.parametrize("name", TOYS)
def test_flops_are_those_of_the_matrix_products(name):
    config = toy(name)
    shape = shape_from_config(config)
    model = build(config, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(TOKENS, dtype=torch.int64), use_cache=False)
    flops = shape.forward_flops(TOKENS[1])
    # Eager attention multiplies the whole square, masked or not.
    square = shape.layers * shape.attention.core_flops(TOKENS[1])
    # Its Llama 4 multiplies every token with every expert, most of them by zero.
    experts = flops.experts * (6 if name == "llama4_text" else 1)
    counted = flops.total - flops.mtp - flops.attention - flops.experts + square + experts
    assert counter.get_total_flops() == counted * TOKENS[0] * TOKENS[1]


def kept_bytes(model: nn.Module, vocab: int) -> int:
    """Bytes of the distinct tensors that forward keeps for backward, the model's own apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, vocab, TOKENS)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def predicted(shape: ModelShape, kernels: Kernels) -> float:
    kept, top_k = shape.kept_numbers("none", kernels), shape.experts.top_k if shape.experts else 0
    moe = shape.moe_layers * (kept.moe.total + top_k * kept.row.total)
    return shape.layers * kept.attention.total + shape.dense_layers * kept.dense.total + moe + kept.head.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_what_forward_keeps(name, dtype):
    config = toy(name) | WIDER
    model = build(config, attn_implementation="sdpa").to(dtype).train()
    measured = kept_bytes(model, 512) / dtype.itemsize / (TOKENS[0] * TOKENS[1])
    kernels = Kernels(fused=False, number_bytes=dtype.itemsize)
    assert predicted(shape_from_config(config), kernels) == pytest.approx(measured, rel=0.02)
