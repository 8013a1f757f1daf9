"""Shapes against published figures, and the arithmetic of attention against counting one by one."""

import dataclasses

import pytest

from anabranch.workload.blocks import Attention, DenseFeedForward, Experts, Kernels
from anabranch.workload.hf_config import read_shape, shipped_shapes
from anabranch.workload.shape import ModelShape, Norms

# Numbers in the checkpoint's safetensors, as the hub tells them, and those among them that are no parameters: router
# corrections (all of it for GLM: 46 routers of 128), scales of fp8 blocks for DeepSeek-V3, and 1,728 and 3,416 numbers
# of Moonlight and Kimi-K2 that are not identified.
CHECKPOINTS = {
    "meta-llama/Llama-3.1-8B": (8_030_261_248, 0),
    "meta-llama/Llama-3.1-70B": (70_553_706_496, 0),
    "meta-llama/Llama-3.1-405B": (405_853_388_800, 0),
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, 0),
    "Qwen/Qwen3-235B-A22B": (235_093_634_560, 0),
    "Qwen/Qwen2-57B-A14B": (57_408_658_944, 0),
    "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, 0),
    "mistralai/Mixtral-8x22B-v0.1": (140_620_634_112, 0),
    "openai/gpt-oss-20b": (20_914_757_184, 0),
    "openai/gpt-oss-120b": (116_829_156_672, 0),
    "allenai/OLMoE-1B-7B-0924": (6_919_161_856, 0),
    "zai-org/GLM-4.5-Air": (110_468_824_832, 5_888),
    "deepseek-ai/DeepSeek-V3": (684_531_386_000, 41_555_600),
    "moonshotai/Moonlight-16B-A3B": (15_960_111_936, 3_392),
    "moonshotai/Kimi-K2-Instruct": (1_026_408_235_864, 26_456),
}
# Billions, as the models are named or their cards say. Ours count the embedding, gpt-oss's cards do not.
ACTIVE = {
    "Qwen/Qwen3-30B-A3B": 3.3,
    "Qwen/Qwen3-235B-A22B": 22,
    "Qwen/Qwen2-57B-A14B": 14.2,
    "mistralai/Mixtral-8x7B-v0.1": 12.9,
    "mistralai/Mixtral-8x22B-v0.1": 39.1,
    "deepseek-ai/DeepSeek-V3": 37,
    "allenai/OLMoE-1B-7B-0924": 1.3,
    "openai/gpt-oss-20b": 3.6 + 0.58,
    "openai/gpt-oss-120b": 5.1 + 0.58,
}
GPT = ModelShape(
    "gpt", 51200, 512, 4, Attention(8, 8, 64, qkv_bias=True, out_bias=True),
    DenseFeedForward(2048, gated=False, bias=True), norms=Norms(bias=True), dropout=True,
)  # fmt: skip


@pytest.mark.parametrize("name", shipped_shapes())
def test_shipped_shapes_have_the_numbers_of_their_checkpoints(name):
    shape, (published, buffers) = read_shape(name), CHECKPOINTS[name]
    # A prediction module's checkpoint holds a copy of the embedding and of the head.
    copies = shape.mtp * 2 * shape.vocab * shape.hidden
    assert shape.params_by_part.total + copies + buffers == published


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name):
    assert read_shape(name).active_params / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)


def test_a_prediction_module_is_the_11_5_billion_of_its_card():
    shape = read_shape("DeepSeek-V3")
    assert shape.mtp_params / 1e9 == pytest.approx(11.5, rel=0.01)
    without = dataclasses.replace(shape, mtp=0)
    assert shape.params == without.params
    # Half a main layer's worth more than one: a joining matrix, and the head once again.
    extra = shape.forward_flops(4096).total - without.forward_flops(4096).total
    assert extra == shape.forward_flops(4096).mtp > without.forward_flops(4096).head


@pytest.mark.parametrize(("name", "gflops"), [("DeepSeek-V3", 250), ("Llama-3.1-405B", 2448)])
def test_training_flops_of_a_token(name, gflops):
    """arXiv:2505.09343, table 2, at 4,096 tokens; three forwards' worth, prediction modules apart."""
    flops = dataclasses.replace(read_shape(name), mtp=0).forward_flops(4096)
    assert 3 * flops.total / 1e9 == pytest.approx(gflops, rel=0.015)


@pytest.mark.parametrize(("name", "kilobytes"), [("DeepSeek-V3", 70.272), ("Llama-3.1-405B", 516.096)])
def test_cached_bytes_of_a_token(name, kilobytes):
    """arXiv:2505.09343, table 1, in bf16."""
    assert read_shape(name).kv_bytes_per_token(2) == pytest.approx(1000 * kilobytes)


def test_a_window_bounds_what_is_cached():
    shape = read_shape("gpt-oss-20b")
    assert shape.kv_tokens(100) == 100
    assert shape.kv_tokens(1128) == (1128 + 128) / 2


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("seq", [1, 5, 6, 7, 12, 40])
def test_context_is_the_mean_of_what_each_token_sees(seq, chunked):
    attention = Attention(4, 4, 16, windowed=(0,), window=6, chunked=chunked)
    seen = [i % 6 + 1 if chunked else min(i + 1, 6) for i in range(seq)]
    assert attention.context(seq, windowed=True) == pytest.approx(sum(seen) / seq)
    assert attention.context(seq, windowed=False) == (seq + 1) / 2


def test_a_gpt_layer_keeps_34_bytes_a_number_of_its_width():
    """Korthikanti et al. 2022, equation 2 without the scores: 34 s b h bytes; a flash kernel adds a log-sum a head."""
    kept = GPT.kept_numbers("none")
    assert 2 * (kept.attention.total + kept.dense.total) == 34 * GPT.hidden + 4 * GPT.attention.heads
    # Section 4.2.1: without sequence parallelism 10 s b h stay whole on every rank.
    assert 2 * (kept.attention.wide + kept.dense.wide) == 10 * GPT.hidden
    # Section 4.3: the final norm and the head's input, and fp32 logits.
    assert (2 * kept.head.wide, 2 * kept.head.split) == (4 * GPT.hidden, 4 * GPT.vocab)


def test_what_recomputing_saves():
    shape = read_shape("Qwen3-30B-A3B")
    none, full = shape.kept_numbers("none"), shape.kept_numbers("full")
    assert shape.kept_numbers("selective") == none
    assert full.attention.total == shape.hidden
    assert (full.moe.total, full.row.total, full.head) == (0, 0, none.head)


def test_rows_of_an_expert_are_kept_apart_from_tokens():
    one = Experts(8, 1, 96, (0,), shared_width=32)
    shape = ModelShape("moe", 512, 64, 1, Attention(4, 4, 16), experts=one)
    kept = shape.kept_numbers("none")
    assert kept.row == (64, 3 * 96)
    assert kept.moe.split == 3 * 32
    more = dataclasses.replace(shape, experts=dataclasses.replace(one, top_k=2)).kept_numbers("none")
    assert more.row == kept.row
    assert more.moe.wide - kept.moe.wide == 2  # one fp32 routing weight


def test_fp32_numbers_weigh_by_the_activations_precision():
    narrow, wide = (GPT.kept_numbers("none", Kernels(number_bytes=size)) for size in (2.0, 4.0))
    assert narrow.head.split == 2 * wide.head.split
    assert narrow.attention.wide == wide.attention.wide
