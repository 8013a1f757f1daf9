"""A model spread over ranks in batch-invariant fp32: what a rollout saw and what the trainer computes are the same
bits, although guests, other ranks' rows and another batch came between."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.integrations.parity import Layout, load
from tests.integrations.toy_models import micro_batch, write_checkpoint
from transformers import AutoModelForCausalLM

from anabranch.errors import ConfigError
from anabranch.integrations.transformers import adaptive_layers
from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import EngineSettings
from anabranch.serving.invariant import BatchInvariant
from anabranch.serving.rollout import RolloutEngine
from anabranch.training.grpo import pad, spread, token_logprobs
from run_distributed import RankPool

SETTINGS = EngineSettings(step="torch", kv_memory_mib=1, limits=Limits(slots=4, chunk=24, tokens=96))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights so large that rounding shows."""
    folder = tmp_path_factory.mktemp("invariant") / "qwen3_moe"
    write_checkpoint("qwen3_moe", 8, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def apart(folder: Path, planner: str, transport: str, invariant: bool) -> tuple[float, int]:
    """The largest difference of a log-probability on this rank, and the guests of its plans."""
    ranks, guests = dist.get_world_size(), list[int]()
    model = load(folder, Layout(ranks, ranks, planner=planner, transport=transport))
    model.set_attn_implementation("sdpa")
    for layer in adaptive_layers(model).values():
        layer.observers.append(lambda seen: guests.append(seen.plan.guests))
    text = micro_batch(dist.get_rank(), 7)[0].tolist()
    asked = [
        Request(tuple(text[:n]), 9 + n // 4, samples=2, sampling=Sampling(temperature=1.0, seed=n))
        for n in (3, 17, 33)
    ]

    def measured() -> float:
        with RolloutEngine(model, SETTINGS) as engine:
            done = engine.generate(asked)
        sequences = pad([r.prompt for r in done], [r.tokens for r in done])
        seen_BT = spread(sequences, [r.logprobs for r in done])
        apart_BT = token_logprobs(model.train(), sequences).detach() - seen_BT
        return apart_BT[sequences.generated_BT].abs().max().item()

    with BatchInvariant() if invariant else nullcontext():
        return measured(), sum(guests)


@pytest.mark.parametrize(
    ("planner", "transport"),
    [("exact", "all_to_all"), ("static", "dedup"), ("static", "all_gather"), ("static", "two_level")],
)
def test_a_sharded_rollout_is_the_trainers_to_the_last_bit(
    planner: str, transport: str, ranks2: RankPool, folder: Path
) -> None:
    for difference, guests in ranks2.run(apart, folder, planner, transport, True):
        assert difference == 0.0
        assert (guests > 0) == (planner == "exact")


def test_without_the_mode_rounding_shows(ranks2: RankPool, folder: Path) -> None:
    assert any(difference > 0.0 for difference, _ in ranks2.run(apart, folder, "exact", "all_to_all", False))


def refused(folder: Path, planner: str, transport: str) -> str:
    try:
        apart(folder, planner, transport, True)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("planner", "transport"), [("exact", "dedup"), ("static", "auto")])
def test_sums_that_follow_the_plan_are_refused(
    planner: str, transport: str, ranks2: RankPool, folder: Path
) -> None:
    for said in ranks2.run(refused, folder, planner, transport):
        assert "batch-invariant experts want all_to_all" in said
