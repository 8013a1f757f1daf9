"""An update whose routing a rollout recorded: planned before it runs, and nothing of the plan was a guess."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.integrations.parity import Judge, Layout, load
from tests.integrations.toy_models import micro_batch

from anabranch.errors import ConfigError, PlanError
from anabranch.integrations.ahead import batch_routing, plan_ahead
from anabranch.integrations.routers import replay
from anabranch.integrations.transformers import adaptive_layers
from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import EngineSettings
from anabranch.serving.rollout import RolloutEngine
from run_distributed import RankPool

MICRO = 2


def rolled_out(model):
    """Two micro-batches of two samples: token ids (B, T) and their routing (L, B * T, K)."""
    text = micro_batch(dist.get_rank(), 5)[0].tolist()
    requests = [
        Request(tuple(text[: 9 + i]), 6 + i, samples=2, sampling=Sampling(temperature=1.0, seed=i))
        for i in range(MICRO)
    ]
    settings = EngineSettings(kv_memory_mib=1, limits=Limits(slots=4, chunk=32, tokens=64))
    with RolloutEngine(model, settings) as engine:
        rollouts = engine.generate(requests)
    batches = []
    for i in range(MICRO):
        group = [r for r in rollouts if r.request == i]
        ids_BT = torch.tensor([[*r.prompt, *r.tokens] for r in group])
        routings = [torch.from_numpy(r.routing_LTK) for r in group]
        batches.append((ids_BT, batch_routing(routings, ids_BT.shape[1], 8)))
    return batches


def updated(model, batches):
    """Losses and the counts that the layers saw, by layer and micro-batch."""
    seen = []
    layers = adaptive_layers(model).values()
    for layer in layers:
        layer.observers.append(lambda call: seen.append(torch.from_numpy(call.plan.counts_RE)))
    losses = []
    for ids_BT, ids_LTK in batches:
        with replay(model, ids_LTK):
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
            loss.backward()
        losses.append(float(loss.detach()))
    for layer in layers:
        layer.observers.clear()
    gradients = [p.grad.full_tensor().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return losses, torch.stack(seen).view(MICRO, -1, *seen[0].shape), gradients


def twice(folder: Path, planner: str, transport: str):
    """The update planned as it goes, and planned ahead."""
    ranks = dist.get_world_size()
    model = load(folder, Layout(ranks, ranks, planner=planner, transport=transport)).train()
    batches = rolled_out(model)
    planned_MLRE = plan_ahead(model, [ids_LTK for _, ids_LTK in batches])
    ahead = updated(model, batches)
    as_it_goes = updated(model, batches)
    assert torch.equal(torch.from_numpy(planned_MLRE), ahead[1])
    assert torch.equal(ahead[1], as_it_goes[1])
    assert ahead[0] == as_it_goes[0]
    assert all(map(torch.equal, ahead[2], as_it_goes[2]))
    return planned_MLRE.shape


@pytest.mark.parametrize(
    ("family", "planner", "transport"),
    [("qwen3_moe", "exact", "dedup"), ("mixtral", "bounded", "all_gather")],
)
def test_the_planned_counts_are_those_of_the_update(family, planner, transport, ranks2, judge: Judge) -> None:
    shapes = ranks2.run(twice, judge.checkpoint(family), planner, transport)
    assert shapes == [(MICRO, 2, 2, 8)] * 2


def exchanges(folder: Path):
    """What inference and training take with "auto", by rows of all ranks."""
    model = load(folder, Layout(2, 2, planner="exact", transport="auto")).eval()
    seen = []
    next(iter(adaptive_layers(model).values())).observers.append(seen.append)
    with torch.no_grad():
        for tokens in (1, 200):
            model(input_ids=torch.ones(1, tokens, dtype=torch.int64), use_cache=False)
    return [(call.choice.planner, call.choice.exchange.transport) for call in seen]


def test_inference_takes_the_exchange_of_its_size(ranks2: RankPool, judge: Judge) -> None:
    found = ranks2.run(exchanges, judge.checkpoint("mixtral"))
    assert found == [[("static", "all_to_all"), ("exact", "dedup")]] * 2


def unlike(folder: Path):
    """Every rank's update is routed otherwise than it was planned."""
    model = load(folder, Layout(2, 2)).train()
    (ids_BT, ids_LTK), _ = rolled_out(model)
    with pytest.raises(ConfigError, match="is not of the 2 adaptive layers"):
        plan_ahead(model, [ids_LTK[:1]])
    plan_ahead(model, [torch.zeros_like(ids_LTK)])
    with pytest.raises(PlanError, match="was not what its plan was made for"), replay(model, ids_LTK):
        model(input_ids=ids_BT, use_cache=False)
    return "refused"


def test_an_update_of_other_routing_is_refused(ranks2: RankPool, judge: Judge) -> None:
    assert ranks2.run(unlike, judge.checkpoint("mixtral")) == ["refused"] * 2


def test_what_was_not_recorded_is_dealt_evenly() -> None:
    routing_LTK = torch.full((2, 3, 2), 7)
    ids_LTK = batch_routing([routing_LTK, routing_LTK[:, :1]], 5, 8)
    assert ids_LTK.shape == (2, 10, 2)
    assert (ids_LTK[:, [0, 1, 2, 5]] == 7).all()
    assert ids_LTK[0, 3:5].tolist() == [[6, 7], [0, 1]]
    with pytest.raises(ConfigError, match="3 recorded tokens in a batch of width 2"):
        batch_routing([routing_LTK], 2, 8)
