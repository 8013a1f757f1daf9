"""The torch step on an accelerator: pages there, and the same tokens. Runs where there is one."""

from copy import deepcopy

import pytest
import torch
from tests.serving.test_engine import NEW, PROMPTS, references
from tests.serving.toy_decoders import toy_decoder

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Engine, EngineSettings

ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
LIMITS = Limits(slots=4, chunk=24, tokens=512)
needs_accelerator = pytest.mark.skipif(ACCELERATOR is None, reason="this machine has no accelerator")


def engine_on(device):
    return Engine(deepcopy(toy_decoder("qwen3_moe")).to(device), EngineSettings(limits=LIMITS))


@needs_accelerator
def test_pages_lie_with_the_model_and_tokens_are_those_of_the_cpu() -> None:
    with engine_on(ACCELERATOR) as made:
        assert made.step.name == "torch"
        assert {pool.device.type for pool in made.pools.values()} == {ACCELERATOR.type}
        done = made.generate([Request(p, NEW) for p in PROMPTS])
        assert [c.tokens for c in done] == references("qwen3_moe")


@needs_accelerator
def test_samples_are_those_of_the_cpu() -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=3)
    asked = [Request(p, NEW, samples=2, sampling=sampling) for p in PROMPTS]
    with engine_on(ACCELERATOR) as there, engine_on("cpu") as here:
        ours, theirs = ([c.tokens for c in made.generate(asked)] for made in (there, here))
    assert ours == theirs


def test_the_native_step_refuses_a_model_that_is_elsewhere() -> None:
    with pytest.raises(ConfigError, match="the native step runs on CPU"):
        Engine(deepcopy(toy_decoder("qwen3_moe")).to("meta"), EngineSettings(step="native", limits=LIMITS))
