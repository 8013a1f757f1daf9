"""Toy models whose sizes the C++ step takes, the text they read, and what transformers makes of it."""

import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 256  # tokens are bytes
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {**EXPERTS, "norm_topk_prob": True},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 56},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "llama": {"tie_word_embeddings": True},
}


@cache
def toy_decoder(family: str) -> PreTrainedModel:
    """In fp32, every parameter random, so that no two tokens are equally probable."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]}))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn_like(tensor)
            scale = 0.1 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
            tensor.copy_(1 + 0.1 * noise if "norm" in name else noise * scale)
    return model.eval()


@cache
def text() -> bytes:
    """The standard library's own sources."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join((folder / name).read_bytes() for name in ("heapq.py", "textwrap.py", "fractions.py"))


def prompt(length: int, at: int = 0) -> tuple[int, ...]:
    """Bytes of the text."""
    return tuple(text()[at : at + length])


@cache
def greedy(family: str, tokens: tuple[int, ...], new: int) -> list[int]:
    """What transformers' own `generate` continues them with."""
    out = toy_decoder(family).generate(
        torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), max_new_tokens=new, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out[0, len(tokens) :].tolist()
