"""Samples of a prompt attend to its pages together, and are what each of them is alone."""

import pytest
from tests.serving.toy_decoders import prompt, toy_decoder

from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Completion, Engine, EngineSettings


def samples_of(family: str, dtype: str, slots: int) -> list[Completion]:
    """Of two prompts, eight each: of 6 full pages, of which a whole run is shared, and of 12."""
    asked = [Request(prompt(n, 40), 24, 8, Sampling(temperature=1.0)) for n in (100, 200)]
    settings = EngineSettings(dtype, step="native", threads=1, limits=Limits(slots, chunk=64, tokens=256))
    with Engine(toy_decoder(family), settings) as engine:
        return engine.generate(asked)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_samples_are_the_same_together_and_alone(family: str, dtype: str) -> None:
    together, alone = (samples_of(family, dtype, slots) for slots in (16, 1))
    assert together == alone
    assert len({tuple(completion.tokens) for completion in together}) > 12
