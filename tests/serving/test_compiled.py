"""Decoding at fixed shapes: the tokens of transformers, by a graph a pair of sizes and no more."""

from typing import Any

import pytest
import torch
from tests.serving.toy_decoders import FAMILIES, greedy, prompt, toy_decoder
from torch._dynamo.testing import CompileCounterWithBackend

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Engine
from anabranch.serving.settings import EngineSettings
from anabranch.serving.step import compiled
from anabranch.serving.step.compiled import sizes

NEW = 40
PROMPTS = [prompt(n, 50 * n) for n in (5, 17, 33, 64, 100)]


@pytest.fixture
def counter(monkeypatch):
    """Counts graphs, and runs them by torch's own operators."""
    torch.compiler.reset()
    made = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled, "BACKEND", made)
    yield made
    torch.compiler.reset()


def engine(family: str, **settings: Any) -> Engine:
    limits = Limits(slots=4, chunk=24, tokens=256)
    return Engine(toy_decoder(family), EngineSettings(step="compiled", threads=1, limits=limits, **settings))


def test_sizes_are_few_and_end_with_the_limit():
    assert sizes(1, 64) == [1, 4, 16, 64]
    assert sizes(4, 130) == [4, 16, 64, 130]
    assert sizes(4, 2) == [2]
    assert sizes(1, 1) == [1]


@pytest.mark.parametrize(
    "family",
    [f if f in ("qwen3_moe", "llama") else pytest.param(f, marks=pytest.mark.full) for f in FAMILIES],
)
def test_greedy_output_is_that_of_transformers_by_few_graphs(family, counter):
    with engine(family) as made:
        first = made.generate([Request(p, NEW) for p in PROMPTS])
        # One row or up to four, of up to 4 or up to 16 pages.
        assert 1 <= counter.frame_count <= 4
        graphs = counter.frame_count
        again = made.generate([Request(p, NEW, samples=2) for p in PROMPTS])
        assert counter.frame_count <= max(graphs, 4)
        steps = made.scheduler.tally.steps
        made.check()
    assert [c.tokens for c in first] == [greedy(family, p, NEW) for p in PROMPTS]
    assert [c.tokens for c in again] == [greedy(family, p, NEW) for p in PROMPTS for _ in range(2)]
    assert steps > 60


def test_the_model_is_as_it_was(counter):
    model = toy_decoder("qwen3_moe")
    before = model.config._attn_implementation, model.config._experts_implementation
    with engine("qwen3_moe") as made:
        made.generate([Request(PROMPTS[0], 4)])
    assert (model.config._attn_implementation, model.config._experts_implementation) == before


def test_only_pages_as_computed(counter):
    with pytest.raises(ConfigError, match="precision that it computes in"):
        engine("llama", kv_dtype="int8")
    with pytest.raises(ConfigError, match="holds the whole model"):
        EngineSettings(step="compiled", memory_limit_mib=10)


@pytest.mark.full  # the compiler of C++ takes its time
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # inductor's own
def test_by_inductor(monkeypatch):
    torch.compiler.reset()
    with engine("qwen3_moe") as made:
        done = made.generate([Request(p, 20) for p in PROMPTS[:3]])
    assert [c.tokens for c in done] == [greedy("qwen3_moe", p, 20) for p in PROMPTS[:3]]
