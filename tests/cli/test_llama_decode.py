"""The model that llama.cpp is given is ours: it decodes the tokens of transformers."""

from contextlib import closing
from pathlib import Path

import pytest
from tests.serving.toy_decoders import greedy, prompt, toy_decoder

from anabranch.cli.generate_cases import GenerateCase
from anabranch.cli.llama_decode import LlamaModel, have_llama, write_gguf
from anabranch.errors import ConfigError

pytestmark = pytest.mark.skipif(not have_llama(), reason="llama_cpp and gguf are not installed")
NEW, LENGTH = 8, 24


def test_chains_together_are_those_of_transformers(tmp_path: Path) -> None:
    """Inside it rounds to a thousandth (whence a router's near tie may fall the other way)."""
    toy_decoder("qwen3_moe").save_pretrained(tmp_path / "toy")
    write_gguf(tmp_path / "toy", tmp_path / "toy.gguf", "float32")
    prompts = [prompt(LENGTH, 50 * i) for i in range(6)]
    case = GenerateCase("llama_cpp", "float32", len(prompts), LENGTH, NEW, kv_dtype="float32")
    with closing(LlamaModel(tmp_path / "toy.gguf", 256, 1)) as model:
        steps = model.decode(case, [list(p) for p in prompts])
        decoded = [next(steps) for _ in range(NEW)]
        steps.close()
    chains = [list(chain) for chain in zip(*decoded, strict=True)]
    same = [chain == greedy("qwen3_moe", p, NEW) for chain, p in zip(chains, prompts, strict=True)]
    assert sum(same) >= 4, same


def test_another_family_is_refused(tmp_path: Path) -> None:
    toy_decoder("llama").save_pretrained(tmp_path / "toy")
    with pytest.raises(ConfigError, match="no Qwen3-MoE"):
        write_gguf(tmp_path / "toy", tmp_path / "toy.gguf", "float32")
