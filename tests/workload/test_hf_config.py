"""Configs are found by path and by name, and what is wrong with one is a single error naming the field."""

import json

import pytest
from tests.workload.toy_configs import toy

from anabranch.errors import ConfigError
from anabranch.workload.hf_config import read_shape, shape_from_config, shipped_shapes


@pytest.mark.parametrize(
    "name",
    ["Qwen/Qwen3-30B-A3B-config.json", "Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b", "Qwen3-30B-A3B.json"],
)
def test_a_shipped_shape_has_many_names(name):
    assert read_shape(name) == read_shape("Qwen/Qwen3-30B-A3B")
    assert read_shape(name).layers == 48


def test_the_repository_and_the_short_name_of_a_model_may_differ():
    assert read_shape("allenai/OLMoE-1B-7B-0924") == read_shape("olmoe-1b-7b")
    assert len(shipped_shapes()) == 15


def test_a_file_and_a_models_folder(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(toy("mixtral")))
    assert read_shape(path) == read_shape(str(tmp_path)) == shape_from_config(toy("mixtral"))


def test_the_text_part_of_a_model_of_images():
    inner = toy("llama4_text")
    assert shape_from_config({"model_type": "llama4", "text_config": inner}) == shape_from_config(inner)
    with pytest.raises(ConfigError, match=r"^text_config\.num_hidden_layers: missing"):
        shape_from_config({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}})


@pytest.mark.parametrize(
    ("setting", "family", "changes"),
    [
        ("model_type", "mixtral", {"model_type": "mamba"}),
        ("model_type", "mixtral", {"model_type": None}),
        ("hidden_size", "mixtral", {"hidden_size": None}),
        ("hidden_size", "mixtral", {"hidden_size": -64}),
        ("vocab_size", "mixtral", {"vocab_size": 96.0}),
        ("num_hidden_layers", "mixtral", {"num_hidden_layers": True}),
        ("num_attention_heads", "mixtral", {"num_attention_heads": 6}),
        ("num_key_value_heads", "mixtral", {"num_key_value_heads": 3}),
        ("num_experts_per_tok", "mixtral", {"num_experts_per_tok": 7}),
        ("num_local_experts", "mixtral", {"num_local_experts": None}),
        ("tie_word_embeddings", "mixtral", {"tie_word_embeddings": "no"}),
        ("head_dim", "qwen3", {"head_dim": None}),
        ("layer_types", "qwen3", {"layer_types": ["full_attention"]}),
        ("layer_types", "qwen3", {"layer_types": ["linear_attention"] * 4}),
        ("sliding_window", "gpt_oss", {"sliding_window": None}),
        ("mlp_only_layers", "qwen2_moe", {"mlp_only_layers": [4]}),
        ("intermediate_size", "deepseek_v3", {"intermediate_size": None}),
        ("n_head", "gpt2", {"n_head": 5}),
        ("resid_pdrop", "gpt2", {"resid_pdrop": -0.1}),
        ("text_config", "llama4_text", {"model_type": "llama4"}),
    ],
)
def test_what_is_wrong_is_named(setting, family, changes):
    with pytest.raises(ConfigError, match=r"in the config\)$") as error:
        shape_from_config(toy(family) | changes)
    assert error.value.setting == setting


def test_a_low_rank_is_null_not_absent():
    config = toy("deepseek_v3")
    del config["q_lora_rank"]
    with pytest.raises(ConfigError, match=r"^q_lora_rank: missing"):
        shape_from_config(config)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "cannot be read as JSON"), ("[]", "holds no JSON object"), ("{}", "^model_type: missing")],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, problem):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as error:
        read_shape(path)
    assert str(path) in str(error.value)


def test_a_name_that_is_not_shipped():
    with pytest.raises(ConfigError, match=r"^model: nobody/nothing .* shipped are .*Qwen/Qwen3-30B-A3B"):
        read_shape("nobody/nothing")
