"""The recipe's update on two ranks, experts spread over them: how long with experts at home, planned as it goes, and
planned ahead from the routing that the rollouts recorded. `recipes.reasoning_grpo` runs it; by itself:

    torchrun --nproc-per-node 2 -m recipes.two_ranks runs/reasoning/grpo two_ranks.json

Every way runs the same micro-batch with the same recorded routing; ways take turns. It is what a rank learns from in
one step, forward and backward: samples of groups that all succeeded or all failed are left out, as in the recipe.
Solved problems are those of which some sample is right, the same whichever way is taken.
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
from recipes.judging import PRACTISED, requests, settings
from torch.distributed.tensor import DTensor
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
PROMPTS, SAMPLES = 32, 8
WAYS = ("at_home", "as_it_goes", "ahead")


def sharded(folder: str, planner: str) -> PreTrainedModel:
    anabranch.enable(planner=planner, epsilon=0.05, transport="all_to_all")
    config = DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation="anabranch")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()


class Sampled(NamedTuple):
    """This rank's samples that teach something, and their advantages. solved: of its problems, those of which some
    sample is right; of all samples, the part that is right; and how long sampling took."""

    rollouts: list[Rollout]
    advantage_B: torch.Tensor
    solved: int
    right: float
    rollout_ms: float


def rollouts_of(folder: str, rank: int) -> Sampled:
    """By a whole copy of the model."""
    asked = problems(PRACTISED + rank * PROMPTS, PROMPTS)
    with RolloutEngine(AutoModelForCausalLM.from_pretrained(folder), settings("native")) as engine:
        started = time.perf_counter()
        rollouts = engine.generate(requests(asked, SAMPLES, PRACTISED + rank * PROMPTS))
        rollout_ms = 1e3 * (time.perf_counter() - started)
    right_QN = torch.tensor([float(solved(asked[r.request], answer(r.tokens))) for r in rollouts]).view(
        -1, SAMPLES
    )
    advantage_B = advantages(right_QN).flatten()
    # A rank without any would have nothing to compute.
    useful = advantage_B.nonzero().flatten().tolist() or list(range(len(rollouts)))
    return Sampled(
        [rollouts[i] for i in useful],
        advantage_B[useful],
        int(right_QN.any(1).sum()),
        float(right_QN.mean()),
        rollout_ms,
    )


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


class Updated(NamedTuple):
    """Milliseconds of forward and backward, planning included; the loss, and the norm of this rank's gradients."""

    ms: float
    loss: float
    norm: float


def update(model: PreTrainedModel, batch: Batch, ahead: bool) -> Updated:
    """Both ranks at once."""
    dist.barrier()
    started = time.perf_counter()
    if ahead:
        plan_ahead(model, [batch.ids_LTK])
    with replay(model, batch.ids_LTK):
        loss = objective(token_logprobs(model, batch.sequences), *batch.judged).loss
        loss.backward()
    dist.barrier()
    spent_ms = 1e3 * (time.perf_counter() - started)
    local = [
        p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        for p in model.parameters()
        if p.grad is not None
    ]
    norm = float(torch.stack([grad.norm() for grad in local]).norm())
    model.zero_grad()
    return Updated(spent_ms, loss.item(), norm)


def main(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    sampled = rollouts_of(folder, rank)
    batch = batch_of(sampled.rollouts, sampled.advantage_B)
    at_home, planned = sharded(folder, "static"), sharded(folder, "bounded")
    models = dict(zip(WAYS, (at_home, planned, planned), strict=True))
    loads: dict[str, list[float]] = {way: [] for way in WAYS}
    for model, way in ((at_home, "at_home"), (planned, "ahead")):
        for layer in adaptive_layers(model).values():
            layer.observers.append(lambda call, way=way: loads[way].append(max_over_mean(call.plan.rows_R)))
    took: dict[str, list[Updated]] = {way: [] for way in WAYS}
    for turn in range(WARM + TIMED):
        for way in WAYS:
            updated = update(models[way], batch, way == "ahead")
            took[way] += [updated] if turn >= WARM else []
    require_same([updated for each in took.values() for updated in each])
    both: list[Any] = [None, None]
    dist.all_gather_object(both, (sampled.solved, sampled.right, sampled.rollout_ms))
    if rank == 0:
        solved_, right, rollout_ms = zip(*both, strict=True)
        update_ms = {way: median(u.ms for u in each) for way, each in took.items()}
        report = {
            "tokens_of_rank": int(batch.sequences.mask_BT.sum()),
            "solve_rate": fmean(right),
            "solved_problems": sum(solved_),
            "rollout_ms": max(rollout_ms),
            "update_ms": update_ms,
            "update_ms_least": {way: min(u.ms for u in each) for way, each in took.items()},
            "ms_per_solved": {
                way: (max(rollout_ms) + ms) / max(1, sum(solved_)) for way, ms in update_ms.items()
            },
            "load_max_over_mean": {way: fmean(loads[way]) for way in ("at_home", "ahead")},
        }
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


def require_same(updates: list[Updated]) -> None:
    """No way changes what is computed."""
    for name in ("loss", "norm"):
        values = [getattr(updated, name) for updated in updates]
        assert max(values) - min(values) <= 1e-5 * max(map(abs, values)) + 1e-7, f"{name} differs: {values}"


if __name__ == "__main__":
    main(*sys.argv[1:])
