import heapq
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from anabranch.scheduling.chain import Request
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.kv_figures import GIB, kv_figures, solve_rate
from anabranch.serving.pools import KvShape
from anabranch.serving.settings import EngineSettings

SHAPE = KvShape(layers=8, heads=4, dim=64)


def figures(**settings):
    return kv_figures(SHAPE, "bfloat16", EngineSettings(**settings), 4096, 2 * GIB)


def test_chains_are_counted_with_their_scales_and_open_pages_beside():
    # 8 layers x 4 heads x 2 x 64 numbers of 2 bytes, and 256 pages a chain.
    assert figures() == ("bfloat16", None, 8192.0, 64, 0.0, 64)
    coded = figures(kv_dtype="int8")
    assert coded.bytes_per_token == 4096
    assert (coded.chains, coded.open_mib) == (128, 128 * 2 * 16 * 8192 / (1 << 20))
    # A chain's 256 pages of int8, and two of bf16, each as large as two of them.
    assert coded.chains_with_open == 128 * 256 // 260
    assert figures(kv_dtype="int4").bytes_per_token == 2048 + 8 * 4 * (64 + 16) * 4 / 16


def test_evicted_chains_take_their_budget():
    assert figures(evict_above=1024).chains == 4 * figures().chains
    assert figures(evict_above=8192).chains == figures().chains


@pytest.mark.parametrize("kv", [{}, {"kv_dtype": "int8", "evict_above": 160}], ids=str)
def test_the_rate_is_of_samples_that_pass_their_check(kv):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    text = inspect.getsource(heapq).encode()
    settings = EngineSettings(step="native", threads=1, kv_memory_mib=1, limits=Limits(4, 64, 256), **kv)
    # The first passes in both samples, the second in none, the third by its length.
    checks = (lambda tokens: True, lambda tokens: False, lambda tokens: len(tokens) == 100)
    problems = [
        (Request(tuple(text[i * 50 : i * 50 + 80]), 100, samples), check)
        for i, (samples, check) in enumerate(zip((2, 1, 1), checks, strict=True))
    ]
    solved = solve_rate(model, settings, problems)
    assert (solved.samples, solved.rate, solved.new_tokens) == (4, 0.75, 400)
    assert solved.right == (True, True, False, True)
    assert (solved.evicted > 0) == bool(kv)
    assert solved.kv.kv_dtype == kv.get("kv_dtype", "float32")
