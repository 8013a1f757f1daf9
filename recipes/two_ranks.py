"""The recipe's update on two ranks, experts spread over them: how long with experts at home, planned as it goes, and
planned ahead from the routing that the rollouts recorded. `recipes.reasoning_grpo` runs it; by itself:

    torchrun --nproc-per-node 2 -m recipes.two_ranks runs/reasoning/grpo two_ranks.json

Every way runs the same micro-batch with the same recorded routing; ways take turns.
"""

import json
import sys
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from recipes.arithmetic import MAX_NEW_TOKENS, answer, model_config, problems, solved
from recipes.reasoning_grpo import PRACTISED, requests, settings
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import anabranch
from anabranch.integrations.ahead import batch_routing, plan_ahead
from anabranch.integrations.routers import replay
from anabranch.integrations.transformers import adaptive_layers
from anabranch.placement.base import max_over_mean
from anabranch.serving.rollout import Rollout, RolloutEngine
from anabranch.training.grpo import Sequences, advantages, objective, pad, spread, token_logprobs

WARM, TIMED = 3, 12
WAYS = ("at_home", "as_it_goes", "ahead")


def sharded(folder: str, planner: str) -> PreTrainedModel:
    anabranch.enable(planner=planner, epsilon=0.05, transport="all_to_all")
    config = DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation="anabranch")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()


def rollouts_of(folder: str, rank: int) -> tuple[list[Rollout], torch.Tensor]:
    """This rank's samples, and their advantages, by a whole copy of the model."""
    prompts, samples = 16, 8
    asked = problems(PRACTISED + rank * prompts, prompts)
    with RolloutEngine(AutoModelForCausalLM.from_pretrained(folder), settings("native")) as engine:
        rollouts = engine.generate(requests(asked, samples, PRACTISED + rank * prompts))
    right = [float(solved(asked[r.request], answer(r.tokens))) for r in rollouts]
    return rollouts, advantages(torch.tensor(right).view(-1, samples)).flatten()


class Batch(NamedTuple):
    """One micro-batch, the other arguments of its objective, and its recorded routing."""

    sequences: Sequences
    judged: tuple[Any, ...]
    ids_LTK: torch.Tensor


def batch_of(rollouts: list[Rollout], advantage_B: torch.Tensor) -> Batch:
    sequences = pad([r.prompt for r in rollouts], [r.tokens for r in rollouts])
    routings = [torch.from_numpy(r.routing_LTK) for r in rollouts]
    ids_LTK = batch_routing(routings, sequences.token_BT.shape[1], model_config().num_experts)
    sampled_BT = spread(sequences, [r.logprobs for r in rollouts])
    judged = (sampled_BT, advantage_B, sequences.generated_BT, 0.2, len(rollouts) * MAX_NEW_TOKENS)
    return Batch(sequences, judged, ids_LTK)


def update_ms(model: PreTrainedModel, batch: Batch, ahead: bool) -> tuple[float, float]:
    """Milliseconds of forward and backward, planning included, and the loss."""
    dist.barrier()
    started = time.perf_counter()
    if ahead:
        plan_ahead(model, [batch.ids_LTK])
    with replay(model, batch.ids_LTK):
        loss = objective(token_logprobs(model, batch.sequences), *batch.judged).loss
        loss.backward()
    dist.barrier()
    spent_ms = 1e3 * (time.perf_counter() - started)
    model.zero_grad()
    return spent_ms, loss.item()


def main(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    batch = batch_of(*rollouts_of(folder, rank))
    at_home, planned = sharded(folder, "static"), sharded(folder, "bounded")
    models = dict(zip(WAYS, (at_home, planned, planned), strict=True))
    loads: dict[str, list[float]] = {way: [] for way in WAYS}
    for model, way in ((at_home, "at_home"), (planned, "ahead")):
        for layer in adaptive_layers(model).values():
            layer.observers.append(lambda call, way=way: loads[way].append(max_over_mean(call.plan.rows_R)))
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    losses = set()
    for turn in range(WARM + TIMED):
        for way in WAYS:
            ms, loss = update_ms(models[way], batch, way == "ahead")
            losses.add(round(loss, 5))
            if turn >= WARM:
                spent[way].append(ms)
    assert len(losses) == 1, f"the ways computed different losses: {losses}"
    if rank == 0:
        report = {
            "tokens_of_rank": int(batch.sequences.mask_BT.sum()),
            "update_ms": {way: median(times) for way, times in spent.items()},
            "update_ms_least": {way: min(times) for way, times in spent.items()},
            "load_max_over_mean": {way: fmean(loads[way]) for way in ("at_home", "ahead")},
        }
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
