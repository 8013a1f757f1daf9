"""What `anabranch bench generate` measures: cases, and the model that it writes."""

import argparse
import ast
import inspect
import typing
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from anabranch.costs.decode import DecodeShape
from anabranch.serving.pools import KvShape, kv_shape_of

CHUNK = 512
# At least so many seconds are timed of each case, and of one of the quick benchmark.
TIMED_S, QUICK_S = 3.0, 1.5
RANDOM, TRAINED = "random", "small"
OURS, TRANSFORMERS, BATCHED = "anabranch", "transformers", "transformers_batch"
VLLM, LLAMA = "vllm", "llama_cpp"


@dataclass(frozen=True)
class GenerateCase:
    """`batch` chains are decoded at once: `batch / samples` prompts, each with `samples` samples.

    dtype: of weights. kv_dtype: of keys and values.
    """

    engine: str
    dtype: str = "bfloat16"
    batch: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 64
    samples: int = 1
    kv_dtype: str = "bfloat16"


def quick_cases() -> list[GenerateCase]:
    """The main sizes of the engines that Python can import here."""
    ours = [
        *(GenerateCase(OURS, batch=b) for b in (1, 8, 32, 128)),
        GenerateCase(OURS, batch=32, samples=8),
        GenerateCase(OURS, batch=32, kv_dtype="int8"),
        *(GenerateCase(OURS, "float32", b, kv_dtype="float32") for b in (1, 32)),
        *(GenerateCase(OURS, "int8", b) for b in (1, 32)),
    ]
    theirs = [
        *(GenerateCase(TRANSFORMERS, batch=b, new_tokens=n) for b, n in ((1, 32), (32, 12))),
        *(GenerateCase(TRANSFORMERS, "float32", b, new_tokens=n, kv_dtype="float32") for b, n in ((1, 24), (32, 8))),
    ]  # fmt: skip
    return ours + theirs


def full_cases() -> list[GenerateCase]:
    """Every batch, prompt and precision; long chains; samples that share prompts; every engine."""
    sizes = list(product((1, 8, 32, 128), (128, 1024)))
    dtypes = (("bfloat16", "bfloat16"), ("float32", "float32"), ("int8", "bfloat16"), ("bfloat16", "int8"))
    ours = [GenerateCase(OURS, d, b, p, 128, 1, kv) for d, kv in dtypes for b, p in sizes]
    ours += [
        GenerateCase(OURS, batch=b, prompt_tokens=p, new_tokens=128, samples=8) for b, p in sizes if b > 1
    ]
    ours += [GenerateCase(OURS, batch=b, new_tokens=4096) for b in (1, 8, 32)]
    theirs = [
        replace(case, engine=TRANSFORMERS, new_tokens=24 if case.new_tokens == 128 else case.new_tokens)
        for case in ours
        if case.dtype != "int8"
        and case.kv_dtype == case.dtype
        and (case.new_tokens == 128 or case.batch == 1)
    ]
    batched = [GenerateCase(BATCHED, batch=b, new_tokens=16) for b in (1, 8, 32)]
    return ours + theirs + batched


def vllm_cases(cases: list[GenerateCase]) -> list[GenerateCase]:
    """Of our cases those that vLLM on CPU can run too."""
    return [
        replace(case, engine=VLLM)
        for case in cases
        if case.engine == OURS and case.dtype != "int8" and case.kv_dtype == case.dtype
    ]


def llama_cases(cases: list[GenerateCase]) -> list[GenerateCase]:
    """Of our cases those that llama.cpp can run too, but the largest in other precisions than bf16: its prompts take
    minutes to enter. Its keys and values are fp16, unless in fp32."""
    return [
        replace(case, engine=LLAMA, kv_dtype=case.kv_dtype.replace("bfloat16", "float16"))
        for case in cases
        if case.engine == OURS and case.samples == 1 and case.kv_dtype != "int8"
        if case.dtype == "bfloat16" or case.batch * case.prompt_tokens < 1 << 17
    ]


def wanted(model: str, case: GenerateCase) -> bool:
    """Of the trained model other engines are measured with short chains in bf16: what more there is to tell of them the
    other model tells, and all of it twice would take more than two hours."""
    short = case.prompt_tokens == 128 and case.new_tokens <= 128 and case.samples == 1
    return model != TRAINED or case.engine == OURS or (case.dtype == "bfloat16" and short)


def entering_tokens(case: GenerateCase) -> int:
    """What the first chains may decode while the prompts of others enter, CHUNK tokens a step, and some more."""
    return case.batch * case.prompt_tokens // CHUNK + 16


def fit(case: GenerateCase, positions: int) -> GenerateCase:
    """The case with as many new tokens as a model of so many positions has room for."""
    room = positions - case.prompt_tokens - entering_tokens(case)
    return replace(case, new_tokens=min(case.new_tokens, room))


def write_model(folder: Path) -> None:
    """A Qwen3-MoE of 140 M parameters with random weights: speed and memory do not depend on what they say."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=2048, moe_intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, num_experts=16, num_experts_per_tok=4,
        head_dim=64,  # pyright: ignore[reportCallIssue] - a dataclass by decorator
        norm_topk_prob=True, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def prompts_of(folder: Path, count: int, tokens: int) -> list[list[int]]:
    """Distinct prompts: real text where the folder has a tokenizer, else numbers (the weights are random too)."""
    if not (folder / "tokenizer.json").exists():
        vocab = AutoConfig.from_pretrained(folder).vocab_size
        return torch.randint(vocab, (count, tokens), generator=torch.Generator().manual_seed(1)).tolist()
    ids = _real_text(folder, count + tokens)
    step = max(1, (len(ids) - tokens) // count)
    return [ids[i * step : i * step + tokens] for i in range(count)]


def _real_text(folder: Path, tokens: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    for module in (ast, inspect, argparse, typing):
        ids += tokenizer(inspect.getsource(module))["input_ids"]
    assert len(ids) >= tokens, f"{tokens} tokens of prompts are wanted and these sources have {len(ids)}"
    return ids


class Sizes(NamedTuple):
    """decode: what one step reads and multiplies with. kv: of cached keys and values."""

    decode: DecodeShape
    kv: KvShape


def sizes_of(folder: Path) -> Sizes:
    """Counted on the instantiated model."""
    config: Any = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    of_experts = sum(n for name, n in numbers.items() if ".experts." in name)
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    kv, layers = kv_shape_of(model), config.num_hidden_layers
    decode = DecodeShape(
        dense=sum(numbers.values()) - of_experts - embedding,
        expert=of_experts // (layers * config.num_experts),
        expert_layers=layers,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        kv_numbers=2 * kv.layers * kv.heads * kv.dim,
        attention=layers * config.num_attention_heads * kv.dim,
    )
    return Sizes(decode, kv)
