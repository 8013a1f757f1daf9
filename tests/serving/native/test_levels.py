"""Each level of instructions computes what transformers' own modules do."""

from pathlib import Path

import pytest
import torch
from tests.serving.toy_decoders import prompt, toy_decoder

from anabranch.errors import BuildError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Engine, EngineSettings
from anabranch.serving.native import build, library

BEST = build.processor_level()
LEVELS = list(build.LEVELS)[list(build.LEVELS).index(BEST) :]
# What differs from fp32 by rounding alone, and with weights and activations of bf16.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.15}


def logits_of(family: str, step: str, dtype: str) -> torch.Tensor:
    """Of every step of a chain that chooses the same tokens in all: (steps, vocabulary)."""
    limits, rows = Limits(slots=2, chunk=16, tokens=128), []
    settings = EngineSettings(dtype, step=step, threads=1, kv_memory_mib=1, limits=limits)
    with Engine(toy_decoder(family), settings) as engine:
        engine.watchers.append(lambda _, outputs: rows.append(outputs.logits_WV.clone()))
        for n in (1, 15, 16, 17, 50, 100):
            engine.generate([Request(prompt(n, 30), 1)])
    return torch.cat(rows)


@pytest.mark.parametrize(
    "level", [level if level == BEST else pytest.param(level, marks=pytest.mark.full) for level in LEVELS]
)
def test_a_level_equals_the_torch_step(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "processor_level", lambda: level)
    library.library.cache_clear()
    try:
        for family in ("qwen3", "qwen2_moe", "olmoe"):
            expected = logits_of(family, "torch", "float32")
            for dtype, bound in BOUNDS.items():
                error = (logits_of(family, "native", dtype) - expected).abs().max() / expected.std()
                assert error < bound, (family, dtype, float(error))
    finally:
        library.library.cache_clear()


def test_a_processor_gets_the_best_level_it_has(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    for level, (needed, _) in build.LEVELS.items():
        cpuinfo.write_text(f"model name\t: any\nflags\t\t: fpu {' '.join(needed)} sse\n")
        assert build.processor_level(cpuinfo) == level
    assert build.processor_level(tmp_path / "none") == "plain"


def test_a_library_is_built_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails leaves nothing behind; one that is missing is named."""
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match="ended with 1"):
        build.build("plain", tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(BuildError, match="no C\\+\\+ compiler: install"):
        build.build("plain", tmp_path)
