"""A team of threads computes the same whatever its size, also where it has more members than there are cores."""

import os

import pytest
from tests.serving.toy_decoders import prompt, toy_decoder

from anabranch.scheduling.chain import Request
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Completion, Engine, EngineSettings


def completions(threads: int) -> list[Completion]:
    settings = EngineSettings(step="native", threads=threads, limits=Limits(slots=4, chunk=32, tokens=128))
    with Engine(toy_decoder("qwen2_moe"), settings) as engine:
        return engine.generate([Request(prompt(n, 60), 20) for n in (10, 30, 40, 50)])


@pytest.mark.parametrize("threads", [2, 3 * (os.cpu_count() or 1) + 1])
def test_the_size_of_a_team_changes_nothing(threads: int) -> None:
    assert completions(threads) == completions(1)
