"""Experts on several ranks: the same tokens as on one, whoever has work, and no hang when a rank fails."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from tests.integrations.parity import Layout, load
from tests.integrations.toy_models import micro_batch, toy_config, write_checkpoint
from transformers import AutoModelForCausalLM

import anabranch
from anabranch.errors import AnabranchError, ConfigError
from anabranch.integrations.transformers import adaptive_layers
from anabranch.scheduling.chain import Request
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import Engine, EngineSettings
from anabranch.serving.parallel import ParallelEngine
from run_distributed import RankPool

SETTINGS = EngineSettings(
    kv_memory_mib=1, threads=1, limits=Limits(slots=3, chunk=16, tokens=128), speculate=3
)


def requests(count=5):
    text = micro_batch(3, 9)[0].tolist()
    return [Request(tuple(text[i : i + 5 + 9 * i]), 6 + 3 * i) for i in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("toys")
    for family in ("mixtral", "qwen3_moe"):
        write_checkpoint(family, 8, root / family)
    return {family: root / family for family in ("mixtral", "qwen3_moe")}


def alone(folder, wanted):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with Engine(model, EngineSettings(step="torch", kv_memory_mib=1, limits=SETTINGS.limits)) as engine:
        return engine.generate(wanted)


def opened(folder, transport="dedup", planner="exact"):
    ranks = dist.get_world_size()
    model = load(folder, Layout(ranks, ranks, planner=planner, transport=transport)).eval()
    return ParallelEngine(Engine(model, SETTINGS))


def dealt(folder, wanted, transport, planner):
    """Completions of rank 0, and the guests in all plans of this rank."""
    parallel = opened(folder, transport, planner)
    guests = []
    for layer in adaptive_layers(parallel.engine.step.step.model).values():
        layer.observers.append(lambda seen: guests.append(seen.plan.guests))
    done = parallel.deal(wanted if dist.get_rank() == 0 else [])
    parallel.engine.check()
    assert not any(p.grad is not None for p in parallel.engine.step.step.model.parameters())
    return done, sum(guests)


@pytest.mark.parametrize(
    ("family", "transport", "planner"),
    [
        ("mixtral", "dedup", "exact"),
        ("mixtral", "all_gather", "bounded"),
        ("qwen3_moe", "all_gather", "static"),
        ("qwen3_moe", "all_to_all", "exact"),
    ],
)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_several_ranks_generate_what_one_does(ranks, family, transport, planner, folders, request) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{ranks}")
    expected = alone(folders[family], requests())
    done = pool.run(dealt, folders[family], requests(), transport, planner)
    assert [c.tokens for c in done[0][0]] == [c.tokens for c in expected]
    assert [(c.request, c.sample, c.end) for c in done[0][0]] == [(c.request, 0, c.end) for c in expected]
    for ours, theirs in zip(done[0][0], expected, strict=True):
        assert torch.allclose(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-4)
    assert all(others == [] for others, _ in done[1:])
    assert (done[0][1] > 0) == (planner != "static")  # guests work without a backward


def test_fewer_requests_than_ranks(ranks4: RankPool, folders) -> None:
    expected = alone(folders["mixtral"], requests(1))
    done = ranks4.run(dealt, folders["mixtral"], requests(1), "dedup", "exact")
    assert [c.tokens for c in done[0][0]] == [c.tokens for c in expected]


def wired(folder, wanted, wire):
    """Completions of rank 0, and the bytes of rows that this rank sent in the first call of a layer."""
    with patch.object(anabranch, "enable", partial(anabranch.enable, dispatch_wire=wire, combine_wire=wire)):
        parallel = opened(folder, planner="static")
    sent = []
    for layer in adaptive_layers(parallel.engine.step.step.model).values():
        layer.observers.append(lambda seen: sent.append(seen.token_bytes))
    return parallel.deal(wanted if dist.get_rank() == 0 else []), sent[0]


def test_rows_may_travel_as_int8(ranks2: RankPool, folders) -> None:
    exact = ranks2.run(wired, folders["mixtral"], requests(2), "none")
    coarse = ranks2.run(wired, folders["mixtral"], requests(2), "int8")
    assert all(0 < ours[1] < theirs[1] / 2 for ours, theirs in zip(coarse, exact, strict=True))
    for ours, theirs in zip(coarse[0][0], exact[0][0], strict=True):
        # Chains may part once two tokens are nearly as likely; the first new one has the same past.
        assert len(ours.tokens) == len(theirs.tokens)
        assert 0 < abs(ours.logprobs[0] - theirs.logprobs[0]) < 0.05


def own_requests(folder):
    """Rank 1 has one short chain, rank 0 several long ones; twice, with an empty round between."""
    parallel = opened(folder)
    mine = requests() if dist.get_rank() == 0 else requests(1)
    first = parallel.generate(mine)
    assert parallel.generate([]) == []
    return [c.tokens for c in first] == [c.tokens for c in parallel.generate(mine)], len(first)


def test_a_rank_may_end_early(ranks2: RankPool, folders) -> None:
    assert ranks2.run(own_requests, folders["qwen3_moe"]) == [(True, 5), (True, 1)]


def failing(folder, kind):
    """Rank 1 fails; what each rank raises, and whether the engines still work together."""
    parallel = opened(folder)

    def each(completion):
        if kind == "callback" and dist.get_rank() == 1:
            raise KeyError("the caller's own mistake")

    mine = requests()
    if kind == "request" and dist.get_rank() == 1:
        mine = [*mine, Request((999,), 4)]
    try:
        parallel.generate(mine, each)
        said = ""
    except (AnabranchError, KeyError) as error:
        said = str(error)
    again = parallel.generate(requests(2))
    parallel.engine.check()
    return said, len(again)


@pytest.mark.parametrize(
    ("kind", "own"), [("request", "token 999 is not in a"), ("callback", "the caller's own")]
)
def test_when_one_rank_fails_all_raise_and_none_hangs(kind, own, ranks2: RankPool, folders) -> None:
    first, second = ranks2.run(failing, folders["mixtral"], kind)
    assert "another rank failed" in first[0]
    assert own in second[0]
    assert first[1] == second[1] == 2


def test_the_native_step_is_refused() -> None:
    config = toy_config("mixtral", 8)
    config.head_dim = 16
    with Engine(AutoModelForCausalLM.from_config(config), SETTINGS) as engine:
        assert engine.step.name == "native"
        with pytest.raises(ConfigError, match="step='torch'"):
            ParallelEngine(engine)
