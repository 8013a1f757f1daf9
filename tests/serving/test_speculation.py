"""Speculation is lossless: tokens and log-probabilities are, bit for bit, those without it."""

import pytest
import torch
from tests.integrations.toy_models import micro_batch, toy_config
from transformers import AutoModelForCausalLM

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.scheduling.speculation import StepTimes
from anabranch.scheduling.thinking import Thinking
from anabranch.serving.engine import Engine, EngineSettings


def toy(family="qwen3_moe"):
    torch.manual_seed(0)
    config = toy_config(family, 8)
    config.head_dim, config.num_hidden_layers = 64, 4  # 16 pages a MiB
    return AutoModelForCausalLM.from_config(config).eval()


def requests(sampling):
    """Text, one with a budget of thought and one that stops early, on greedy chains that soon repeat themselves."""
    text = micro_batch(3, 9)[0].tolist()
    kinds = ({}, {"thinking": Thinking(30, (7, 8), (9,))}, {"stop_tokens": frozenset(range(0, 256, 9))})
    return [
        Request(tuple(text[:n]), 70, samples=2, sampling=Sampling(**sampling, seed=n), **kind)
        for n, kind in zip((6, 37, 48), kinds, strict=True)
    ]


def completions(model, wanted, speculate, **kind):
    # Few slots and pages: chains wait, and in fp32 are preempted and come again.
    limits = Limits(slots=4, chunk=16, tokens=128)
    settings = EngineSettings(threads=1, kv_memory_mib=1, limits=limits, speculate=speculate, **kind)
    with Engine(model, settings) as engine:
        done = engine.generate(wanted)
        tally = engine.scheduler.tally
    return done, tally


@pytest.fixture(autouse=True)
def rows_cost_nothing(monkeypatch):
    """Drafts as long as acceptance alone allows, whatever this machine is doing."""
    tell = StepTimes.tell
    monkeypatch.setattr(StepTimes, "tell", lambda self, rows, ms: tell(self, rows, 1.0))


@pytest.mark.parametrize(
    "sampling",
    [{}, {"repetition_penalty": 1.2}, {"temperature": 0.02}, {"temperature": 0.05, "top_k": 9, "top_p": 0.9}],
    ids=str,
)
@pytest.mark.parametrize(
    "kind", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "float32", "kv_dtype": "int8"}], ids=str
)
def test_the_output_is_the_same_bit_for_bit(kind, sampling) -> None:
    model, wanted = toy(), requests(sampling)
    plain, without = completions(model, wanted, 0, step="native", **kind)
    drafted, tally = completions(model, wanted, 6, step="native", **kind)
    assert drafted == plain
    assert tally.accepted > 0
    assert tally.preempted > 0 or kind != {"dtype": "float32"}
    assert sampling or tally.steps < without.steps


def test_the_torch_step_takes_drafts_too() -> None:
    model, wanted = toy("mixtral"), requests({})
    plain, _ = completions(model, wanted, 0, step="torch")
    drafted, tally = completions(model, wanted, 6, step="torch")
    assert [c.tokens for c in drafted] == [c.tokens for c in plain]
    assert tally.accepted > 0


def test_a_draft_longer_than_a_page_is_refused() -> None:
    with pytest.raises(ConfigError, match="speculate"):
        EngineSettings(speculate=16)
