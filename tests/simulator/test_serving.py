"""Chains on modelled hardware: sizes of known models, and what must hold for any chains."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.costs.decode import decode_bound
from anabranch.errors import ConfigError
from anabranch.hardware.catalog import load_catalog
from anabranch.simulator.serving import Chains, Serving, decode_shape
from anabranch.workload.hf_config import read_shape

CATALOG = load_catalog()
QWEN = read_shape("Qwen3-30B-A3B")
SERVING = Serving(QWEN, CATALOG.cluster("trn2.48xlarge"))
SIZES = {"number": st.integers(1, 4096), "prompt": st.integers(1, 4096), "tokens": st.integers(1, 20_000)}


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "DeepSeek-V3", "gpt-oss-20b", "Llama-3.1-8B"])
def test_a_decode_step_meets_the_models_active_parameters(name: str) -> None:
    shape = read_shape(name)
    looked_up = 0 if shape.tied else shape.vocab * shape.hidden
    # `active_params` counts the embedding, of which a step reads one row a token.
    assert decode_shape(shape).active == shape.active_params - looked_up - shape.params_by_part.positions


def test_parts_of_a_chain_add_up_to_its_steps() -> None:
    chains = Chains(64, 100, 3000)
    shape, roof = decode_shape(QWEN), SERVING.roof
    token_bytes = QWEN.kv_bytes_per_token(2.0)
    batch = SERVING.cost(chains).batch
    steps = [decode_bound(shape, roof, batch, batch * (100 + i), 2.0, token_bytes) for i in range(3000)]
    cost = SERVING.cost(chains)
    assert cost.decode_s == pytest.approx(sum(step.step_ms for step in steps) / 1e3, rel=1e-3)
    assert cost.read_bytes == pytest.approx(8 * sum(step.read_bytes for step in steps), rel=1e-3)


@given(**SIZES)
def test_no_step_beats_memory_and_peak(number: int, prompt: int, tokens: int) -> None:
    chains = Chains(number, prompt, tokens)
    cost = SERVING.cost(chains)
    chip, chips = SERVING.cluster.chip, SERVING.cluster.chips
    assert cost.read_bytes <= cost.decode_s * chip.memory_gb_per_s.mid * 1e9 * chips * (1 + 1e-9)
    flops = 2.0 * decode_shape(QWEN).active * number * tokens
    assert flops <= cost.decode_s * chip.peak_tflops("bf16").mid * 1e12 * chips * (1 + 1e-9)
    assert cost.cache_bytes + SERVING.weights <= SERVING.memory
    assert cost.batch * cost.waves * SERVING.replicas >= number


@given(**SIZES)
def test_more_work_takes_longer_and_a_faster_stack_less(number: int, prompt: int, tokens: int) -> None:
    cost = SERVING.cost(Chains(number, prompt, tokens))
    assert SERVING.cost(Chains(number, prompt, tokens + 64)).seconds > cost.seconds
    assert SERVING.cost(Chains(2 * number, prompt, tokens)).seconds >= cost.seconds
    half = replace(SERVING, reached=0.5).cost(Chains(number, prompt, tokens))
    assert half.seconds == pytest.approx(2 * cost.seconds)


@given(st.integers(1, 64), st.integers(1, 100_000))
def test_a_step_grows_with_its_cache_and_its_batch(chains: int, length: int) -> None:
    step = SERVING.step(chains, length)
    assert SERVING.step(chains, length + 1000).step_ms > step.step_ms
    larger = SERVING.step(chains + 1, length)
    assert larger.step_ms > step.step_ms
    # A larger batch shares the weights: a token of it costs less.
    assert larger.step_ms / (chains + 1) < step.step_ms / chains


def test_a_window_bounds_what_a_long_chain_caches() -> None:
    serving = Serving(read_shape("gpt-oss-20b"), CATALOG.cluster("p5.48xlarge"))
    short, long = (serving.step(8, length).read_bytes for length in (100_000, 200_000))
    assert long - short == pytest.approx(8 * 100_000 * serving.shape.kv_bytes_per_token(2.0) / 2)


def test_what_does_not_fit_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"^chips: "):
        Serving(read_shape("DeepSeek-V3"), CATALOG.cluster("p4d.24xlarge"))
    with pytest.raises(ConfigError, match=r"^tokens: "):
        SERVING.cost(Chains(1, 1000, 10_000_000))
    with pytest.raises(ConfigError, match=r"^reached: "):
        replace(SERVING, reached=1.5)
