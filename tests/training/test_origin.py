"""Where a model comes from: presets, configurations, checkpoints, and what is none of them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from anabranch.errors import AnabranchError, CheckpointError, ConfigError
from anabranch.training.origin import find_origin
from anabranch.training.tokens import load_or_train_tokenizer


@pytest.fixture
def folder(tmp_path, toy_model):
    """A copy of the toy model's folder to spoil."""
    (tmp_path / "config.json").write_text((toy_model / "config.json").read_text())
    return tmp_path


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def add_tokenizer(folder, vocab_size=300):
    load_or_train_tokenizer(
        ["the channel leaves the river"] * 9, vocab_size, folder / "cache"
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    ("preset", "experts", "length"), [("tiny", 16, 256), ("tiny8", 32, 256), ("small", 32, 512)]
)
def test_presets_are_models_from_scratch(preset, experts, length):
    origin = find_origin(preset, None)
    assert (origin.experts, origin.sequence_length, origin.weights) == (experts, length, None)
    assert origin.tokenizer() is None
    assert find_origin(preset, 8).sequence_length == 8


def test_a_configuration_is_a_model_from_scratch_by_folder_or_file(folder):
    for path in (folder, folder / "config.json"):
        origin = find_origin(str(path), None)
        assert (origin.experts, origin.vocab_size, origin.weights) == (4, 320, None)
        assert origin.sequence_length == 64  # max_position_embeddings
        assert origin.tokenizer() is None


def test_a_folder_with_weights_is_continued_with_its_own_tokenizer(folder):
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    origin = find_origin(str(folder), None)
    assert origin.weights == folder
    with pytest.raises(CheckpointError, match=r"^model: .* has weights but no tokenizer.json"):
        origin.tokenizer()
    add_tokenizer(folder)
    assert len(origin.tokenizer()) == 277


def test_a_configuration_beside_a_tokenizer_uses_it(folder):
    add_tokenizer(folder)
    origin = find_origin(str(folder), None)
    assert origin.weights is None
    assert len(origin.tokenizer()) == 277


def test_a_tokenizer_that_does_not_fit_is_refused(folder):
    add_tokenizer(folder)
    change(folder, vocab_size=276)
    with pytest.raises(
        CheckpointError, match=r"^model: .*tokenizer.json has 277 tokens, more than the model's 276"
    ):
        find_origin(str(folder), None).tokenizer()


def test_a_tokenizer_without_an_end_of_text_is_refused(folder):
    add_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError, match=r"^model: .* names no end-of-text token; set eos_token"):
        find_origin(str(folder), None).tokenizer()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "7"])
def test_a_damaged_tokenizer_is_told(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"^model: .*tokenizer.json is not a tokenizer"):
        find_origin(str(folder), None).tokenizer()


def test_weights_in_another_format_are_not_passed_over(folder):
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"^model: .*pytorch_model.bin only; save them as safetensors"):
        find_origin(str(folder), None)


def test_what_is_not_here_is_not_downloaded():
    with pytest.raises(
        ConfigError, match=r"^model: 'tinny' is neither a preset \(tiny, tiny8, small\) nor a folder"
    ):
        find_origin("tinny", None)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=f"^model: {tmp_path} holds no config.json; name a folder that does"
    ):
        find_origin(str(tmp_path), None)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{not json",
        "[1]",
        "{}",
        '{"model_type": "nope"}',
        '{"model_type": "qwen3_moe", "hidden_size": "x"}',
    ],
)
def test_a_malformed_configuration_is_told(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"^model: .*config.json is not a model configuration"):
        find_origin(str(tmp_path), None)


def test_a_dense_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"^model: llama has no expert-parallel plan"):
        find_origin(str(tmp_path), None)


def test_more_experts_a_token_than_there_are_is_refused(folder):
    change(folder, num_experts_per_tok=5)
    with pytest.raises(CheckpointError, match=r"^model: .*num_experts_per_tok=5 of num_experts=4"):
        find_origin(str(folder), None)


@pytest.mark.parametrize("changes", [{"hidden_size": -32}, {"num_attention_heads": 0}])
def test_contradictory_numbers_are_told_before_anything_is_built(folder, changes):
    change(folder, **changes)
    with pytest.raises(AnabranchError, match=r"^model: ") as caught:
        find_origin(str(folder), None).homes(2)
    assert caught.value.setting == "model"


def test_a_window_longer_than_the_model_is_refused(folder):
    assert find_origin(str(folder), 64).sequence_length == 64
    with pytest.raises(
        ConfigError, match=r"^sequence_length: 65 is more than the model's max_position_embeddings=64"
    ):
        find_origin(str(folder), 65)


def test_more_ranks_than_experts_are_refused(folder):
    origin = find_origin(str(folder), None)
    assert origin.homes(4).slots == 1
    with pytest.raises(ConfigError, match=r"^ep_size: 5 ranks would share 4 experts; use at most 4"):
        origin.homes(5)


def test_experts_are_counted_whatever_their_name(tmp_path):
    values = {"model_type": "deepseek_v3", "n_routed_experts": 6, "num_hidden_layers": 4, "hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert find_origin(str(tmp_path), None).experts == 6


def test_the_digest_tells_architectures_apart(folder):
    before = find_origin(str(folder), None).digest()
    assert find_origin(str(folder), 8).digest() == before
    change(folder, hidden_size=64)
    assert find_origin(str(folder), None).digest() != before


def test_initial_weights_depend_on_the_seed_only(folder, tmp_path):
    def weights(name, seed):
        find_origin(str(folder), None).write_initial(tmp_path / name, seed)
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()

    torch.manual_seed(123)
    first, again, other = weights("a", 1), weights("b", 1), weights("c", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(tensor.dtype == torch.float32 for tensor in first.values())
