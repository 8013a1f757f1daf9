"""Fixtures every room's tests may use."""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from run_distributed import RankPool

# No test asserts times, so no example has a deadline. `make test` tries the same examples every time, so a
# change is judged by itself; `make test-full` explores new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=500, print_blob=True)
settings.load_profile("repeatable")

TOY_TEXT = ("heapq.py", "textwrap.py", "fractions.py")
TOY_MODEL = {
    "model_type": "qwen3_moe",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two live ranks: `ranks2.run(fn, *args)`."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    """Four live ranks: `ranks4.run(fn, *args)`."""
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some 70 kB: sources of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join((library / name).read_text() for name in TOY_TEXT), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of a Mixture-of-Experts model that trains in milliseconds a step."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TOY_MODEL))
    return folder


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, toy_text: Path) -> dict[str, Any]:
    """Settings of a short run of `toy_model` on `toy_text`, as arguments of RunConfig; `out` is missing."""
    return {
        "model": str(toy_model),
        "data": (str(toy_text),),
        "cache": str(tmp_path_factory.mktemp("cache")),
        "steps": 30,
        "batch_size": 4,
        "sequence_length": 32,
        "learning_rate": 1e-2,
        "save_every": 10,
        "eval_every": 20,
        "timeout_s": 300,
    }


@pytest.fixture(scope="session")
def toy_options(toy_run: dict[str, Any]) -> list[str]:
    """The same as options of `anabranch train`."""
    return [
        part
        for name, value in toy_run.items()
        for one in (value if isinstance(value, tuple) else [value])
        for part in (f"--{name.replace('_', '-')}", str(one))
    ]
