"""State before anything is built: every parameter is known, and shares are padded."""

from dataclasses import replace
from math import ceil, prod

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from anabranch.costs.training.state import StateBytes, tensors_of, unbuilt_state_bytes
from anabranch.errors import ConfigError
from anabranch.workload.hf_config import read_shape, shape_from_config, shipped_shapes
from anabranch.workload.layout import Layout

SIZES = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 101}  # fmt: skip
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


@pytest.mark.parametrize("name", shipped_shapes())
def test_every_parameter_is_in_a_tensor(name):
    shape = read_shape(name)
    assert sum(t.rows * t.columns * t.times for t in tensors_of(shape)) == shape.params


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "more"), [("llama", {}), ("qwen3", {}), ("qwen3_moe", EXPERTS), ("olmoe", {})]
)
def test_tensors_are_those_of_the_model(kind, more, tied):
    config = AutoConfig.for_model(kind, **(SIZES | more), tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = sorted((p.shape[0], p.numel()) for p in model.parameters())
    shape = shape_from_config(config.to_dict())
    assert sorted((t.rows, t.rows * t.columns) for t in tensors_of(shape) for _ in range(t.times)) == real


def test_shares_are_padded_to_the_largest():
    config = AutoConfig.for_model("qwen3_moe", **(SIZES | EXPERTS), tie_word_embeddings=False)
    shape = shape_from_config(config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    held = tensors = 0
    for name, p in model.named_parameters():
        # Seven experts on two ranks are four and three, each half of them on one of two ranks.
        rows = 2 if ".experts." in name else ceil(p.shape[0] / 4)
        held, tensors = held + rows * prod(p.shape[1:]), tensors + 1
    layout = Layout(64, 4, dp=4, ep=2, shard="full")
    assert unbuilt_state_bytes(shape, layout) == StateBytes(4 * held, 4 * held, 8 * held + 4 * tensors)
    whole = unbuilt_state_bytes(shape, replace(layout, dp=1, ep=1, shard="none"))
    assert whole.weights == 4 * shape.params


@pytest.mark.parametrize(("setting", "change"), [("tp", {"tp": 2}), ("shard", {"shard": "optimizer"})])
def test_a_layout_that_the_trainer_does_not_have_is_named(setting, change):
    with pytest.raises(ConfigError) as error:
        unbuilt_state_bytes(read_shape("Llama-3.1-8B"), Layout(64, 4, dp=2, **change))
    assert error.value.setting == setting
